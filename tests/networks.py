"""Small networks, their images, and how tests compare what they compute.

The truth about a reversible network is the same network in plain PyTorch with its activations stored:
:func:`assert_same_as_stored`.
"""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import revbifpn
from revbifpn import fast
from tests.marks import mostly_slow

F64, F32 = torch.float64, torch.float32
BOTH = {"plain": revbifpn, "fast": fast}
MODULES = pytest.mark.parametrize("module", BOTH.values(), ids=BOTH)
MOSTLY_FAST = pytest.mark.parametrize("module", mostly_slow([fast, revbifpn]), ids=["fast", "plain"])
REVERSIBLE = pytest.mark.parametrize("reversible", [True, False], ids=["reversible", "stored"])

# The published kernels and ratios on few channels, as shallow as they go, with nothing random.
NARROW = {
    "channels": [48, 16, 16, 16],
    "head_channels": [16, 16, 16, 16],
    "fc_features": 32,
    "classes": 10,
    "num_ext_layers": 0,
    "inv_blk_rep": 1,
    "head_dropout": 0.0,
}
TWO_LEVELS = {
    "channels": [48, 32],
    "dwk": [3, 5],
    "dwkp": [0, 0],
    "expand_ratios": [1, 2],
    "se_ratios": [0.25, 0.0],
    "head_channels": [48, 32],
    "head_dwk": [3, 3],
    "head_dwkp": [2, 2],
    "head_expand_ratios": [1, 2],
    "head_se_ratios": [0.25, 0.125],
    "fc_features": 32,
    "classes": 10,
    "num_ext_layers": 0,
    "inv_blk_rep": 1,
}


def narrow(module: ModuleType, dtype: torch.dtype = F64, *, seed: int = 0, **options) -> nn.Module:
    """A network of four levels in training mode; equal seeds give equal weights, in either module."""
    torch.manual_seed(seed)
    return module.RevBiFPN(**(NARROW | options)).to(dtype)


def image(dtype: torch.dtype = F64, n: int = 2, height: int = 64, width: int = 64) -> Tensor:
    """The same values in every dtype, rounded."""
    return torch.randn(n, 3, height, width, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


def scalar(outputs: Tensor | Iterable[Tensor]) -> Tensor:
    """A loss without symmetry, of logits or of a pyramid."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return sum(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().sum() for y in outputs
    )


def gradients(model: nn.Module, x: Tensor, *, seed: int = 2) -> list[Tensor | None]:
    """Of every parameter, for :func:`scalar`; masks are drawn from the seed."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    scalar(model(x)).backward()
    return [p.grad for p in model.parameters()]


def stored_gradients(x: Tensor, **options) -> list[Tensor | None]:
    """The truth: plain PyTorch, activations stored."""
    return gradients(narrow(revbifpn, reversible=False, **options), x)


def difference(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """Largest relative difference of a norm; norms below 1e-6 of the largest (zero, rounded) count as that."""
    assert [g is None for g in found] == [g is None for g in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
    floor = max(1e-6 * max((b.norm().item() for _, b in pairs), default=0.0), 1e-30)
    return max(((a - b).norm().item() / max(b.norm().item(), floor) for a, b in pairs), default=0.0)


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """``|found - wanted| / |wanted|`` of all tensors as one vector, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in pairs]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


def identical(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def assert_same_as_stored(
    module: ModuleType, run: Callable[[nn.Module], Sequence[Tensor | None]], *, tolerance: float = 1e-9, **options
) -> None:
    """``run(model)`` gives the same tensors on a reversible network and on plain PyTorch's stored one."""
    found = run(narrow(module, reversible=True, **options))
    wanted = run(narrow(revbifpn, reversible=False, **options))
    assert difference(found, wanted) < tolerance


def allocator_peak(step: Callable[[], object]) -> int:
    """Peak of what the CPU allocator handed out during ``step``, replayed from the profiler's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak
