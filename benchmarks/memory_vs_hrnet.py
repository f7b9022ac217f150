"""Peak training memory per sample: RevBiFPN against HRNet and EfficientNet, one training step of each.

    python benchmarks/memory_vs_hrnet.py                      all models, at 224 pixels and each at its own resolution
    python benchmarks/memory_vs_hrnet.py --quick              a few models, under a minute
    python benchmarks/memory_vs_hrnet.py --models 'revbifpn_s2,hrnet*' --resolution 512

Prints a table per resolution and writes the raw numbers (JSON, CSV) and a plot (PNG) to benchmarks/results. What is
metered, and how, is told in docs/memory.md.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import Column, UsageError
from benchmarks.rivals import RIVALS, import_timm
from revbifpn.configs import CONFIGS
from revbifpn.memory import MIB, measure_sample

# Without a GPU, models whose two steps take more multiply-accumulates are metered on fake tensors. The fast RevBiFPN
# has a higher limit: its chunks are so many small ops that computing them takes less time than pretending to.
REAL_GMACS, REAL_GMACS_FAST = 30, 500

MAX_JOBS = 8  # processes; the largest real steps take about 2 GiB each

QUICK = ("revbifpn_s0", "revbifpn_s2/fast", "hrnet_w18", "tf_efficientnet_b0")

EQUAL, NATIVE = "equal", "native"  # all at one resolution, or each at the one that it was trained at
FAST, REVERSIBLE, STORED, CHECKPOINTED = "fast", "reversible", "stored", "checkpointed"
REVBIFPN = "RevBiFPN"


@dataclass(frozen=True)
class Candidate:
    """A network in one way of keeping activations, as it can be asked for by ``name/variant``."""

    name: str
    variant: str
    family: str
    label: str
    resolution: int
    top1: float
    parameters: int
    gmacs: float  # of one image at resolution
    build: Callable[[], nn.Module]

    @property
    def key(self) -> str:
        return f"{self.name}/{self.variant}"

    @property
    def batch(self) -> int:
        """1 where memory is linear from there on; more where work goes by chunks of samples and the peak may move."""
        if self.variant not in (FAST, REVERSIBLE):
            return 1
        return 8 if self.gmacs < 2 else 4

    def step_gmacs(self, resolution: int, batch: int) -> float:
        """Of the two steps at ``batch`` and ``2 * batch``: forward, its recomputation, and twice that for gradients."""
        return self.gmacs * (resolution / self.resolution) ** 2 * 4 * 3 * batch


@dataclass
class Row:
    """One measured candidate at one resolution; bytes are those of :class:`revbifpn.memory.SampleMemory`."""

    setting: str
    model: str
    variant: str
    family: str
    label: str
    resolution: int
    top1: float
    parameters: int
    batch: int
    dtype: str
    meter: str
    bytes_per_sample: float
    kept_bytes_per_sample: float
    fixed_bytes: float
    peak_bytes: int
    peak_bytes_twice_batch: int
    parameter_bytes: int
    gradient_bytes: int
    reserved_bytes: int | None = None
    ratio: float | None = None
    ratio_to: str | None = None


ROW_KEYS = ("setting", "model", "variant", "family", "resolution", "batch", "dtype", "meter")
UNITS = {
    "bytes_per_sample": "B",
    "kept_bytes_per_sample": "B",
    "fixed_bytes": "B",
    "peak_bytes": "B",
    "peak_bytes_twice_batch": "B",
    "parameter_bytes": "B",
    "gradient_bytes": "B",
    "reserved_bytes": "B",
    "parameters": "1",
    "top1": "%",
    "ratio": "1",
}


def candidates() -> list[Candidate]:
    """Every model in every variant, grouped by family and variant."""
    found = []
    for variant in (FAST, REVERSIBLE, STORED):
        for config in CONFIGS.values():
            label = f"{REVBIFPN}-{config.arch.rsplit('_', 1)[1].upper()}"
            numbers = (config.resolution, config.top1, config.parameters, config.macs / 1e9)
            found.append(Candidate(config.arch, variant, REVBIFPN, label, *numbers, _revbifpn(config.arch, variant)))
    for family in dict.fromkeys(rival.family for rival in RIVALS.values()):
        for variant in (STORED, CHECKPOINTED):
            for rival in (r for r in RIVALS.values() if r.family == family):
                numbers = (rival.resolution, rival.top1, round(rival.parameters * 1e6), rival.gmacs)
                build = _rival(rival.name, variant)
                found.append(Candidate(rival.name, variant, family, rival.label, *numbers, build))
    return found


def _revbifpn(arch: str, variant: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import revbifpn
        import revbifpn.fast

        package = revbifpn.fast if variant == FAST else revbifpn
        return getattr(package, arch)(reversible=variant != STORED)

    return build


def _rival(name: str, variant: str) -> Callable[[], nn.Module]:
    return lambda: RIVALS[name].build(checkpointed=variant == CHECKPOINTED)


def select(patterns: Sequence[str]) -> list[Candidate]:
    """The candidates whose ``name`` or ``name/variant`` matches one of the wildcard patterns, in catalogue order."""
    everything = candidates()
    chosen = set()
    for pattern in patterns:
        hits = {c.key for c in everything if fnmatchcase(c.key, pattern) or fnmatchcase(c.name, pattern)}
        if not hits:
            known = sorted({c.name for c in everything} | ({c.key for c in everything} if "/" in pattern else set()))
            close = difflib.get_close_matches(pattern, known, n=4, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(known)}"
            raise UsageError(f"--models: {pattern!r} is unknown; {hint}")
        chosen |= hits
    return [c for c in everything if c.key in chosen]


@dataclass(frozen=True)
class Task:
    """One row to measure, as a process can be told it; ``settings``: the tables that it stands in."""

    key: str
    resolution: int
    settings: tuple[str, ...]
    batch: int
    dtype: str
    device: str
    fake: bool
    gmacs: float  # of its two steps


def measure(task: Task) -> Row:
    """Two real steps of the task's model, or two on fake tensors."""
    (candidate,) = select([task.key])
    torch.manual_seed(0)
    shape, dtype = (3, task.resolution, task.resolution), common.DTYPES[task.dtype]
    options = {"batch": task.batch, "dtype": dtype, "device": task.device, "fake": task.fake}
    memory = measure_sample(candidate.build(), shape, **options)
    return Row(
        setting=task.settings[0],
        model=candidate.name,
        variant=candidate.variant,
        family=candidate.family,
        label=candidate.label,
        resolution=task.resolution,
        top1=candidate.top1,
        parameters=candidate.parameters,
        batch=task.batch,
        dtype=task.dtype,
        meter=memory.small.meter,
        bytes_per_sample=memory.bytes_per_sample,
        kept_bytes_per_sample=memory.kept_bytes_per_sample,
        fixed_bytes=memory.fixed_bytes,
        peak_bytes=memory.small.peak_bytes,
        peak_bytes_twice_batch=memory.large.peak_bytes,
        parameter_bytes=memory.large.parameter_bytes,
        gradient_bytes=memory.large.gradient_bytes,
        reserved_bytes=memory.large.reserved_bytes,
    )


