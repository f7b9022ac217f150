"""Memory, time and gradient error of fine-tuning pretrained networks reversibly (:mod:`revbifpn.dual_residual`).

    python benchmarks/dual_residual.py                                     ViT-S and ViT-B at 224, float32 and bfloat16
    python benchmarks/dual_residual.py --models 'vit_l*,resnet*' --dtypes float32
    python benchmarks/dual_residual.py --models '*' --memory               memory alone, on fake tensors
    python benchmarks/dual_residual.py --models '*' --memory --add         what the results lack, added to them
    python benchmarks/dual_residual.py --function                          how much of the function is kept

Ways to train: ``ordinary``; ``checkpointed`` per block (timm's own; of Swin3D every block is put under
``torch.utils.checkpoint`` here); ``float``, dual-residual with float streams at (1/2, 1/2); ``int32 k=...`` and
``fixed16 k=...``, exact streams at (1 - 2^-k, 2^-k). `kept` is what is alive between forward and backward, `peak` the
most that is alive in a step, both per sample, by :func:`revbifpn.memory.measure_sample`: batches of 64 and 128, so that
what does not grow with the batch (16-bit copies of weights under autocast, say) cancels and makes no peak. Times are
CPU seconds of a step of one sample (``time.process_time``: other processes do not count), all ways in turn, on one
thread; ratios are medians of the ratios within rounds. The gradient's error is that of all parameters against the same
way with stored activations.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import command, plots, results
from benchmarks.harness.command import entry
from benchmarks.harness.networks import DTYPES
from benchmarks.harness.rivals import import_timm
from benchmarks.harness.terminal import Column, print_table, track
from benchmarks.harness.timing import alternate, paired_ratios, quantiles
from revbifpn.dual_residual import DualResidualSequence, convert, revert, runs_of
from revbifpn.memory import MIB, measure_sample

BATCH = 64
SHIFTS = (7, 3, 1, 0)


@dataclass(frozen=True)
class Network:
    """A network, and the shape of a sample."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.name}/{self.shape[-1]}"


def _timm(name: str, **options: Any) -> nn.Module:
    return import_timm().create_model(name, num_classes=10, **options)


def _swin3d() -> nn.Module:
    import_timm()  # torchvision's models load without its ops
    return command.require("torchvision", "torchvision").models.video.swin3d_t(num_classes=10)


NETWORKS = [
    *(
        Network(name, partial(_timm, name, img_size=pixels), (3, pixels, pixels))
        for name in (f"vit_{size}_patch16_224" for size in ("small", "base", "large"))
        for pixels in (224, 384)
    ),
    *(
        Network(name, partial(_timm, name), (3, 224, 224))
        for name in ("swin_base_patch4_window7_224", "convnext_base", "resnet101")
    ),
    Network("swin3d_t", _swin3d, (3, 16, 224, 224)),
]
DEFAULT = "vit_small*/224,vit_base*/224"


@dataclass(frozen=True)
class Way:
    """How activations are kept."""

    name: str
    prepare: Callable[[nn.Module], Any]


def _dual(model: nn.Module, k: int, exact: bool | str) -> None:
    convert(model, alpha=1 - 2.0**-k, beta=2.0**-k, exact=exact)


def _checkpoint(model: nn.Module) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
        return
    blocks = [block for run in convert(model).runs for block in run]
    revert(model)
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


WAYS = [
    Way("ordinary", lambda model: None),
    Way("checkpointed", _checkpoint),
    Way("float", partial(_dual, k=1, exact=False)),
    *(Way(f"{stream} k={k}", partial(_dual, k=k, exact=stream)) for stream in ("int32", "fixed16") for k in SHIFTS),
]


@dataclass
class Row:
    """One way to train one network."""

    network: str
    pixels: int
    dtype: str
    way: str
    kept_bytes: float  # per sample
    peak_bytes: float  # per sample
    kept_ratio: float  # to checkpointed
    peak_ratio: float
    seconds: float | None = None  # CPU, of a step of one sample
    time_ratio: float | None = None  # to checkpointed
    gradient_error: float | None = None


