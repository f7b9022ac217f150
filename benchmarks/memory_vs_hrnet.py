"""Peak training memory per sample: RevBiFPN against HRNet and EfficientNet, one training step of each.

    python benchmarks/memory_vs_hrnet.py                      all models, at 224 pixels and each at its own resolution
    python benchmarks/memory_vs_hrnet.py --quick              a few models, under a minute
    python benchmarks/memory_vs_hrnet.py --models 'revbifpn_s2,hrnet*' --resolution 512

Prints a table per resolution and writes the raw numbers (JSON, CSV) and a plot (PNG) to benchmarks/results. What is
metered, and how, is described in docs/memory.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch

from benchmarks.harness import command, networks, plots, results
from benchmarks.harness.command import UsageError, entry
from benchmarks.harness.networks import CHECKPOINTED, DTYPES, FAST, REVBIFPN, REVERSIBLE, STORED, Network
from benchmarks.harness.processes import in_processes
from benchmarks.harness.terminal import Column, print_table, track
from revbifpn.memory import MIB, measure_sample

# Without a GPU, models whose two steps take more multiply-accumulates are metered on fake tensors. The fast RevBiFPN
# has a higher limit: its chunks are so many small ops that computing them takes less time than pretending to.
REAL_GMACS, REAL_GMACS_FAST = 30, 500
MAX_JOBS = 8  # processes; the largest real steps take about 2 GiB each
QUICK = "revbifpn_s0,revbifpn_s2/fast,hrnet_w18,tf_efficientnet_b0"
EQUAL, NATIVE = "equal", "native"  # all at one resolution, or each at the one that it was trained at


@dataclass
class Row:
    """One measured network at one resolution; bytes are those of :class:`revbifpn.memory.SampleMemory`."""

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
BYTES = (
    *("bytes_per_sample", "kept_bytes_per_sample", "fixed_bytes", "peak_bytes", "peak_bytes_twice_batch"),
    *("parameter_bytes", "gradient_bytes", "reserved_bytes"),
)
UNITS = {**dict.fromkeys(BYTES, "B"), "parameters": "1", "top1": "%", "ratio": "1"}


def candidates() -> list[Network]:
    """Every model in the variants that are metered here, grouped by family and variant."""
    variants = {REVBIFPN: (FAST, REVERSIBLE, STORED)}
    metered = [n for n in networks.catalogue() if n.variant in variants.get(n.family, (STORED, CHECKPOINTED))]
    groups = dict.fromkeys((family, v) for family in dict.fromkeys(n.family for n in metered) for v in KINDS)
    return [n for group in groups for n in metered if (n.family, n.variant) == group]


KINDS = (FAST, REVERSIBLE, STORED, CHECKPOINTED)


def select(patterns: str) -> list[Network]:
    return networks.choose(patterns, candidates())


def default_batch(network: Network) -> int:
    """1 where memory is linear from there on; more where work goes by chunks of samples and the peak may move."""
    if network.variant not in (FAST, REVERSIBLE):
        return 1
    return 8 if network.gmacs < 2 else 4


@dataclass(frozen=True)
class Task:
    """One row to measure, as a process can be given it; ``settings``: the tables that it stands in."""

    key: str
    resolution: int
    settings: tuple[str, ...]
    batch: int
    dtype: str
    device: str
    fake: bool
    gmacs: float  # of its two steps

    @property
    def label(self) -> str:
        return f"{self.key} at {self.resolution}"


def tasks(arguments: Any) -> list[Task]:
    found, device = [], arguments.device
    for c in arguments.candidates:
        wanted = {arguments.resolution: (EQUAL,), c.resolution: (NATIVE,)}
        if arguments.resolution == c.resolution:
            wanted = {c.resolution: (EQUAL, NATIVE)}
        for resolution, settings in wanted.items():
            batch = arguments.batch or default_batch(c)
            # Two steps, at b and 2b: forward, its recomputation, and twice that for gradients.
            gmacs = c.gmacs * (resolution / c.resolution) ** 2 * 4 * 3 * batch
            large = gmacs > (REAL_GMACS_FAST if c.variant == FAST else REAL_GMACS)
            fake = arguments.fake == "always" or (arguments.fake == "large" and large and device.type != "cuda")
            found.append(Task(c.key, resolution, settings, batch, arguments.dtype, str(device), fake, gmacs))
    return found


def measure(task: Task) -> Row:
    """Two real steps of the task's model, or two on fake tensors."""
    (network,) = select(task.key)
    torch.manual_seed(0)
    shape = (3, task.resolution, task.resolution)
    options = {"batch": task.batch, "dtype": DTYPES[task.dtype], "device": task.device, "fake": task.fake}
    memory = measure_sample(network.make(), shape, **options)
    small, large = memory.small, memory.large
    return Row(
        **network.about,
        parameters=network.parameters,
        setting=task.settings[0],
        resolution=task.resolution,
        batch=task.batch,
        dtype=task.dtype,
        meter=small.meter,
        bytes_per_sample=memory.bytes_per_sample,
        kept_bytes_per_sample=memory.kept_bytes_per_sample,
        fixed_bytes=memory.fixed_bytes,
        peak_bytes=small.peak_bytes,
        peak_bytes_twice_batch=large.peak_bytes,
        parameter_bytes=large.parameter_bytes,
        gradient_bytes=large.gradient_bytes,
        reserved_bytes=large.reserved_bytes,
    )


