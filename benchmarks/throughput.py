"""Images per second and peak memory of a training step and of inference: RevBiFPN against plain autograd and rivals.

    python benchmarks/throughput.py                              S0 in every variant, and rivals
    python benchmarks/throughput.py --quick                      fast, reversible and stored S0, about a minute
    python benchmarks/throughput.py --published ~/RevBiFPN       the published code in the same run
    python benchmarks/throughput.py --dtype bfloat16 --streams fixed32,fixed16
    python benchmarks/throughput.py --models 'revbifpn_s3/*' --resolution 288 --batch 2,4
    python benchmarks/throughput.py --models 'revbifpn_s0/[fs]*' --batch 1,8 --threads 1 --onnxruntime
    python benchmarks/throughput.py --models 'revbifpn_s0/[fs]*' --budgets 0.25,0.5,0.75 --reduce-overhead --offload

All contestants take turns in one process, after the gradients of the RevBiFPN variants were found equal. Prints tables,
the largest batch that fits into 8, 16, 24 and 80 GB among them, and writes the raw numbers (JSON, CSV) and a plot (PNG)
to benchmarks/results. How it is measured is described in docs/throughput.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch

from benchmarks.harness import command, networks, plots, results
from benchmarks.harness.agreement import GATE, check_agreement
from benchmarks.harness.capacity import GIGABYTES, capacities, show_capacities
from benchmarks.harness.command import UsageError, entry
from benchmarks.harness.networks import (
    COMPILED,
    DTYPES,
    FAST,
    OFFLOADED,
    PUBLISHED,
    REVBIFPN,
    catalogue,
    kind_of,
)
from benchmarks.harness.steps import INFER, TRAIN, Runner, tf32
from benchmarks.harness.terminal import Column, print_table, track
from benchmarks.harness.timing import alternate, paired_ratios, quantiles, seconds
from revbifpn.memory import MIB
from revbifpn.streams import FIXED16, FIXED32, FLOAT32

QUICK_MODELS = "revbifpn_s0/fast,revbifpn_s0/reversible,revbifpn_s0/stored"
MODELS = {
    # all but the compiled, which take minutes there
    "cpu": "revbifpn_s0/[frs]*,revbifpn_s0/checkpointed,"
    "hrnet_w18/stored,hrnet_w18/checkpointed,tf_efficientnet_b0/stored,tf_efficientnet_b0/checkpointed",
    "cuda": "revbifpn_s0,revbifpn_s3,revbifpn_s6,hrnet_w*,tf_efficientnet_b0,tf_efficientnetv2_s",
}
WARM_UP, ROUNDS, QUICK_ROUNDS = 2, {"cpu": 9, "cuda": 25}, 3
FORMATS = (FLOAT32, FIXED32, FIXED16)


@dataclass
class Row:
    """One network at one task and batch. Times are of one step; ratios are paired within rounds, then summarised."""

    task: str
    model: str
    variant: str
    family: str
    label: str
    top1: float
    resolution: int
    batch: int
    dtype: str
    rounds: int = 0
    seconds: float | None = None  # median
    seconds_p20: float | None = None
    seconds_p80: float | None = None
    images_per_second: float | None = None
    ratio: float | None = None  # time over that of the fast RevBiFPN named in ratio_to
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    ratio_to: str | None = None
    peak_bytes: int | None = None
    meter: str | None = None
    note: str = ""  # why there is no time


ROW_KEYS = ("task", "model", "variant", "family", "resolution", "batch", "dtype")
UNITS = {
    "images_per_second": "1/s",
    **dict.fromkeys(("seconds", "seconds_p20", "seconds_p80"), "s"),
    **dict.fromkeys(("ratio", "ratio_p20", "ratio_p80"), "1"),
    "peak_bytes": "B",
    **dict.fromkeys(("loss_error", "gradient_error"), "1"),
    **{f"largest_batch_{gigabytes}gb": "1" for gigabytes in GIGABYTES},
}


def base_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fast RevBiFPN that a row is compared with: of the same network, else the smallest at least as accurate."""
    fast = [r for r in rows if (r.task, r.batch, r.family, r.variant) == (row.task, row.batch, REVBIFPN, FAST)]
    same = [r for r in fast if r.model == row.model]
    able = [r for r in fast if r.top1 >= row.top1] if row.family != REVBIFPN else []
    return (same or sorted(able, key=lambda r: r.top1) or [None])[0]