def add_ratios(rows: Sequence[Row]) -> None:
    """Sets ``ratio``: memory over that of the smallest fast RevBiFPN of the same setting with at least the row's top-1.

    Where no measured one is as accurate, ``ratio`` and ``ratio_to`` stay None.
    """
    for row in rows:
        bases = [b for b in rows if (b.setting, b.family, b.variant) == (row.setting, REVBIFPN, FAST)]
        bases = [b for b in bases if b.top1 >= row.top1]
        if bases:
            base = min(bases, key=lambda b: b.top1)
            row.ratio, row.ratio_to = row.bytes_per_sample / base.bytes_per_sample, base.label


def show(rows: Sequence[Row], environment: dict[str, Any]) -> None:
    """Prints one table per setting."""
    columns = (
        Column("model", number=False),
        Column("activations", number=False),
        Column("top-1 %"),
        Column("params M"),
        Column("px"),
        Column("MiB/sample"),
        Column("fixed MiB"),
        Column("kept MiB"),
        Column("x fast RevBiFPN"),
        Column("meter", number=False),
    )
    for setting in (EQUAL, NATIVE):
        chosen = [row for row in rows if row.setting == setting]
        if not chosen:
            continue
        where = f"at {chosen[0].resolution} pixels" if setting == EQUAL else "each at its own training resolution"
        groups: dict[tuple[str, str], list[list[str]]] = {}
        for row in chosen:
            groups.setdefault((row.family, row.variant), []).append(_cells(row))
        title = f"Peak training memory per sample, {where}, {chosen[0].dtype}"
        common.print_table(title, columns, groups.values(), _caption(environment, chosen))