def measure_all(arguments: Any) -> list[Row]:
    """The rows in the order of the catalogue, one for each table that a task stands in."""
    everything = tasks(arguments)
    if arguments.jobs == 1:
        rows = {task: measure(task) for task in track(everything, lambda task: task.label, "memory")}
    else:
        longest_first = sorted(everything, key=lambda task: -task.gmacs)
        done = in_processes(measure, longest_first, arguments.jobs)
        rows = dict(track(done, lambda pair: pair[0].label, "memory", total=len(everything)))
    return [replace(rows[task], setting=setting) for task in everything for setting in task.settings]


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


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each setting that there is, by what it says about resolution."""
    equal, native = ([row for row in rows if row.setting == setting] for setting in (EQUAL, NATIVE))
    found = {f"at {equal[0].resolution} pixels": equal} if equal else {}
    return found | ({"each at its own training resolution": native} if native else {})


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
    for where, chosen in tables(rows).items():
        groups: dict[tuple[str, str], list[list[str]]] = {}
        for row in chosen:
            groups.setdefault((row.family, row.variant), []).append(_cells(row))
        title = f"Peak training memory per sample, {where}, {chosen[0].dtype}"
        print_table(title, columns, groups.values(), _caption(environment, chosen))


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
    return "\n".join([*lines, results.origin(environment)])


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--models", help="comma list of names or wildcards: revbifpn_s0, hrnet*, '*/checkpointed'")
    parser.add_argument("--resolution", type=int, default=224, help="pixels, of the first table (default 224)")
    parser.add_argument("--batch", type=int, help="b of (peak(2b) - peak(b)) / b (default: see docs/memory.md)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="16 bits: under autocast")
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
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON, CSV and PNG")
    return parser


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    command.check_resolution(arguments.resolution)
    command.at_least_one(batch=arguments.batch, jobs=arguments.jobs)
    arguments.device = command.pick_device(arguments.device)
    if arguments.device.type == "cuda":
        arguments.jobs = 1
    elif arguments.jobs is None:
        arguments.jobs = 1 if arguments.quick else min(MAX_JOBS, torch.get_num_threads())
    if arguments.fake == "always" and arguments.device.type == "cuda":
        raise UsageError("--fake: the CUDA allocator is metered on real tensors only; add --device cpu")
    arguments.candidates = select(arguments.models or (QUICK if arguments.quick else "*"))
    arguments.output = command.pick_output(arguments.output)
    networks.check_packages(arguments.candidates)
    return arguments


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _checked(argv)
    environment = results.environment(arguments.device)
    rows = measure_all(arguments)
    add_ratios(rows)

    name = f"memory_vs_hrnet_{arguments.device.type}_{arguments.dtype}" + "_quick" * arguments.quick
    settings = {"resolution": arguments.resolution, "batch": arguments.batch, "fake": arguments.fake}
    plot = partial(plots.memory, tables(rows))
    records = [asdict(row) for row in rows]
    written = results.save(arguments.output / name, environment, settings, records, ROW_KEYS, UNITS, plot)
    show(rows, environment)
    print(written)


if __name__ == "__main__":
    sys.exit(main())