def time_all(runners: Sequence[Runner], task: str, batch: int, resolution: int, rounds: int) -> list[Row]:
    """Time the task at one batch, taking turns, and meter its memory. The row of a contestant that fails says why."""
    rows, actions = [], []
    device = runners[0].device
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    for runner in runners:
        row = Row(task, **runner.network.about, resolution=resolution, batch=batch, dtype=runner.dtype)
        rows.append(row)
        with _noting(row):
            if reason := networks.why_not(runner.network, device):
                raise NotRun(reason)
            row.peak_bytes, row.meter = runner.peak(task, images)  # first: it may tune kernels, and leaves no gradients
            action = runner.action(task, images, labels)
            for _ in range(WARM_UP):
                seconds(action, device)
            actions.append((row, action))
    timed = [row for row, _ in actions]
    times = alternate([action for _, action in actions], rounds, lambda action: seconds(action, device))
    for row, own in zip(timed, times, strict=True):
        row.rounds = rounds
        row.seconds, row.seconds_p20, row.seconds_p80 = quantiles(own)
        row.images_per_second = batch / row.seconds
        base = base_of(row, timed)
        if base is not None:
            row.ratio, row.ratio_p20, row.ratio_p80 = paired_ratios(own, times[timed.index(base)])
            row.ratio_to = base.label
    for runner in runners:
        runner.model.zero_grad(set_to_none=True)
    return rows


class NotRun(Exception):
    """There is nothing to time on this device."""


