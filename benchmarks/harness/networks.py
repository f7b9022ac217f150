"""What is measured and how it is made: RevBiFPN in every way of keeping activations, rivals, the published code.

A network is asked for by ``name/variant``. To a variant can be added: ``@`` and a stream format, ``+graph`` (the whole
step captured in a CUDA graph), ``+budget`` (of the memory that torch.compile may keep for backward),
``+reduce-overhead`` (torch.compile with CUDA graphs), ``+defaults`` (TF32 as PyTorch comes).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revbifpn
import revbifpn.fast
from benchmarks.harness.command import UsageError, require, select
from benchmarks.harness.rivals import RIVALS, import_timm
from revbifpn.configs import CONFIGS
from revbifpn.export import export_onnx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

REVBIFPN = "RevBiFPN"
FAST, REVERSIBLE, STORED, CHECKPOINTED = "fast", "reversible", "stored", "checkpointed"
COMPILED, OFFLOADED, PUBLISHED, ONNXRUNTIME = "compiled", "offloaded", "published", "onnxruntime"
STREAM, GRAPH, BUDGET, OVERHEAD, DEFAULTS = "@", "+graph", "+budget", "+reduce-overhead", "+defaults"


@dataclass(frozen=True)
class Network:
    """A network in one way of keeping activations; ``make(**overrides)`` builds it with random weights.

    Only RevBiFPN takes constructor arguments. Accuracy and arithmetic are those at ``resolution``.
    """

    name: str
    variant: str
    family: str
    label: str
    top1: float
    make: Callable[..., nn.Module]
    resolution: int = 224
    parameters: int = 0
    gmacs: float = 0.0  # of one image

    @property
    def key(self) -> str:
        return f"{self.name}/{self.variant}"

    @property
    def about(self) -> dict[str, Any]:
        """What every row says of it."""
        return {
            "model": self.name,
            "variant": self.variant,
            "family": self.family,
            "label": self.label,
            "top1": self.top1,
        }

    @property
    def kind(self) -> str:
        """The variant without what was added to it."""
        return kind_of(self.variant)

    @property
    def stream(self) -> str | None:
        """The format of its streams, where one was asked for."""
        return re.sub(r"\+.*", "", self.variant).partition(STREAM)[2] or None

    @property
    def is_graph(self) -> bool:
        """Whether a step is one launch, whose memory is a pool of its own."""
        return GRAPH in self.variant or OVERHEAD in self.variant

    @property
    def only_trains(self) -> bool:
        """Whether at inference it is another one: what it does is about what backward needs."""
        return self.kind in (CHECKPOINTED, OFFLOADED) or BUDGET in self.variant

    @property
    def only_infers(self) -> bool:
        return self.kind == ONNXRUNTIME


def kind_of(variant: str) -> str:
    return re.split(r"[@+]", variant)[0]


def catalogue(published: ModuleType | None = None) -> list[Network]:
    """Every network in every variant; the published code's where its module is given."""
    found = []
    for config in CONFIGS.values():
        plain = getattr(revbifpn, config.arch)
        makers = {
            FAST: getattr(revbifpn.fast, config.arch),
            REVERSIBLE: plain,
            STORED: partial(plain, reversible=False),
            COMPILED: partial(_compiled, partial(plain, reversible=False)),
            CHECKPOINTED: partial(CheckpointedRevBiFPN, config.arch),
        }
        if published is not None:
            makers[PUBLISHED] = partial(_silently, getattr(published, config.arch))
        label = f"{REVBIFPN}-{config.arch.rsplit('_', 1)[1].upper()}"
        numbers = (config.resolution, config.parameters, config.macs / 1e9)
        found += [Network(config.arch, v, REVBIFPN, label, config.top1, make, *numbers) for v, make in makers.items()]
    for r in RIVALS.values():
        makers = {
            STORED: r.build,
            COMPILED: partial(_compiled, r.build),
            CHECKPOINTED: partial(r.build, checkpointed=True),
        }
        numbers = (r.resolution, round(r.parameters * 1e6), r.gmacs)
        found += [Network(r.name, v, r.family, r.label, r.top1, make, *numbers) for v, make in makers.items()]
    return found


def choose(patterns: str, everything: Sequence[Network]) -> list[Network]:
    """Those whose ``name`` or ``name/variant`` matches a pattern; the published code wherever its network is."""
    chosen = select("--models", patterns, everything, lambda n: (n.name, n.key))
    names = {n.name for n in chosen}
    return [n for n in everything if n in chosen or (n.variant == PUBLISHED and n.name in names)]


def check_packages(chosen: Sequence[Network]) -> None:
    """What building and plotting them needs is installed."""
    require("matplotlib")
    if any(n.family != REVBIFPN for n in chosen):
        import_timm()


# In other ways, once more -------------------------------------------------------------------------------


