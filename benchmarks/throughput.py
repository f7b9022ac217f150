"""Images per second and peak memory of a training step and of inference: RevBiFPN against plain autograd and rivals.

    python benchmarks/throughput.py                              S0 in every variant, and rivals
    python benchmarks/throughput.py --quick                      fast, reversible and stored S0, about a minute
    python benchmarks/throughput.py --published ~/RevBiFPN       the published code in the same run
    python benchmarks/throughput.py --dtype bfloat16 --streams fixed32,fixed16
    python benchmarks/throughput.py --models 'revbifpn_s3/*' --resolution 288 --batch 2,4

All contestants take turns in one process, after the gradients of the RevBiFPN variants were found equal. Prints tables,
the largest batch that fits into 8, 16, 24 and 80 GB among them, and writes the raw numbers (JSON, CSV) and a plot (PNG)
to benchmarks/results. How it is measured is told in docs/throughput.md.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import revbifpn
import revbifpn.fast
from benchmarks import common
from benchmarks.common import Column, UsageError
from benchmarks.memory_vs_hrnet import CHECKPOINTED, FAST, REVBIFPN, REVERSIBLE, STORED
from benchmarks.rivals import RIVALS, import_timm
from revbifpn.configs import CONFIGS
from revbifpn.engine.tape import Stored
from revbifpn.estimate import StepEstimator
from revbifpn.memory import MIB, PeakMemory, measure_sample, measure_step
from revbifpn.streams import FIXED16, FIXED32, FLOAT32

COMPILED, PUBLISHED = "compiled", "published"
GRAPH = "+graph"
GRAPHED = (FAST, STORED)  # variants that a CUDA graph can capture
STREAM = "@"  # before the format of the fast variant's streams
TRAIN, INFER, CAPACITY = "train", "inference", "capacity"

CPU_MODELS = (  # all but the compiled, which take minutes there
    *(f"revbifpn_s0/{variant}" for variant in (FAST, REVERSIBLE, STORED, CHECKPOINTED)),
    *(f"{name}/{variant}" for name in ("hrnet_w18", "tf_efficientnet_b0") for variant in (STORED, CHECKPOINTED)),
)
CUDA_MODELS = ("revbifpn_s0", "revbifpn_s3", "revbifpn_s6", "hrnet_w*", "tf_efficientnet_b0", "tf_efficientnetv2_s")
QUICK_MODELS = ("revbifpn_s0/fast", "revbifpn_s0/reversible", "revbifpn_s0/stored")
WARM_UP, ROUNDS, QUICK_ROUNDS = 2, {"cpu": 9, "cuda": 25}, 3

FORMATS = (FLOAT32, FIXED32, FIXED16)
BUDGETS = (8, 16, 24, 80)  # GiB
OPTIMIZER_STATES = 1  # of the largest batches: SGD with momentum
GATE = {"resolution": 96, "batch": 4, "seeds": 3, "loss": 1e-4, "gradients": 1e-3}


class DisagreementError(Exception):
    """Two variants of one network compute different things; their speeds are not worth printing."""


@dataclass(frozen=True)
class Contestant:
    """A network in one way of keeping activations, as it can be asked for by ``name/variant``.

    ``make(**overrides)`` builds it with random weights; only RevBiFPN takes constructor arguments.
    """

    name: str
    variant: str
    family: str
    label: str
    top1: float
    make: Callable[..., nn.Module]

    @property
    def key(self) -> str:
        return f"{self.name}/{self.variant}"

    @property
    def stream(self) -> str | None:
        """The format of its streams, where one was asked for."""
        return self.variant.removesuffix(GRAPH).partition(STREAM)[2] or None

    @property
    def kind(self) -> str:
        """The variant, whatever the streams and whether or not it is captured in a graph."""
        return kind_of(self.variant)


def kind_of(variant: str) -> str:
    return variant.removesuffix(GRAPH).partition(STREAM)[0]


@dataclass
class Row:
    """One contestant at one task and batch. Times are of one step; ratios are paired within rounds, then summarised."""

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
    "seconds": "s",
    "seconds_p20": "s",
    "seconds_p80": "s",
    "ratio": "1",
    "ratio_p20": "1",
    "ratio_p80": "1",
    "peak_bytes": "B",
    "loss_error": "1",
    "gradient_error": "1",
    **{f"largest_batch_{gigabytes}gb": "1" for gigabytes in BUDGETS},
}


# Contestants ------------------------------------------------------------------------------------------


class CheckpointedRevBiFPN(revbifpn.RevBiFPN_S):
    """The plain stored model with every block of its stack, and its neck, under ``torch.utils.checkpoint``."""

    def __init__(self, arch: str, **overrides: Any) -> None:
        super().__init__(arch, disable_rev=True, **overrides)
        for block in self.rev_stack.blocks:
            block.reversible = False

    def open(self, x: Tensor) -> Stored:
        streams = (self.stem(x),)
        for block in self.rev_stack.blocks:
            out = checkpoint(block, *streams, use_reentrant=False)
            streams = (out,) if isinstance(out, Tensor) else out
        return Stored(self.rev_stack.coupler, streams)


def contestants(published: ModuleType | None = None) -> list[Contestant]:
    """Every network in every variant; the published code's where its module is given."""
    found = []
    for config in CONFIGS.values():
        arch = config.arch
        makers = {
            FAST: getattr(revbifpn.fast, arch),
            REVERSIBLE: getattr(revbifpn, arch),
            STORED: partial(getattr(revbifpn, arch), reversible=False),
            COMPILED: partial(_compiled, partial(getattr(revbifpn, arch), reversible=False)),
            CHECKPOINTED: partial(CheckpointedRevBiFPN, arch),
        }
        if published is not None:
            makers[PUBLISHED] = partial(_silently, getattr(published, arch))
        label = f"{REVBIFPN}-{arch.rsplit('_', 1)[1].upper()}"
        found += [Contestant(arch, variant, REVBIFPN, label, config.top1, make) for variant, make in makers.items()]
    for rival in RIVALS.values():
        for variant in (STORED, COMPILED, CHECKPOINTED):
            make = partial(rival.build, checkpointed=variant == CHECKPOINTED)
            make = partial(_compiled, make) if variant == COMPILED else make
            found.append(Contestant(rival.name, variant, rival.family, rival.label, rival.top1, make))
    return found


