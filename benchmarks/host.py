"""The host's time of a training step: what Python, PyTorch and the launchers take before a GPU can work.

    python benchmarks/host.py                               on a GPU
    python -m tests.null_gpu benchmarks/host.py             without one: on the GPU that does nothing
    python benchmarks/host.py --published ~/RevBiFPN        the published code as well

For every network, alternating with the others: CPU time and wall time from the call of the model to the return of
backward, without waiting for the device; kernel launches and products of one step; Triton's compilations in the first
step, after another batch, and after another image size; and the slope of the allocator's peak over the batch. float32,
and bfloat16 autocast (the fast model with int16 streams). The self-check of exact streams, which is part of the first
step only, is off. On a real GPU the batch must be small enough not to fill the launch queue; without one, plain
networks multiply sample by sample and are to be compared at --batch 1. Prints a table and writes host_null_gpu or
host_gpu, .csv and .json.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch

from benchmarks.harness import command, networks, results
from benchmarks.harness.command import entry
from benchmarks.harness.networks import FAST, PUBLISHED, REVBIFPN, STORED, Network
from benchmarks.harness.steps import TRAIN, Runner
from benchmarks.harness.terminal import Column, print_table, track
from benchmarks.harness.timing import alternate, quantiles

MODELS = "revbifpn_s0,revbifpn_s3,revbifpn_s6,hrnet_w18"
VARIANTS = (FAST, STORED, PUBLISHED)
DTYPES = ("float32", "bfloat16")
STREAM = "fixed16"  # of the fast model under bfloat16
UNITS = {
    "cpu_ms": "ms", "cpu_ms_p20": "ms", "cpu_ms_p80": "ms", "wall_ms": "ms", "launches": "1", "products": "1",
    "copies": "1", "fills": "1", "synchronisations": "1", "allocations": "1", "compilations": "1",
    "compilation_s": "s", "compilations_other_batch": "1", "compilations_other_size": "1", "mib_per_sample": "MiB",
}  # fmt: skip


@dataclass
class Compilations:
    """What Triton compiled, and in how many seconds; not what its cache on the disk had."""

    count: int = 0
    seconds: float = 0.0

    def __call__(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if not cache_hit:
            self.count += 1
            self.seconds += times.total / 1e6


@contextmanager
def compilations() -> Iterator[Compilations]:
    """Of the block."""
    found = Compilations()
    try:
        from triton import knobs
    except ImportError:
        yield found
        return
    with knobs.compilation.scope():
        knobs.compilation.listener = found
        yield found


def calls(step: Callable[[], None]) -> dict[str, int]:
    """What one step asks of the device."""
    if "NULL_GPU" in os.environ:
        from tests import null_gpu

        before = null_gpu.counts()
        step()
        found = {name: n - before[name] for name, n in null_gpu.counts().items()}
        found["launches"] += found["driver_launches"]
        return found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    names = [event.name.lower() for event in profile.events()]
    kinds = {"launches": "launchkernel", "copies": "memcpyasync", "fills": "memsetasync", "allocations": "cudamalloc"}
    kinds["synchronisations"] = "synchronize"
    return {kind: sum(part in name for name in names) for kind, part in kinds.items()}


@dataclass
class Contestant:
    """A network in a dtype, and what was found."""

    network: Network
    dtype: str
    resolution: int
    runner: Runner = None
    row: dict[str, Any] = field(default_factory=dict)

    def step(self, batch: int, height: int, width: int) -> Callable[[], None]:
        images = torch.randn(batch, 3, height, width, device=self.runner.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.runner.device)
        return self.runner.action(TRAIN, images, labels)

    def prepare(self, device: torch.device, batch: int) -> Callable[[], None]:
        """Everything about it but its time; the step to time."""
        self.runner = Runner(self.network, device, self.dtype)
        for module in self.runner.model.modules():
            if hasattr(module, "self_check"):
                module.self_check = False
        size = self.resolution
        step = self.step(batch, size, size)
        self.row = self.network.about | {"dtype": self.dtype, "batch": batch, "resolution": size}
        with compilations() as first:
            step()
        with compilations() as other_batch:
            self.step(batch + 1, size, size)()
        with compilations() as other_size:
            self.step(batch, size + 32, size + 96)()
        self.row |= {"compilations": first.count, "compilation_s": first.seconds}
        self.row |= {"compilations_other_batch": other_batch.count, "compilations_other_size": other_size.count}
        self.row |= {name: n for name, n in calls(step).items() if name in UNITS}
        peaks = [self.peak(device, n) for n in (batch, 2 * batch)]
        self.row["mib_per_sample"] = (peaks[1] - peaks[0]) / batch / 2**20
        return step

    def peak(self, device: torch.device, batch: int) -> int:
        """Bytes of the allocator above what was there before the step."""
        step = self.step(batch, self.resolution, self.resolution)
        step()
        self.runner.model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before


def clock(step: Callable[[], None]) -> tuple[float, float]:
    """CPU and wall time of a step's call, milliseconds."""
    torch.cuda.synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3


