"""The figures beside the tables; rows are those of the script that calls. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.networks import (
    CHECKPOINTED,
    COMPILED,
    FAST,
    GRAPH,
    OFFLOADED,
    ONNXRUNTIME,
    OVERHEAD,
    PUBLISHED,
    REVBIFPN,
    REVERSIBLE,
    STORED,
    STREAM,
    kind_of,
)
from revbifpn.memory import MIB

# Okabe and Ito's colours, told apart by colour-blind readers; markers differ as well.
FAMILIES = {
    (REVBIFPN, FAST): ("#0072B2", "o"),
    (REVBIFPN, REVERSIBLE): ("#56B4E9", "s"),
    (REVBIFPN, STORED): ("#000000", "^"),
    ("HRNet", STORED): ("#D55E00", "D"),
    ("HRNet", CHECKPOINTED): ("#D55E00", "D"),
    ("EfficientNet", STORED): ("#009E73", "v"),
    ("EfficientNet", CHECKPOINTED): ("#009E73", "v"),
    ("EfficientNetV2", STORED): ("#CC79A7", "P"),
    ("EfficientNetV2", CHECKPOINTED): ("#CC79A7", "P"),
}
KINDS = {
    FAST: "#0072B2",
    REVERSIBLE: "#56B4E9",
    STORED: "#000000",
    COMPILED: "#E69F00",
    CHECKPOINTED: "#009E73",
    OFFLOADED: "#CC79A7",
    PUBLISHED: "#D55E00",
    ONNXRUNTIME: "#F0E442",
}
MARKERS = "osD^vP<>*Xh"


@contextmanager
def panels(path: Path, titles: Sequence[str], height: float, legend: bool = True, **options: Any) -> Iterator[list]:
    """Axes side by side, one for each title, with a legend below all; saved to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (6.4 * len(titles), height)
    figure, axes = plt.subplots(1, len(titles), figsize=size, squeeze=False, layout="constrained", **options)
    try:
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
            axis.grid(alpha=0.3)
        yield list(axes[0])
        if legend:
            handles = {label: h for a in axes[0] for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
            below = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
            figure.legend(handles.values(), handles.keys(), **below)
        figure.savefig(path, dpi=160)
    finally:
        plt.close(figure)


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def memory(tables: dict[str, Sequence[Any]], path: Path) -> None:
    """Memory per sample (logarithmic) over top-1, a panel per table, a line per family and variant."""
    with panels(path, list(tables), 5.6, sharey=True) as axes:
        for axis, rows in zip(axes, tables.values(), strict=True):
            for (family, variant), style in FAMILIES.items():
                series = sorted((r for r in rows if (r.family, r.variant) == (family, variant)), key=lambda r: r.top1)
                _memory_line(axis, series, *style)
            axis.set_yscale("log")
            _plain_numbers(axis.yaxis)
            axis.set_xlabel("published ImageNet top-1, %")
            axis.grid(which="minor", axis="y", alpha=0.12)
        dtype = next(iter(tables.values()))[0].dtype
        axes[0].set_ylabel(f"peak training memory, MiB per sample ({dtype})")


def _memory_line(axis: Any, series: Sequence[Any], colour: str, marker: str) -> None:
    if not series:
        return
    family, variant = series[0].family, series[0].variant
    checkpointed, fast = variant == CHECKPOINTED, variant == FAST
    axis.plot(
        [r.top1 for r in series],
        [r.bytes_per_sample / MIB for r in series],
        color=colour,
        marker=marker,
        linestyle="--" if checkpointed else "-",
        markerfacecolor="white" if checkpointed else colour,
        linewidth=2.4 if fast else 1.4,
        label=f"{family}, {variant}",
    )
    where = {"xytext": (0, -6 if fast else 5), "textcoords": "offset points", "va": "top" if fast else "bottom"}
    for r in series:
        point = (r.top1, r.bytes_per_sample / MIB)
        axis.annotate(r.label.rsplit("-", 1)[1], point, ha="center", fontsize=7, color=colour, **where)


def speeds(tables: dict[str, Sequence[Any]], path: Path) -> None:
    """Images per second, a panel per table: bars for one batch, lines over the batch for several."""
    rows = [row for table in tables.values() for row in table]
    names = list(dict.fromkeys((row.label, row.variant) for row in rows))
    batches = sorted({row.batch for row in rows})
    if len(batches) == 1:
        with panels(path, list(tables), 1.6 + 0.28 * len(names), legend=False) as axes:
            for axis, table in zip(axes, tables.values(), strict=True):
                _bars(axis, table[::-1])
                axis.set_xlabel(f"images per second (batch {batches[0]}, p20 to p80)")
        return
    networks = list(dict.fromkeys(label for label, _ in names))
    with panels(path, list(tables), 5.4) as axes:
        for axis, table in zip(axes, tables.values(), strict=True):
            for label, variant in names:
                series = sorted((r for r in table if (r.label, r.variant) == (label, variant)), key=lambda r: r.batch)
                axis.plot(
                    [r.batch for r in series],
                    [r.images_per_second for r in series],
                    color=KINDS[kind_of(variant)],
                    marker=MARKERS[networks.index(label) % len(MARKERS)],
                    linestyle=":" if GRAPH in variant or OVERHEAD in variant else "--" if STREAM in variant else "-",
                    label=f"{label}, {variant}",
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            _plain_numbers(axis.xaxis)
            _plain_numbers(axis.yaxis)
            axis.set_xlabel("batch")
            axis.set_ylabel("images per second")


def _bars(axis: Any, rows: Sequence[Any]) -> None:
    speed = [row.images_per_second for row in rows]
    below = [max(0.0, s - row.batch / row.seconds_p80) for s, row in zip(speed, rows, strict=True)]
    above = [max(0.0, row.batch / row.seconds_p20 - s) for s, row in zip(speed, rows, strict=True)]
    colours = [KINDS[kind_of(row.variant)] for row in rows]
    bars = axis.barh(range(len(rows)), speed, xerr=(below, above), color=colours, ecolor="#777777")
    axis.bar_label(bars, [f"{s:.1f}" for s in speed], padding=4, fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{row.label}, {row.variant}" for row in rows], fontsize=8)
    axis.margins(x=0.12)


def shares(rows: Sequence[dict[str, Any]], kinds: Sequence[str], title: str, path: Path) -> None:
    """A bar per profiled model: the time of its kernels by what they are for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(rows)), layout="constrained")
    labels = [f"{row['variant']}, {row['dtype']}" for row in rows]
    left = [0.0] * len(rows)
    for kind, colour in zip(kinds, plt.get_cmap("tab20").colors, strict=False):
        widths = [1e3 * row["busy_seconds"] * row.get(kind, 0.0) for row in rows]
        axis.barh(labels, widths, left=left, color=colour, label=kind.removeprefix("share_"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("time in kernels, ms")
    axis.set_title(title)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def detection(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Published AP over the memory of an image (logarithmic), a panel per detector that has a published AP."""
    shown = {
        row["detector"]: [r for r in rows if r["detector"] == row["detector"] and r["published_ap"]] for row in rows
    }
    shown = {detector: own for detector, own in shown.items() if own}
    with panels(path, list(shown) or ["no published AP"], 5.6) as axes:
        for axis, own in zip(axes, shown.values(), strict=False):
            groups = dict.fromkeys((row["model"].rstrip("0123456789"), row["variant"]) for row in own)
            for i, (family, variant) in enumerate(groups):
                series = [r for r in own if (r["model"].rstrip("0123456789"), r["variant"]) == (family, variant)]
                name = family.rstrip("_sw")
                colour = KINDS.get(kind_of(variant), "#777777") if name == "revbifpn" else plain_colour(name)
                axis.plot(
                    [r["per_image_bytes"] / MIB for r in series],
                    [r["published_ap"] for r in series],
                    color=colour,
                    marker=MARKERS[i % len(MARKERS)],
                    linestyle="--" if variant == CHECKPOINTED or "bf16" in variant else "-",
                    label=f"{name}, {variant}",
                )
                for r in series:
                    point = (r["per_image_bytes"] / MIB, r["published_ap"])
                    label = r["model"].removeprefix("revbifpn_").removeprefix("hrnet_").removeprefix("resnet")
                    axis.annotate(label, point, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
            axis.set_xscale("log")
            _plain_numbers(axis.xaxis)
            axis.set_xlabel("memory of an image in training, MiB")
            axis.set_ylabel("published box AP on COCO")


def plain_colour(name: str) -> str:
    return {"hrnet": "#D55E00", "resnet": "#009E73"}.get(name, "#777777")


def memory_parts(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A stacked bar per row: what of a step's memory, of one image, belongs to which part."""
    colours = {
        "backbone": "#0072B2",
        "FPN": "#56B4E9",
        "heads": "#009E73",
        "parameters": "#999999",
        "gradients": "#BBBBBB",
        "optimizer": "#DDDDDD",
    }
    groups = list(dict.fromkeys(row["detector"] for row in rows))
    with panels(path, groups, 1.8 + 0.28 * max(sum(r["detector"] == g for r in rows) for g in groups)) as axes:
        for axis, group in zip(axes, groups, strict=True):
            own = [row for row in rows if row["detector"] == group][::-1]
            left = [0.0] * len(own)
            for part, colour in colours.items():
                key = {"parameters": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "gradient_bytes"}
                widths = [row[key.get(part, f"{part}_bytes")] / MIB for row in own]
                axis.barh(range(len(own)), widths, left=left, color=colour, label=part)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axis.set_yticks(range(len(own)), [f"{r['model']}, {r['variant']}" for r in own], fontsize=8)
            axis.set_xlabel("MiB at the peak of a step of one image; optimizer: SGD with momentum")


def losses(rows: Sequence[Any], every: int, path: Path) -> None:
    """Training loss over steps, a panel per seed, a line per way; ``every`` steps are one point."""
    colours = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")
    ways, seeds = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("way", "seed"))
    with panels(path, [f"fine-tuning, seed {seed}" for seed in seeds], 4.4, sharey=True) as axes:
        for axis, seed in zip(axes, seeds, strict=True):
            for row in (row for row in rows if row.seed == seed):
                i = ways.index(row.way)
                steps = [every * (n + 1) for n in range(len(row.losses))]
                style = {"color": colours[i % len(colours)], "linestyle": "--" if i % 2 else "-"}
                axis.plot(steps, row.losses, label=row.way, marker=MARKERS[i], markersize=3, **style)
            axis.set_yscale("log")
            axis.set_xlabel("step")
        axes[0].set_ylabel("training loss")


def ways_to_train(rows: Sequence[Any], path: Path) -> None:
    """Kept memory, peak and time relative to checkpointing: panels; lines are networks and dtypes, dots are ways."""
    titles = {
        "kept_ratio": "kept between forward and backward, to checkpointed per block",
        "peak_ratio": "peak of a step, to checkpointed per block",
        "time_ratio": "CPU time of a step, to checkpointed per block",
    }
    titles = {name: title for name, title in titles.items() if any(getattr(row, name) for row in rows)}
    lines = list(dict.fromkeys((row.network, row.pixels, row.dtype) for row in rows))[::-1]
    ways = list(dict.fromkeys(row.way for row in rows))
    colours = {"ordinary": "#000000", "checkpointed": "#009E73", "float": "#D55E00"}
    colours |= {"int32": "#0072B2", "fixed16": "#CC79A7"}
    with panels(path, list(titles.values()), 1.8 + 0.26 * len(lines)) as axes:
        for axis, name in zip(axes, titles, strict=True):
            for i, way in enumerate(ways):
                own = [row for row in rows if row.way == way and getattr(row, name)]
                x = [getattr(row, name) for row in own]
                y = [lines.index((row.network, row.pixels, row.dtype)) for row in own]
                style = {"color": colours[way.split()[0]], "marker": MARKERS[i], "markersize": 5}
                axis.plot(x, y, label=way, linestyle="none", markerfacecolor="none", **style)
            axis.set_yticks(range(len(lines)), [f"{n}/{pixels} {d}" for n, pixels, d in lines], fontsize=8)
            if name != "time_ratio":
                axis.set_xscale("log", base=2)
                _plain_numbers(axis.xaxis)