UNITS = {"kept_bytes": "B", "peak_bytes": "B", "kept_ratio": "1", "peak_ratio": "1", "seconds": "s"}
UNITS |= {"time_ratio": "1", "gradient_error": "1"}


def memory(network: Network, dtype: str, ways: Sequence[Way]) -> list[Row]:
    """Kept and peak of the ways, on fake tensors."""
    model, samples = network.make(), []
    for way in ways:
        own = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # they become fake
        way.prepare(own)
        sample = measure_sample(own, network.shape, batch=BATCH, dtype=DTYPES[dtype], fake=True)
        samples.append((sample.kept_bytes_per_sample, sample.bytes_per_sample))
    kept, peak = samples[[way.name for way in ways].index("checkpointed")]
    return [
        Row(network.name, network.shape[-1], dtype, way.name, own_kept, own_peak, own_kept / kept, own_peak / peak)
        for way, (own_kept, own_peak) in zip(ways, samples, strict=True)
    ]


def _step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(images)
    logits.float().square().sum().backward()


def _error(model: nn.Module, images: Tensor, dtype: torch.dtype) -> float:
    """Of all gradients as one vector against those of stored activations."""
    twin = copy.deepcopy(model)
    for stack in runs_of(twin):
        stack.reversible = False
    _step(model, images, dtype)
    _step(twin, images, dtype)
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    squares = [((a - b).double().square().sum(), b.double().square().sum()) for a, b in pairs if a is not None]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5  # type: ignore[return-value]


def timed(network: Network, rows: Sequence[Row], dtype: torch.dtype, rounds: int, ways: Sequence[Way]) -> None:
    """Fill in times and errors."""
    images = torch.randn(1, *network.shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = network.make().train()
    models = [copy.deepcopy(model) for _ in ways]
    for way, model in zip(ways, models, strict=True):
        way.prepare(model)
    by_way = {row.way: row for row in rows}
    for way, model in zip(ways, models, strict=True):
        if runs_of(model):
            by_way[way.name].gradient_error = float(_error(model, images, dtype))

    def clock(action: Callable[[], None]) -> float:
        begin = time.process_time()
        action()
        return time.process_time() - begin

    actions = [partial(_step, model, images, dtype) for model in models]
    times = alternate(actions, rounds, clock)
    base = times[[way.name for way in ways].index("checkpointed")]
    for way, own in zip(ways, times, strict=True):
        by_way[way.name].seconds = quantiles(own)[0]
        by_way[way.name].time_ratio = paired_ratios(own, base)[0]


WIDTH, TOKENS, SAMPLES, CLASSES = 64, 16, 4, 10
POINTS = [(1.0, 2.0**-k) for k in (7, 5, 3, 1)] + [(1 - 2.0**-k, 2.0**-k) for k in (7, 5, 3, 2, 1, 0)]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def function_kept(depth: int, alpha: float, beta: float, add_y: bool, seeds: int = 2) -> float:
    """Cosine between the gradient at (alpha, beta) and that of the same weights at (1, 0), in float64."""
    cosines = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        blocks = [Block() for _ in range(depth)]
        net = DualResidualSequence(*blocks, add_y=add_y, reversible=False).double()
        head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)).double()
        x = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, (SAMPLES,))
        gradients = []
        for point in ((alpha, beta), (1.0, 0.0)):
            net.set(*point)
            net.zero_grad()
            torch.nn.functional.cross_entropy(head(net(x)).mean(1), labels).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        cosines.append(torch.cosine_similarity(*gradients, dim=0).item())
    return sum(cosines) / seeds