def contestants(chosen: Sequence[Network], dtypes: Sequence[str], resolution: int | None) -> list[Contestant]:
    """Each network in each dtype."""
    found = []
    for network in chosen:
        for dtype in dtypes:
            narrow = network.variant == FAST and dtype != "float32"
            wanted = next(networks.in_streams(network, [STREAM])) if narrow else network
            found.append(Contestant(wanted, dtype, resolution or network.resolution))
    return found


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help="comma list of networks, as name or name/variant")
    parser.add_argument("--published", metavar="DIR", help="a checkout of the published code, to measure beside ours")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma list of float32, bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default 8)")
    parser.add_argument("--resolution", type=int, help="pixels (default: each network's own)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    command.at_least_one(batch=arguments.batch, steps=arguments.steps)
    dtypes = command.some_of("--dtypes", arguments.dtypes, DTYPES)
    output, device = command.pick_output(arguments.output), command.pick_device("cuda")
    if not arguments.published:
        print("the published code is left out: --published names a checkout of it", file=sys.stderr)
    published = networks.load_published(arguments.published) if arguments.published else None
    chosen = networks.choose(arguments.models, networks.catalogue(published))
    chosen = [n for n in chosen if n.variant in VARIANTS]
    if any(n.family != REVBIFPN for n in chosen):
        networks.import_timm()
    names = list(dict.fromkeys(n.name for n in chosen))
    groups = [contestants([n for n in chosen if n.name == name], dtypes, arguments.resolution) for name in names]
    environment, rows = results.environment(device), []
    settings = {name: getattr(arguments, name) for name in ("models", "dtypes", "batch", "resolution", "steps")}
    stem = output / ("host_null_gpu" if "NULL_GPU" in os.environ else "host_gpu")
    for group in track(groups, lambda g: g[0].network.label, "host"):
        steps = [c.prepare(device, arguments.batch) for c in group]
        for c, times in zip(group, alternate(steps, arguments.steps, clock), strict=True):
            cpu, wall = zip(*times, strict=True)
            c.row |= dict(zip(("cpu_ms", "cpu_ms_p20", "cpu_ms_p80"), quantiles(cpu), strict=True))
            c.row["wall_ms"] = quantiles(wall)[0]
            c.runner = None
            rows.append(c.row)
        keys = ("model", "variant", "dtype", "batch", "resolution")
        written = results.save(stem, environment, settings, rows, keys, UNITS)  # whole after every network

    words = [Column(name, number=False) for name in ("model", "variant", "dtype")]
    numbers = ["CPU ms", "wall ms", "launches", "products", "compiled", "in s", "batch", "size", "MiB/sample"]
    cells = [[list(_cells(c.row)) for c in group] for group in groups]
    print_table("Host's time of a training step", [*words, *map(Column, numbers)], cells, results.origin(environment))
    print(written)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield from (row["label"], row["variant"], row["dtype"], f"{row['cpu_ms']:.1f}", f"{row['wall_ms']:.1f}")
    yield from (str(row["launches"]), str(row.get("products", "")), str(row["compilations"]))
    yield f"{row['compilation_s']:.1f}"
    yield from (str(row["compilations_other_batch"]), str(row["compilations_other_size"]))
    yield f"{row['mib_per_sample']:.1f}"


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # empty, so that a first step compiles
    sys.exit(main())
