"""Looking at the streams of a model while it trains: reconstruction error, and the range of values.

Both are :class:`revbifpn.engine.state.Observer` objects, hung on a reversible module for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revbifpn.engine.lowered import Lowered
from revbifpn.engine.state import Observer, State
from revbifpn.reversible import Reversible
from revbifpn.streams import FIXED16, MOST_BITS, StreamFormat, values


def _stacks(model: nn.Module) -> list[Reversible]:
    """The outermost reversible modules, on whose tapes others run, and the stacks that blocks of the model are in."""
    found: dict[int, Reversible] = {}
    inside: set[int] = set()
    for module in model.modules():
        stack = getattr(module.__dict__.get("_dual_residual"), "stack", module)  # a converted block's
        if isinstance(stack, Reversible) and id(stack) not in inside:
            found[id(stack)] = stack
            inside |= {id(m) for m in stack.modules()} - {id(stack)}
    if found:
        return list(found.values())
    raise ValueError(f"model: expected a reversible module or a model with one in it, got {type(model).__name__}")


@contextmanager
def _observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    before = [(stack, stack.observer) for stack in _stacks(model)]
    try:
        for stack, _ in before:
            stack.observer = observer
        yield
    finally:
        for stack, previous in before:
            stack.observer = previous


class Drift(Observer):
    """How far each coupling's input is from what backward gets back.

    Attributes:
        errors: ``max|x' - x| / max|x|`` of the stream that a coupling adds to, by the names of its transforms, in the
            order of the backward: from the last coupling to the first. The error of one includes those before it.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self._inputs: dict[tuple[int, int], Tensor] = {}  # by pass and position

    @property
    def largest(self) -> float:
        return max(self.errors.values(), default=0.0)

    def before(self, state: State, lowered: Lowered) -> None:
        if not lowered.creates:
            self._inputs[id(state), state.position] = values(state.read(lowered.target)).clone()

    def undone(self, state: State, lowered: Lowered, position: int) -> None:
        x = self._inputs.pop((id(state), position))
        difference = (values(state.read(lowered.target)) - x).abs().max() if x.numel() else x.new_zeros(())
        scale = x.abs().max() if x.numel() else x.new_ones(())
        name = " + ".join(map(state.name_of, lowered.branches)) or str(lowered.target)
        self.errors[name] = (difference / scale.clamp_min(torch.finfo(x.dtype).tiny)).item()


@contextmanager
def monitor_drift(model: nn.Module) -> Iterator[Drift]:
    """Measure the reconstruction error of every coupling in the steps inside the block.

    Keeps a copy of every coupling's input for that time: as much memory as without reversibility, about.

    Raises:
        ValueError: the model stores its activations, so that nothing is reconstructed.

    Example:
        >>> with monitor_drift(model) as drift:
        ...     loss(model(x)).backward()
        >>> drift.largest, drift.errors
    """
    if not all(stack.reversible for stack in _stacks(model)):
        raise ValueError("model: expected a reversible one, got one that stores its activations (reversible=False)")
    drift = Drift()
    try:
        with _observed(model, drift):
            yield drift
    finally:
        drift._inputs.clear()


@dataclass(frozen=True)
class LevelRange:
    """The values of a level in one forward pass.

    Attributes:
        level: 0 is the highest resolution.
        largest: ``max |y|`` over all couplings.
        limit: of the model's own stream format; infinity for floats.
        fraction_bits: for ``fixed16``: the most that leave a factor of ``headroom`` above ``largest``.
    """

    level: int
    largest: float
    limit: float
    fraction_bits: int

    @property
    def overflows(self) -> bool:
        return self.largest >= self.limit


class _Largest(Observer):
    def __init__(self) -> None:
        self.levels: dict[int, Tensor] = {}

    def after(self, state: State, lowered: Lowered) -> None:
        level, y = lowered.target.level, state.streams[lowered.target.level]
        if y.numel():
            largest = y.abs().max()
            self.levels[level] = torch.maximum(self.levels.get(level, largest), largest)


@torch.no_grad()
def range_report(model: nn.Module, images: Tensor | Sequence[Tensor], *, headroom: float = 2.0) -> list[LevelRange]:
    """The range of a model's streams in training, and the grid that ``fixed16`` should have for it.

    Runs one forward in train mode (before training, running statistics would say little) with float32 streams, in which
    nothing wraps around. The model is left as it was.

    Args:
        model: a :class:`RevBiFPN` or any module with a reversible one in it.
        images: its input, or a sequence of inputs.
        headroom: how much larger than ``largest`` the range is to be, since values grow in training.

    Returns:
        One :class:`LevelRange` per level. ``StreamFormat("fixed16", [r.fraction_bits for r in report])`` is the format.

    Example:
        >>> for r in range_report(model, images):
        ...     print(r.level, r.largest, r.limit, r.fraction_bits)
    """
    stacks, largest = _stacks(model), _Largest()
    inputs = [images] if isinstance(images, Tensor) else list(images)
    streams = [(stack, stack.stream, stack.self_check) for stack in stacks]
    training = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    model.train()
    for stack in stacks:
        stack.stream = StreamFormat()
    try:
        with _observed(model, largest), torch.random.fork_rng():
            model(*inputs)
    finally:
        for stack, stream, self_check in streams:
            stack.stream, stack.self_check = stream, self_check
        for m, mode in training:
            m.training = mode
        for b, value in buffers:
            b.copy_(value)
    stream = streams[0][1]
    return [_range(level, float(y), stream, headroom) for level, y in sorted(largest.levels.items())]


def _range(level: int, largest: float, stream: StreamFormat | None, headroom: float) -> LevelRange:
    most = MOST_BITS[FIXED16]
    bits = most
    while bits > -8 and 2.0 ** (most - bits) <= largest * headroom:
        bits -= 1
    return LevelRange(level, largest, (stream or StreamFormat()).limit(level), bits)


__all__ = ["Drift", "LevelRange", "monitor_drift", "range_report"]