def report_function(output: Path) -> None:
    """Print and save :func:`function_kept` at every point."""
    rows: list[dict[str, Any]] = []
    for depth in (12, 24):
        for alpha, beta in POINTS:
            both = {f"cosine_{n}": function_kept(depth, alpha, beta, add) for n, add in (("sum", True), ("x", False))}
            rows.append({"depth": depth, "alpha": alpha, "beta": beta, **both})
    columns = [Column(name) for name in ("depth", "alpha", "beta", "x_n + y_n", "x_n")]
    cells = [
        [
            str(r["depth"]),
            *(f"{r[c]:.4g}" for c in ("alpha", "beta")),
            *(f"{r[f'cosine_{c}']:.3f}" for c in ("sum", "x")),
        ]
        for r in rows
    ]
    environment = results.environment(torch.device("cpu"))
    print_table("Cosine of the gradient to the pretrained network's", columns, [cells], results.origin(environment))
    units, keys = {"cosine_sum": "1", "cosine_x": "1"}, ("depth", "alpha", "beta")
    print(results.save(output / "dual_residual_function", environment, {"seeds": 2}, rows, keys, units))


COLUMNS = [
    Column("network", False),
    Column("dtype", False),
    Column("way", False),
    Column("kept, MiB"),
    Column("peak, MiB"),
]
COLUMNS += [Column("kept / ckpt"), Column("peak / ckpt"), Column("s"), Column("time / ckpt"), Column("gradient error")]


def _cells(row: Row) -> list[str]:
    times = [row.seconds and f"{row.seconds:.2f}", row.time_ratio and f"{row.time_ratio:.2f}"]
    error = "" if row.gradient_error is None else f"{row.gradient_error:.1e}" if row.gradient_error else "0"
    return [
        f"{row.network}/{row.pixels}", row.dtype, row.way, f"{row.kept_bytes / MIB:.2f}", f"{row.peak_bytes / MIB:.1f}",
        f"{row.kept_ratio:.3f}", f"{row.peak_ratio:.3f}", *(t or "" for t in times), error,
    ]  # fmt: skip


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=DEFAULT, help="names/pixels, with wildcards (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the forward (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every way (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="no times")
    parser.add_argument("--add", action="store_true", help="only what the results lack, added to them")
    parser.add_argument("--ways", default="*", help="with wildcards, checkpointed among them (default: all)")
    parser.add_argument("--function", action="store_true", help="how much of the pretrained function is kept, instead")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    networks = command.select("--models", arguments.models, NETWORKS, lambda n: (n.name, n.key))
    ways = command.select("--ways", arguments.ways, WAYS, lambda w: (w.name,))
    dtypes = command.some_of("--dtypes", arguments.dtypes, [d for d in DTYPES if d != "float16"])
    output = command.pick_output(arguments.output)
    torch.set_num_threads(1)
    if arguments.function:
        report_function(output)
        return
    stem = output / ("dual_residual_memory" if arguments.memory else "dual_residual_cpu")
    environment = results.environment(torch.device("cpu"))
    settings = {"batches": [BATCH, 2 * BATCH], "rounds": 0 if arguments.memory else arguments.rounds}
    rows = [Row(**row) for row in results.earlier_rows(stem, environment, settings)] if arguments.add else []
    there = {(row.network, row.pixels, row.dtype) for row in rows}
    cases = [(n, d) for n in networks for d in dtypes if (n.name, n.shape[-1], d) not in there]
    for network, dtype in track(cases, lambda case: f"{case[0].key} {case[1]}", "dual residual"):
        rows += (found := memory(network, dtype, ways))
        if not arguments.memory:
            timed(network, found, DTYPES[dtype], arguments.rounds, ways)
    order = [n.key for n in NETWORKS]
    rows.sort(key=lambda row: (order.index(f"{row.network}/{row.pixels}"), list(DTYPES).index(row.dtype)))
    groups = [[_cells(row) for row in group] for _, group in groupby(rows, lambda r: (r.network, r.pixels, r.dtype))]
    print_table("Training step, per sample", COLUMNS, groups, results.origin(environment))
    keys, plot = ("network", "pixels", "dtype", "way"), partial(plots.ways_to_train, rows)
    print(results.save(stem, environment, settings, [asdict(r) for r in rows], keys, UNITS, plot))


if __name__ == "__main__":
    sys.exit(main())