def in_streams(network: Network, formats: Sequence[str]) -> Iterator[Network]:
    """A fast RevBiFPN with its streams in each of the formats."""
    for stream in formats if network.variant == FAST else ():
        make = partial(network.make, stream=stream)
        yield replace(network, variant=network.variant + STREAM + stream, make=make)


def in_a_graph(network: Network) -> Iterator[Network]:
    """What a CUDA graph can capture, with its whole step captured."""
    if network.kind in (FAST, STORED):
        yield replace(network, variant=network.variant + GRAPH)


def on_budgets(network: Network, budgets: Sequence[float]) -> Iterator[Network]:
    """A stored network under torch.compile, which keeps a part of the activations for backward, 0 to 1."""
    for budget in budgets if network.variant == STORED else ():
        make = partial(_compiled, network.make, budget=budget)
        yield replace(network, variant=f"{COMPILED}{BUDGET}{budget:g}", make=make)


def without_overhead(network: Network) -> Iterator[Network]:
    """A stored network under torch.compile with CUDA graphs."""
    if network.variant == STORED:
        make = partial(_compiled, network.make, mode="reduce-overhead")
        yield replace(network, variant=COMPILED + OVERHEAD, make=make)


def offloaded(network: Network) -> Iterator[Network]:
    """A stored network whose activations wait for backward in the host's memory."""
    if network.variant == STORED:
        yield replace(network, variant=OFFLOADED, make=lambda **overrides: Offloaded(network.make(**overrides)))


def in_onnxruntime(network: Network) -> Iterator[Network]:
    """A plain RevBiFPN exported to ONNX, by onnxruntime."""
    if network.family == REVBIFPN and network.variant == STORED:
        yield replace(network, variant=ONNXRUNTIME, make=partial(OnnxRuntime, network.make))


def with_defaults(network: Network) -> Iterator[Network]:
    """As PyTorch comes, with TF32 in convolutions."""
    yield replace(network, variant=network.variant + DEFAULTS)


def why_not(network: Network, device: torch.device) -> str:
    """Why ``device`` cannot run it; empty where it can."""
    if network.kind == ONNXRUNTIME:
        return "" if device.type == "cpu" else "onnxruntime is compared on the CPU"
    if device.type == "cuda":
        return ""
    if network.is_graph:
        return "CUDA graphs need a GPU"
    if network.kind == OFFLOADED:
        return "its activations are the host's already"
    return "TF32 needs a GPU" if DEFAULTS in network.variant else ""


class CheckpointedRevBiFPN(revbifpn.RevBiFPN_S):
    """The plain stored model with every block of its stack, and its neck, under ``torch.utils.checkpoint``."""

    def __init__(self, arch: str, **overrides: Any) -> None:
        super().__init__(arch, disable_rev=True, **overrides)
        for block in self.rev_stack.blocks:
            block.reversible = False

    def forward(self, x: Tensor) -> Tensor:
        streams = (self.stem(x),)
        for block in self.rev_stack.blocks:
            out = checkpoint(block, *streams, use_reentrant=False)
            streams = (out,) if isinstance(out, Tensor) else out
        necks = self.neck.children()
        return self.head([checkpoint(f, y, use_reentrant=False) for f, y in zip(necks, streams, strict=True)])


class Offloaded(nn.Module):
    """Keeps in the host's memory, pinned, what ``module`` saves for backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
            return self.module(x)


class OnnxRuntime(nn.Module):
    """``make()`` at inference, exported for the images that come, on as many threads as PyTorch has."""

    def __init__(self, make: Callable[..., nn.Module], **overrides: Any) -> None:
        super().__init__()
        self.module = make(**overrides)
        self.sessions: dict[tuple[int, ...], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        session = self.sessions.get(tuple(x.shape))
        if session is None:
            session = self.sessions[tuple(x.shape)] = self._session(x)
        return torch.from_numpy(session.run(None, {"image": x.numpy()})[0])

    def _session(self, x: Tensor) -> Any:
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            export_onnx(self.module, path, tuple(x.shape[2:]), batch=len(x))
            return onnxruntime.InferenceSession(path, options)


def _compiled(
    make: Callable[..., nn.Module], *, budget: float | None = None, mode: str | None = None, **overrides: Any
) -> nn.Module:
    backend = "inductor" if budget is None else _Budgeted(budget)
    return torch.compile(make(**overrides), backend=backend, mode=mode, dynamic=False)


@dataclass(frozen=True)
class _Budgeted:
    """Inductor with a budget of activation memory, set where it is read, whenever a graph is compiled.

    Dynamo shares what it compiled between modules of one class, unless their backends differ.
    """

    budget: float

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        with torch._functorch.config.patch(activation_memory_budget=self.budget):
            return torch._inductor.compile(graph, inputs)


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