def _compiled(make: Callable[..., nn.Module], **overrides: Any) -> nn.Module:
    return torch.compile(make(**overrides), dynamic=False)


def _silently(make: Callable[..., nn.Module], **overrides: Any) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a note about its pretraining
        return make(**overrides)


def load_published(directory: str) -> ModuleType:
    """The published ``revbifpn.py`` under another name, as it is."""
    path = Path(directory).expanduser()
    missing = [name for name in ("revbifpn.py", "rev_structs") if not (path / name).exists()]
    if missing:
        raise UsageError(f"--published {directory}: {missing[0]} is not there; give a checkout of the published code")
    spec = importlib.util.spec_from_file_location("published_revbifpn", path.resolve() / "revbifpn.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)  # it appends its own directory to the path, where revbifpn.py is its
    except Exception as error:
        raise UsageError(f"--published {directory}: does not import ({type(error).__name__}: {error})") from None
    finally:
        sys.path[:] = before
    unknown = [arch for arch in CONFIGS if not hasattr(module, arch)]
    if unknown:
        raise UsageError(f"--published {directory}: its revbifpn.py defines no {unknown[0]}")
    warnings.filterwarnings("ignore", category=FutureWarning, module="rev_structs")  # torch.cuda.amp, once per block
    return module


def select(patterns: Sequence[str], everything: Sequence[Contestant]) -> list[Contestant]:
    """Those whose ``name`` or ``name/variant`` matches a pattern; the published code wherever its network is."""
    chosen = set()
    for pattern in patterns:
        hits = {c.key for c in everything if fnmatchcase(c.key, pattern) or fnmatchcase(c.name, pattern)}
        if not hits:
            known = sorted({c.name for c in everything} | ({c.key for c in everything} if "/" in pattern else set()))
            close = difflib.get_close_matches(pattern, known, n=4, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(known)}"
            raise UsageError(f"--models: {pattern!r} is unknown; {hint}")
        chosen |= hits
    names = {c.name for c in everything if c.key in chosen}
    return [c for c in everything if c.key in chosen or (c.variant == PUBLISHED and c.name in names)]


def with_streams(chosen: Sequence[Contestant], formats: Sequence[str]) -> list[Contestant]:
    """Each fast RevBiFPN once more with its streams in each of the formats."""
    found = []
    for c in chosen:
        found.append(c)
        for stream in formats if c.variant == FAST else ():
            make = partial(c.make, stream=stream)
            found.append(Contestant(c.name, c.variant + STREAM + stream, c.family, c.label, c.top1, make))
    return found


def with_graphs(chosen: Sequence[Contestant]) -> list[Contestant]:
    """Each contestant that a CUDA graph can capture, once more with its whole step captured."""
    found = []
    for c in chosen:
        found.append(c)
        if c.kind in GRAPHED:
            found.append(Contestant(c.name, c.variant + GRAPH, c.family, c.label, c.top1, c.make))
    return found


# Correctness gate -------------------------------------------------------------------------------------


def check_agreement(chosen: Sequence[Contestant], device: torch.device) -> list[dict[str, Any]]:
    """Compare loss and gradients of the RevBiFPN variants with the stored plain model's, in float32, same weights.

    ``|l - l'| / |l'|`` and ``||g - g'|| / ||g'||`` over all parameters, each the median over a few random batches: a
    hardswish input that crosses its kink by rounding moves a single batch's gradient by more. With exact streams the
    reference is the stored fast model with the same streams, whose gradients have the same bits.

    Raises:
        DisagreementError: an error is above the limits of ``GATE`` or not a number.
    """
    rows = []
    checked = [c for c in chosen if c.family == REVBIFPN and c.variant not in (STORED, COMPILED)]
    checked = [c for c in checked if not c.variant.endswith(GRAPH)]
    for arch, stream in dict.fromkeys((c.name, c.stream) for c in checked):
        torch.manual_seed(0)
        fixed = {"stochastic_depth": 0.0, "head_dropout": 0.0}
        stored = partial(getattr(revbifpn if stream is None else revbifpn.fast, arch), reversible=False)
        reference = (stored(**fixed) if stream is None else stored(stream=stream, **fixed)).to(device).train()
        batches = [_gate_batch(seed, device) for seed in range(GATE["seeds"])]
        expected = [_loss_and_gradients(reference, *batch) for batch in batches]
        for contestant in (c for c in checked if (c.name, c.stream) == (arch, stream)):
            model = contestant.make(**fixed).to(device).train()
            model.load_state_dict(reference.state_dict())
            errors = [_errors(*_loss_and_gradients(model, *b), *e) for b, e in zip(batches, expected, strict=True)]
            loss_error, gradient_error = (statistics.median(e) for e in zip(*errors, strict=True))
            if not (loss_error <= GATE["loss"] and gradient_error <= GATE["gradients"]):
                raise DisagreementError(
                    f"{contestant.key} disagrees with {arch}/stored: relative error {loss_error:.2g} in the loss and "
                    f"{gradient_error:.2g} in the gradients; no speed is reported"
                )
            rows.append({"contestant": contestant.key, "loss_error": loss_error, "gradient_error": gradient_error})
    return rows


def _gate_batch(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(GATE["batch"], 3, GATE["resolution"], GATE["resolution"], generator=generator)
    return images.to(device), torch.randint(1000, (GATE["batch"],), generator=generator).to(device)


def _loss_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(model(images), labels)
    model.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    if missing:
        raise DisagreementError(f"{type(model).__name__} leaves {missing[0]} without a gradient; no speed is reported")
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def _errors(loss: Tensor, gradients: Tensor, loss0: Tensor, gradients0: Tensor) -> tuple[float, float]:
    errors = (loss - loss0).abs() / loss0.abs(), (gradients - gradients0).norm() / gradients0.norm()
    return tuple(math.inf if e.isnan() else e.item() for e in errors)


# Timing -----------------------------------------------------------------------------------------------


class Runner:
    """A contestant's model, and the steps of it that are timed."""

    def __init__(self, contestant: Contestant, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        self.contestant, self.device = contestant, device
        # The published code asks for CUDA's autocast state when it recomputes, so on a CPU it knows float32 only.
        self.dtype = "float32" if contestant.variant == PUBLISHED and device.type == "cpu" else dtype
        self.model = contestant.make().to(device)

    def action(self, task: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
        """One step of ``task``, as often as it is called; captured in a CUDA graph where the variant says so."""
        self.model.train(task == TRAIN)
        step = partial(self._train if task == TRAIN else self._infer, images, labels)
        return _capture(step, self.model) if self.contestant.variant.endswith(GRAPH) else step

    def _forward(self, images: Tensor) -> Tensor:
        dtype = common.DTYPES[self.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(images)

    def _train(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self._forward(images).float(), labels).backward()

    @torch.no_grad()
    def _infer(self, images: Tensor, labels: Tensor) -> None:
        self._forward(images)

    def peak(self, task: str, images: Tensor) -> tuple[int | None, str | None]:
        """Peak bytes and their meter, see :mod:`revbifpn.memory`; None where the meter does not see the allocations."""
        compiled_on_cpu = self.contestant.variant == COMPILED and self.device.type != "cuda"
        if compiled_on_cpu or self.contestant.variant.endswith(GRAPH):
            return None, None
        if task == TRAIN:
            options = {"batch": len(images), "dtype": common.DTYPES[self.dtype], "device": self.device}
            memory = measure_step(self.model, tuple(images.shape[1:]), **options)
            return memory.peak_bytes, memory.meter
        with PeakMemory(self.device) as meter, torch.no_grad():
            self._forward(images)
        return meter.peak_bytes, "cuda allocator" if self.device.type == "cuda" else "tensors"


def _capture(step: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def clock_of(device: torch.device) -> Callable[[Callable[[], None]], float]:
    """Seconds that an action takes: CUDA events around it on a GPU, the wall clock on a CPU."""

    def wall(action: Callable[[], None]) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def events(action: Callable[[], None]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return events if device.type == "cuda" else wall


def alternate(
    actions: Sequence[Callable[[], None]], rounds: int, clock: Callable[[Callable[[], None]], float]
) -> list[list[float]]:
    """``times[i][r]`` of action i in round r. Everybody runs once per round, and each round begins with another."""
    times: list[list[float]] = [[] for _ in actions]
    for r in range(rounds):
        for k in range(len(actions)):
            i = (r + k) % len(actions)
            times[i].append(clock(actions[i]))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(found.tolist())


def base_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fast RevBiFPN that a row is compared with: of the same network, else the smallest at least as accurate."""
    fast = [r for r in rows if (r.task, r.batch, r.family, r.variant) == (row.task, row.batch, REVBIFPN, FAST)]
    same = [r for r in fast if r.model == row.model]
    able = [r for r in fast if r.top1 >= row.top1] if row.family != REVBIFPN else []
    return (same or sorted(able, key=lambda r: r.top1) or [None])[0]


def time_all(
    runners: Sequence[Runner],
    task: str,
    batch: int,
    resolution: int,
    rounds: int,
    clock: Callable[[Callable[[], None]], float],
) -> list[Row]:
    """Time the task at one batch, taking turns, and meter its memory. Who fails keeps a row that says why."""
    rows, actions, times = [], {}, {}
    device = runners[0].device
    images = torch.randn(batch, 3, resolution, resolution, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    for runner in runners:
        c = runner.contestant
        row = Row(task, c.name, c.variant, c.family, c.label, c.top1, resolution, batch, runner.dtype)
        rows.append(row)
        with _noting(row):
            if not c.variant.endswith(GRAPH):  # before the turns: it may tune kernels, and leaves no gradients
                row.peak_bytes, row.meter = runner.peak(task, images)
            action = runner.action(task, images, labels)
            for _ in range(WARM_UP):
                clock(action)
            actions[id(row)] = action
    timed = [row for row in rows if id(row) in actions]
    for row, seconds in zip(timed, alternate([actions[id(row)] for row in timed], rounds, clock), strict=True):
        times[id(row)], row.rounds = seconds, rounds
        row.seconds, row.seconds_p20, row.seconds_p80 = quantiles(seconds)
        row.images_per_second = batch / row.seconds
    for row in timed:
        base = base_of(row, timed)
        if base is not None:
            ratios = [own / other for own, other in zip(times[id(row)], times[id(base)], strict=True)]
            row.ratio, row.ratio_p20, row.ratio_p80 = quantiles(ratios)
            row.ratio_to = base.label
    for runner in runners:
        runner.model.zero_grad(set_to_none=True)
    return rows


@contextlib.contextmanager
def _noting(row: Row) -> Iterable[None]:
    """Out of memory, or a compiler or the published code that fails, is a note in the row; our own code must not."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        row.note = "out of memory"
    except RuntimeError as error:
        if row.variant not in (COMPILED, PUBLISHED):
            raise
        row.note = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


# Largest batch ----------------------------------------------------------------------------------------


def capacities(runners: Sequence[Runner], resolution: int, batch: int) -> list[dict[str, Any]]:
    """The largest batch of a training step in each of ``BUDGETS``, everything but the CUDA context counted.

    On a GPU from the allocator's peaks at ``batch`` and half of it, elsewhere from a simulated step in a GPU's chunks.
    """
    rows = []
    for runner in common.track(runners, lambda r: r.contestant.key, "largest batch"):
        c, row = runner.contestant, {}
        if c.variant.endswith(GRAPH) or (c.variant == COMPILED and runner.device.type != "cuda"):
            continue
        with contextlib.suppress(torch.OutOfMemoryError):
            find = _fit_measured if runner.device.type == "cuda" else _fit_simulated
            fits = find(runner, resolution, batch)
            row |= {f"largest_batch_{g}gb": fits(g * 2**30) for g in BUDGETS}
        rows.append(
            {"task": CAPACITY, "model": c.name, "variant": c.variant, "family": c.family, "label": c.label}
            | {"resolution": resolution, "batch": None, "dtype": runner.dtype}
            | row
        )
    return rows


def _fit_simulated(runner: Runner, resolution: int, batch: int) -> Callable[[float], int]:
    options = {"optimizer_states": OPTIMIZER_STATES, "device": "cuda"}
    return StepEstimator(runner.model, resolution, common.DTYPES[runner.dtype], **options).largest_batch


def _fit_measured(runner: Runner, resolution: int, batch: int) -> Callable[[float], int]:
    options = {"batch": max(1, batch // 2), "dtype": common.DTYPES[runner.dtype], "device": runner.device}
    memory = measure_sample(runner.model, (3, resolution, resolution), **options)
    large = memory.large
    constant = large.parameter_bytes + large.buffer_bytes + (1 + OPTIMIZER_STATES) * large.gradient_bytes
    total = large.peak_bytes + large.input_bytes + constant
    per_sample = memory.bytes_per_sample + large.input_bytes / large.batch
    return lambda memory_bytes: max(0, large.batch + math.floor((memory_bytes - total) / per_sample))


# Tables and plot --------------------------------------------------------------------------------------


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
    for task, title in ((TRAIN, "Training step"), (INFER, "Inference")):
        chosen = [row for row in rows if row.task == task]
        if not chosen:
            continue
        groups: dict[tuple[int, str], list[list[str]]] = {}
        for row in chosen:
            groups.setdefault((row.batch, row.model), []).append(_cells(row))
        title = f"{title} at {chosen[0].resolution} pixels, {chosen[0].dtype}"
        common.print_table(title, columns, groups.values(), _caption(environment, chosen, gate))


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
        f"Median of {rounds} rounds in which everybody takes a turn; ratios are taken within a round.",
        "time x fast RevBiFPN: above 1 slower than it, of the same network or, for rivals, the smallest here with at",
        "least the rival's top-1 (each published at its own resolution); - where there is none.",
    ]
    if any(row.dtype != rows[0].dtype for row in rows):
        lines.append("The published code ran in float32: its recomputation does not know autocast on a CPU.")
    if gate:
        worst = max(entry["gradient_error"] for entry in gate)
        lines.append(f"Gradients agree with the stored plain model's: relative error at most {worst:.1e} in float32.")
    lines.append(
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"kernels {'+'.join(environment['kernels'])}, commit {environment['commit']}, {environment['date']}"
    )
    return "\n".join(lines)


def show_capacities(rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Prints the table of largest batches."""
    if not rows:
        return
    columns = [Column("model", number=False), Column("activations", number=False)]
    columns += [Column(f"{gigabytes} GB") for gigabytes in BUDGETS]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        found = [row.get(f"largest_batch_{gigabytes}gb") for gigabytes in BUDGETS]
        cells = ["-" if n is None else str(n) for n in found]
        groups.setdefault(row["model"], []).append([row["label"], row["variant"], *cells])
    how = "from the allocator's peaks" if device.type == "cuda" else "from a simulated step (revbifpn.estimate_memory)"
    caption = (
        f"Activations, images, parameters, gradients, {OPTIMIZER_STATES} optimizer state (SGD with momentum), {how}.\n"
        "1 GB = 2^30 bytes. Not counted: CUDA's context, workspaces, what the allocator rounds up and keeps."
    )
    title = f"Largest batch of a training step at {rows[0]['resolution']} pixels, {rows[0]['dtype']}"
    common.print_table(title, columns, groups.values(), caption)


_COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers
    FAST: "#0072B2",
    REVERSIBLE: "#56B4E9",
    STORED: "#000000",
    COMPILED: "#E69F00",
    CHECKPOINTED: "#009E73",
    PUBLISHED: "#D55E00",
}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Images per second: bars for one batch, lines over the batch for several; a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in rows if row.seconds is not None]
    tasks = [task for task in (TRAIN, INFER) if any(row.task == task for row in rows)]
    batches = sorted({row.batch for row in rows})
    names = list(dict.fromkeys((row.label, row.variant) for row in rows))
    height = 1.6 + 0.28 * len(names) if len(batches) == 1 else 5.4
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), height), squeeze=False, layout="constrained")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis, task in zip(axes[0], tasks, strict=True):
        panel = [row for row in rows if row.task == task]
        axis.set_title(f"{'training step' if task == TRAIN else 'inference'}, {panel[0].resolution} pixels")
        axis.grid(alpha=0.3)
        if len(batches) == 1:
            _bars(axis, panel)
            axis.set_xlabel(f"images per second (batch {batches[0]}, p20 to p80)")
            continue
        for label, variant in names:
            series = sorted((r for r in panel if (r.label, r.variant) == (label, variant)), key=lambda r: r.batch)
            networks = list(dict.fromkeys(name for name, _ in names))
            axis.plot(
                [r.batch for r in series],
                [r.images_per_second for r in series],
                color=_COLOURS[kind_of(variant)],
                marker="osD^vP<>*Xh"[networks.index(label) % 11],
                linestyle=":" if variant.endswith(GRAPH) else "--" if STREAM in variant else "-",
                label=f"{label}, {variant}",
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(plain)
        axis.yaxis.set_major_formatter(plain)
        axis.set_xlabel("batch")
        axis.set_ylabel("images per second")
    if len(batches) > 1:
        handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        columns = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
        figure.legend(handles.values(), handles.keys(), **columns)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _bars(axis: Any, panel: Sequence[Row]) -> None:
    panel = list(reversed(panel))
    speeds = [row.images_per_second for row in panel]
    below = [max(0.0, s - row.batch / row.seconds_p80) for s, row in zip(speeds, panel, strict=True)]
    above = [max(0.0, row.batch / row.seconds_p20 - s) for s, row in zip(speeds, panel, strict=True)]
    colours = [_COLOURS[kind_of(row.variant)] for row in panel]
    bars = axis.barh(range(len(panel)), speeds, xerr=(below, above), color=colours, ecolor="#777777")
    axis.bar_label(bars, [f"{s:.1f}" for s in speeds], padding=4, fontsize=7)
    axis.set_yticks(range(len(panel)), [f"{row.label}, {row.variant}" for row in panel], fontsize=8)
    axis.margins(x=0.12)


# Command line -----------------------------------------------------------------------------------------


def _parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--models", help="comma list of names or wildcards: revbifpn_s0, hrnet*, 'revbifpn_s3/*'")
    parser.add_argument("--batch", help="comma list of batches to sweep (default 8; on CUDA 8,32,128)")
    parser.add_argument("--resolution", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--dtype", choices=tuple(common.DTYPES), default="float32", help="16 bits: under autocast")
    parser.add_argument("--rounds", type=int, help="turns that everybody takes (default 9; on CUDA 25)")
    parser.add_argument("--published", metavar="DIR", help="a checkout of the published code, to run beside ours")
    parser.add_argument("--streams", help=f"comma list of {', '.join(FORMATS)}: fast once more with such streams")
    parser.add_argument("--graph", action="store_true", help="CUDA: fast and stored once more, step in a CUDA graph")
    parser.add_argument("--tf32", action="store_true", help="CUDA: let everybody's float32 matrix products use TF32")
    parser.add_argument("--quick", action="store_true", help="three variants of S0, few rounds, no largest batches")
    parser.add_argument("--output", default=str(common.RESULTS), help="directory for JSON, CSV and PNG")
    return parser


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{flag}: got {text!r}, needs positive numbers with commas between")
    return sorted({int(part) for part in parts})


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    if arguments.resolution < 32 or arguments.resolution % 32:
        raise UsageError(f"--resolution: got {arguments.resolution}, RevBiFPN needs a positive multiple of 32")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UsageError(f"--rounds: got {arguments.rounds}, needs at least 1")
    device = arguments.device = common.pick_device(arguments.device)
    for flag in ("graph", "tf32"):
        if getattr(arguments, flag) and device.type != "cuda":
            raise UsageError(f"--{flag}: needs CUDA, and this runs on the {device.type}")
    default = "4" if arguments.quick else "8,32,128" if device.type == "cuda" else "8"
    arguments.batch = _numbers("--batch", arguments.batch or default)
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS[device.type])

    published = load_published(arguments.published) if arguments.published else None
    models = QUICK_MODELS if arguments.quick else CUDA_MODELS if device.type == "cuda" else CPU_MODELS
    patterns = arguments.models.split(",") if arguments.models else models
    arguments.contestants = select([pattern.strip() for pattern in patterns], contestants(published))
    arguments.output = common.pick_output(arguments.output)
    common.require("matplotlib")
    if any(c.family != REVBIFPN for c in arguments.contestants):
        import_timm()
    formats = [part.strip() for part in arguments.streams.split(",")] if arguments.streams else []
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise UsageError(f"--streams: {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")
    arguments.contestants = with_streams(arguments.contestants, formats)
    if arguments.graph:
        arguments.contestants = with_graphs(arguments.contestants)
    return arguments


def _use_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _main(argv: Sequence[str] | None) -> None:
    arguments = _checked(argv)
    device, resolution = arguments.device, arguments.resolution
    environment = common.environment(device)
    _use_tf32(False)
    print("comparing gradients", file=sys.stderr, flush=True)
    gate = check_agreement(arguments.contestants, device)
    _use_tf32(arguments.tf32)

    runners = [Runner(contestant, device, arguments.dtype) for contestant in arguments.contestants]
    turns = [(task, batch) for task in (TRAIN, INFER) for batch in arguments.batch]
    rows = []
    for task, batch in common.track(turns, lambda turn: f"{turn[0]}, batch {turn[1]}", "throughput"):
        # At inference a checkpointed network is the stored one.
        taking_part = [r for r in runners if task == TRAIN or r.contestant.variant != CHECKPOINTED]
        if taking_part:
            rows += time_all(taking_part, task, batch, resolution, arguments.rounds, clock_of(device))
    show(rows, environment, gate)
    largest = [] if arguments.quick else capacities(runners, resolution, max(arguments.batch))
    show_capacities(largest, device)

    name = f"throughput_{device.type}_{arguments.dtype}" + ("_quick" if arguments.quick else "")
    stem = arguments.output / name
    records = [asdict(row) for row in rows] + largest
    settings = {"rounds": arguments.rounds, "warm_up": WARM_UP, "tf32": arguments.tf32, "gate": GATE, "agreement": gate}
    common.write_json(stem.with_suffix(".json"), environment, settings, records)
    common.write_long_csv(stem.with_suffix(".csv"), environment, records, ROW_KEYS, UNITS)
    plot(rows, stem.with_suffix(".png"))
    print(f"written: {stem}.json, .csv, .png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0, 1 where variants disagree, 2 for a usage error."""
    try:
        return common.run(_main, argv)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