def _cells(row: Row) -> list[str]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f} x {row.ratio_to.removeprefix(REVBIFPN + '-')}"
    return [
        row.label,
        row.variant,
        f"{row.top1:.1f}",
        f"{row.parameters / 1e6:.1f}",
        f"{row.resolution}",
        f"{row.bytes_per_sample / MIB:.1f}",
        f"{row.fixed_bytes / MIB:.1f}",
        f"{row.kept_bytes_per_sample / MIB:.1f}",
        ratio,
        {"tensors": "real", "fake tensors": "fake", "cuda allocator": "cuda"}[row.meter],
    ]


def _caption(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    meters = {row.meter for row in rows}
    lines = [
        "MiB/sample = (peak(2b) - peak(b)) / b over forward and backward; fixed = what the peak has beside that;",
        "kept = alive per sample between forward and backward.",
        "x fast RevBiFPN: over the smallest fast RevBiFPN measured here with at least this top-1; - where none has it.",
        "top-1: published, at the own training resolution (EfficientNetV2-S: evaluated at 384).",
    ]
    if "fake tensors" in meters:
        lines.append("fake: metered on fake tensors, same bytes without the arithmetic.")
    if meters & {"tensors"} and "cpp" not in environment["kernels"]:
        lines.append("Note: without the C++ kernels, temporaries inside their Python stand-ins are not seen.")
    lines.append(
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"kernels {'+'.join(environment['kernels'])}, commit {environment['commit']}, {environment['date']}"
    )
    return "\n".join(lines)


_COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers; markers differ as well
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


def plot(rows: Sequence[Row], path: Path) -> None:
    """Memory per sample (logarithmic) over top-1, a panel per setting, a line per family and variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    settings = [s for s in (EQUAL, NATIVE) if any(row.setting == s for row in rows)]
    figure, axes = plt.subplots(
        1, len(settings), figsize=(6.4 * len(settings), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        panel = [row for row in rows if row.setting == setting]
        for (family, variant), (colour, marker) in _COLOURS.items():
            series = sorted((r for r in panel if (r.family, r.variant) == (family, variant)), key=lambda r: r.top1)
            if not series:
                continue
            checkpointed = variant == CHECKPOINTED
            axis.plot(
                [r.top1 for r in series],
                [r.bytes_per_sample / MIB for r in series],
                color=colour,
                marker=marker,
                linestyle="--" if checkpointed else "-",
                markerfacecolor="white" if checkpointed else colour,
                linewidth=2.4 if variant == FAST else 1.4,
                label=f"{family}, {variant}",
            )
            for r in series:
                name = r.label.rsplit("-", 1)[1]
                above = (variant != FAST, -6 if variant == FAST else 5)
                axis.annotate(
                    name,
                    (r.top1, r.bytes_per_sample / MIB),
                    xytext=(0, above[1]),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if above[0] else "top",
                    fontsize=7,
                    color=colour,
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.set_xlabel("published ImageNet top-1, %")
        axis.grid(which="major", alpha=0.35)
        axis.grid(which="minor", axis="y", alpha=0.12)
        axis.set_title(f"at {panel[0].resolution} pixels" if setting == EQUAL else "each at its training resolution")
    axes[0, 0].set_ylabel(f"peak training memory, MiB per sample ({rows[0].dtype})")
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--models", help="comma list of names or wildcards: revbifpn_s0, hrnet*, '*/checkpointed'")
    parser.add_argument("--resolution", type=int, default=224, help="pixels, of the first table (default 224)")
    parser.add_argument("--batch", type=int, help="b of (peak(2b) - peak(b)) / b (default: see docs/memory.md)")
    parser.add_argument("--dtype", choices=tuple(common.DTYPES), default="float32", help="16 bits: under autocast")
    parser.add_argument("--quick", action="store_true", help="a few models, under a minute")
    parser.add_argument(
        "--fake",
        action="store_const",
        const="always",
        default="large",
        help="meter every model on fake tensors (default without a GPU: the large ones)",
    )
    parser.add_argument("--no-fake", dest="fake", action="store_const", const="never", help="run every step for real")
    parser.add_argument("--jobs", type=int, help="processes, of one thread each, on the CPU (default: one per core)")
    parser.add_argument("--output", default=str(common.RESULTS), help="directory for JSON, CSV and PNG")
    return parser


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    if arguments.resolution < 32 or arguments.resolution % 32:
        raise UsageError(f"--resolution: got {arguments.resolution}, RevBiFPN needs a positive multiple of 32")
    if arguments.batch is not None and arguments.batch < 1:
        raise UsageError(f"--batch: got {arguments.batch}, needs at least 1")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs: got {arguments.jobs}, needs at least 1")
    arguments.device = common.pick_device(arguments.device)
    if arguments.device.type == "cuda":
        arguments.jobs = 1
    elif arguments.jobs is None:
        arguments.jobs = 1 if arguments.quick else min(MAX_JOBS, torch.get_num_threads())
    if arguments.fake == "always" and arguments.device.type == "cuda":
        raise UsageError("--fake: the CUDA allocator is metered on real tensors only; add --device cpu")
    patterns = arguments.models.split(",") if arguments.models else QUICK if arguments.quick else ["*"]
    arguments.candidates = select([pattern.strip() for pattern in patterns])
    arguments.output = common.pick_output(arguments.output)
    common.require("matplotlib")
    if any(c.family != REVBIFPN for c in arguments.candidates):
        import_timm()
    return arguments


def _tasks(arguments: Any) -> list[Task]:
    tasks = []
    for candidate in arguments.candidates:
        if arguments.resolution == candidate.resolution:
            wanted = {candidate.resolution: (EQUAL, NATIVE)}
        else:
            wanted = {arguments.resolution: (EQUAL,), candidate.resolution: (NATIVE,)}
        for resolution, settings in wanted.items():
            batch = arguments.batch or candidate.batch
            gmacs = candidate.step_gmacs(resolution, batch)
            large = gmacs > (REAL_GMACS_FAST if candidate.variant == FAST else REAL_GMACS)
            fake = arguments.fake == "always" or (
                arguments.fake == "large" and large and arguments.device.type != "cuda"
            )
            device = str(arguments.device)
            tasks.append(Task(candidate.key, resolution, settings, batch, arguments.dtype, device, fake, gmacs))
    return tasks


def _measure_all(arguments: Any) -> list[Row]:
    """The rows in the order of the catalogue, one for each table that a task stands in."""
    tasks = _tasks(arguments)

    def label(task: Task) -> str:
        return f"{task.key} at {task.resolution}"

    if arguments.jobs == 1:
        rows = {task: measure(task) for task in common.track(tasks, label, "memory")}
    else:
        longest_first = sorted(tasks, key=lambda task: -task.gmacs)
        done = common.in_processes(measure, longest_first, arguments.jobs)
        rows = dict(common.track(done, lambda pair: label(pair[0]), "memory", total=len(tasks)))
    return [replace(rows[task], setting=setting) for task in tasks for setting in task.settings]


def _main(argv: Sequence[str] | None) -> None:
    arguments = _checked(argv)
    environment = common.environment(arguments.device)
    rows = _measure_all(arguments)
    add_ratios(rows)
    show(rows, environment)

    name = f"memory_vs_hrnet_{arguments.device.type}_{arguments.dtype}" + ("_quick" if arguments.quick else "")
    stem = arguments.output / name
    records = [asdict(row) for row in rows]
    settings = {"resolution": arguments.resolution, "batch": arguments.batch, "fake": arguments.fake}
    common.write_json(stem.with_suffix(".json"), environment, settings, records)
    common.write_long_csv(stem.with_suffix(".csv"), environment, records, ROW_KEYS, UNITS)
    plot(rows, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .csv, .png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark with the given arguments; returns the exit code: 0, or 2 for a usage error."""
    return common.run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