@contextmanager
def _noting(row: Row) -> Iterator[None]:
    """Out of memory, or PyTorch's and the published code that fails, is a note in the row; our own code must not."""
    try:
        yield
    except NotRun as reason:
        row.note = f"not run: {reason}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        row.note = "out of memory"
    except RuntimeError as error:
        if kind_of(row.variant) not in (COMPILED, OFFLOADED, PUBLISHED):
            raise
        row.note = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each task that there is."""
    found = {title: [row for row in rows if row.task == task] for task, title in TITLES.items()}
    return {title: chosen for title, chosen in found.items() if chosen}


TITLES = {TRAIN: "Training step", INFER: "Inference"}


def show(rows: Sequence[Row], environment: dict[str, Any], gate: Sequence[dict[str, Any]]) -> None:
    """Prints one table per task."""
    columns = (
        Column("model", number=False),
        Column("activations", number=False),
        Column("batch"),
        Column("images/s"),
        Column("ms"),
        Column("p20-p80 ms"),
        Column("time x fast RevBiFPN"),
        Column("p20-p80"),
        Column("peak MiB"),
    )
    for title, chosen in tables(rows).items():
        groups: dict[tuple[int, str], list[list[str]]] = {}
        for row in chosen:
            groups.setdefault((row.batch, row.model), []).append(_cells(row))
        title = f"{title} at {chosen[0].resolution} pixels, {chosen[0].dtype}"
        print_table(title, columns, groups.values(), _caption(environment, chosen, gate))


def _cells(row: Row) -> list[str]:
    cells = [row.label, row.variant, str(row.batch)]
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.1f}"
    if row.seconds is None:
        return [*cells, row.note, "-", "-", "-", "-", peak]
    cells += [f"{row.images_per_second:.1f}", f"{row.seconds * 1e3:.1f}"]
    cells += [f"{row.seconds_p20 * 1e3:.1f}-{row.seconds_p80 * 1e3:.1f}"]
    if row.ratio is None:
        return [*cells, "-", "-", peak]
    to = row.ratio_to.removeprefix(REVBIFPN + "-")
    return [*cells, f"{row.ratio:.2f} x {to}", f"{row.ratio_p20:.2f}-{row.ratio_p80:.2f}", peak]


def _caption(environment: dict[str, Any], rows: Sequence[Row], gate: Sequence[dict[str, Any]]) -> str:
    rounds = max(row.rounds for row in rows)
    lines = [
        f"Median of {rounds} rounds in which each takes a turn; ratios are taken within a round.",
        "time x fast RevBiFPN: above 1 slower than it, of the same network or, for rivals, the smallest here with at",
        "least the rival's top-1 (each published at its own resolution); - where there is none.",
    ]
    if any(row.dtype != rows[0].dtype for row in rows):
        lines.append("The published code ran in float32: its recomputation does not know autocast on a CPU.")
    if gate:
        worst = max(entry["gradient_error"] for entry in gate)
        lines.append(f"Gradients agree with the stored plain model's: relative error at most {worst:.1e} in float32.")
    return "\n".join([*lines, results.origin(environment)])


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--models", help="comma list of names or wildcards: revbifpn_s0, hrnet*, 'revbifpn_s3/*'")
    parser.add_argument("--batch", help="comma list of batches to sweep (default 8; on CUDA 8,32,128)")
    parser.add_argument("--resolution", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="16 bits: under autocast")
    parser.add_argument("--rounds", type=int, help="turns that each takes (default 9; on CUDA 25)")
    parser.add_argument("--published", metavar="DIR", help="a checkout of the published code, to run as well")
    parser.add_argument("--streams", help=f"comma list of {', '.join(FORMATS)}: fast once more with such streams")
    parser.add_argument("--graph", action="store_true", help="CUDA: fast and stored once more, step in a CUDA graph")
    parser.add_argument("--tf32", action="store_true", help="CUDA: let all float32 products and convolutions use TF32")
    parser.add_argument("--budgets", help="comma list of 0 to 1: stored once more, compiled, keeping that much memory")
    parser.add_argument("--reduce-overhead", action="store_true", help="stored once more, compiled with CUDA graphs")
    parser.add_argument("--offload", action="store_true", help="stored once more, activations in the host's memory")
    parser.add_argument("--onnxruntime", action="store_true", help="CPU: stored once more at inference, by onnxruntime")
    parser.add_argument("--threads", type=int, help="PyTorch's and onnxruntime's (default: as PyTorch chooses)")
    parser.add_argument(
        "--defaults", action="store_true", help="all once more with PyTorch's default: TF32 convolutions"
    )
    parser.add_argument("--quick", action="store_true", help="three variants of S0, few rounds, no largest batches")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON, CSV and PNG")
    return parser


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    command.check_resolution(arguments.resolution)
    command.at_least_one(rounds=arguments.rounds, threads=arguments.threads)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.onnxruntime:
        command.require("onnxruntime", "'.[onnx]'")
    device = arguments.device = command.pick_device(arguments.device)
    for flag in ("graph", "tf32"):
        if getattr(arguments, flag) and device.type != "cuda":
            raise UsageError(f"--{flag}: needs CUDA, and this runs on the {device.type}")
    default = "4" if arguments.quick else "8,32,128" if device.type == "cuda" else "8"
    arguments.batch = command.numbers("--batch", arguments.batch or default)
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS[device.type])
    published = networks.load_published(arguments.published) if arguments.published else None
    models = arguments.models or (QUICK_MODELS if arguments.quick else MODELS[device.type])
    chosen = networks.choose(models, catalogue(published))
    arguments.output = command.pick_output(arguments.output)
    networks.check_packages(chosen)
    formats = command.some_of("--streams", arguments.streams, FORMATS) if arguments.streams else []
    budgets = command.fractions("--budgets", arguments.budgets) if arguments.budgets else []
    more = [(True, partial(networks.in_streams, formats=formats)), (arguments.graph, networks.in_a_graph)]
    more += [
        (True, partial(networks.on_budgets, budgets=budgets)),
        (arguments.reduce_overhead, networks.without_overhead),
    ]
    more += [
        (arguments.offload, networks.offloaded),
        (arguments.onnxruntime, networks.in_onnxruntime),
        (arguments.defaults, networks.with_defaults),
    ]
    for wanted, again in more:
        chosen = [n for c in chosen for n in (c, *(again(c) if wanted else ()))]
    arguments.networks = chosen
    return arguments


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _checked(argv)
    device, resolution = arguments.device, arguments.resolution
    environment = results.environment(device)
    print("comparing gradients", file=sys.stderr, flush=True)
    with tf32(products=False, convolutions=False):
        gate = check_agreement(arguments.networks, device)
    with tf32(products=arguments.tf32, convolutions=arguments.tf32):
        runners = [Runner(network, device, arguments.dtype) for network in arguments.networks]
        rows, turns = [], [(task, batch) for task in (TRAIN, INFER) for batch in arguments.batch]
        for task, batch in track(turns, lambda turn: f"{turn[0]}, batch {turn[1]}", "throughput"):
            left_out = "only_infers" if task == TRAIN else "only_trains"
            taking_part = [r for r in runners if not getattr(r.network, left_out)]
            if taking_part:
                rows += time_all(taking_part, task, batch, resolution, arguments.rounds)
        largest = [] if arguments.quick else capacities(runners, resolution, max(arguments.batch))

    name = f"throughput_{device.type}_{arguments.dtype}" + "_quick" * arguments.quick
    settings = {"rounds": arguments.rounds, "warm_up": WARM_UP, "tf32": arguments.tf32, "gate": GATE, "agreement": gate}
    records = [asdict(row) for row in rows] + largest
    plot = partial(plots.speeds, tables([row for row in rows if row.seconds is not None]))
    written = results.save(arguments.output / name, environment, settings, records, ROW_KEYS, UNITS, plot)
    show(rows, environment, gate)
    show_capacities(largest, device)
    print(written)


if __name__ == "__main__":
    sys.exit(main())
