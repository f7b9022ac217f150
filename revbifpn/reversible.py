"""Reversible blocks: networks whose activations are recomputed from their outputs instead of stored.

Everything here is one operation, the additive coupling. A *stream* is a feature map; a coupling adds to one stream
what *transforms* compute from others,

    y_t = x_t + sum_k F_k(x_k),      k != t,

and is undone by subtracting the same sum: ``x_t = y_t - sum_k F_k(x_k)``, since the ``x_k`` are still there. A block is
a sequence of couplings, a network a sequence of blocks, and backward runs the sequence in reverse: recompute ``F_k``,
subtract, pull the gradient through. Memory does not grow with depth. This file says which couplings a block is made of;
:mod:`revbifpn.engine.coupling` what a coupling is, :mod:`revbifpn.engine.state` how a pass runs it back and forth. Read
``couplings`` of :class:`RevBlock` and :class:`RevSilo` first, then :meth:`Reversible.inverse`.

    >>> block = RevBlock(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    >>> net = ReversibleSequence(block, ...)
    >>> y = net(x)            # keeps y alone
    >>> x = net.inverse(y)

Source: Chiley et al., RevBiFPN, arXiv 2206.14098 (RevSilo); Gomez et al., RevNet, arXiv 1707.04585 (RevBlock).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from revbifpn.engine.anomaly import names_of
from revbifpn.engine.coupling import Coupling, Levels, Part, Upsampled
from revbifpn.engine.lowered import Coupler
from revbifpn.engine.record import is_recomputing
from revbifpn.engine.region import Region, run_as_region, wants_gradients
from revbifpn.engine.state import Observer, State
from revbifpn.engine.tape import Stored, Tape, TapeAt, open_tape, recomputed
from revbifpn.engine.traced import is_traced
from revbifpn.streams import HALVES, StreamFormat, resolve

__all__ = [
    "Coupling",
    "HalfSilo",
    "Part",
    "PerLevel",
    "RevBlock",
    "RevSilo",
    "Reversible",
    "ReversibleSequence",
    "Upsampled",
    "check_invertible",
    "is_recomputing",
    "recomputed",
]


class Reversible(Region, ABC):
    """A module made of couplings. Subclasses say which, in forward order, in :meth:`couplings`.

    Attributes:
        reversible: recompute activations in backward (True) or store them as ordinary autograd does (False).
            Read from the module that is called, not from the blocks inside it.
        coupler: how sums are added to streams; plain PyTorch unless a subclass or owner says otherwise.
        self_check: with an exact stream, verify in backward that every transform is recomputed bit for bit, and raise
            an error that names the one that is not. The first step that passes switches it off.
        observer: looks at the streams around every coupling, see :mod:`revbifpn.monitor`.
        retain_graph: allow several backwards through one forward, as ``backward(retain_graph=True)`` asks for (two
            losses, gradients per task). Costs a copy of the streams from the first backward on, where a level was read
            from the tape, and nothing where the streams left it; nothing is stored in forward then, whatever
            ``reversible`` says of an exact stream.
    """

    reversible: bool = True
    retain_graph: bool = False
    coupler: Coupler = Coupler()
    self_check: bool = True
    observer: Observer | None = None
    _stream: StreamFormat | None = None

    @property
    def stream(self) -> StreamFormat | None:
        """How streams are stored: ``"float32"``, ``"fixed32"``, ``"fixed16"`` or a :class:`StreamFormat`.

        None, the default, is ``"float32"``, and ``"fixed32"`` under autocast and for a network of 16 bits: with
        branches in 16 bits, floats that are not restored bit for bit would spoil the gradients.
        """
        return self._stream

    @stream.setter
    def stream(self, stream: str | StreamFormat | None) -> None:
        self._stream, self.self_check = StreamFormat.of(stream), True

    def extra_repr(self) -> str:
        return "" if self.stream is None else f"stream={self.stream.name}{list(self.stream.fraction_bits) or ''}"

    @abstractmethod
    def couplings(self) -> Iterator[Coupling]:
        """The couplings in forward order. Streams are counted from 0, the highest resolution."""

    def run(self, tape: Tape | Stored | TapeAt) -> None:
        """Apply the couplings to the streams on a tape."""
        for coupling in self.couplings():
            tape.step(coupling)

    def recomputes(self, x: Tensor) -> bool:
        """Whether a pass from an input like x is more than ordinary autograd."""
        return self.reversible or resolve(self.stream, x).exact

    def open(self, *streams: Tensor, owned: bool = False) -> Tape | Stored:
        """A tape with these streams, to run the module on: ``module(tape)``, then ``tape.finish()``.

        Streams may then be read from it, or leave.

        Args:
            streams: ``[N, C, H, W]`` each; left as they are unless ``owned``.
            owned: the caller gives the tensors away, so that they may be updated in place.
        """
        if is_traced():
            return Stored(Coupler(), streams)
        if self.recomputes(streams[0]) or not torch.is_grad_enabled():
            stream = resolve(self.stream, streams[0])
            stored, retain = not self.reversible, self.retain_graph
            return open_tape(self, streams, self.coupler, stream, stored=stored, retain=retain, owned=owned)
        return Stored(self.coupler, streams)

    def forward(self, *streams: Any, read: Callable[[], Any] | None = None) -> Any:
        """Streams in, streams out: a tensor for a single stream, else a tuple from high to low resolution.

        A container calls its blocks with its tape instead of tensors, so that their hooks run, and with what travels
        through autograd (:meth:`revbifpn.engine.tape.Tape.call`); with ``read``, its result comes out instead.
        """
        if isinstance(streams[0], (Tape, Stored, TapeAt)):
            on, *carried = streams
            if carried:
                on.carry(carried[0])
            self.run(on)
            return on.carried() if read is None else read()
        if self.recomputes(streams[0]) and wants_gradients(self, *streams):
            return _unpack(run_as_region(self, *streams))
        with names_of(self):
            return _unpack(self._forward(*streams))

    def _forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        tape = self.open(*streams)
        self.run(tape)
        tape.finish()
        return tape.leave()

    @torch.no_grad()
    def inverse(self, *streams: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The inputs, from the outputs. Not differentiable; leaves buffers and the given tensors as they are.

        Transforms are evaluated as they are now: with random layers in train mode the result is not the input
        (use ``eval()``; backward replays its random numbers and is not affected).
        """
        state = State(self.coupler, self, resolve(self.stream, streams[0]))
        state.enter(streams)
        for coupling in reversed(list(self.couplings())):
            state.undo(state.lower(coupling))
        inverted = state.decoded()
        return _unpack(tuple(x.to(streams[0].dtype) for x in inverted) if streams[0].dtype in HALVES else inverted)


def _unpack(streams: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return streams[0] if len(streams) == 1 else streams


Terms = tuple[tuple[Part, nn.Module], ...]  # of a coupling: what its transforms read, and they


class HalfSilo(nn.Module):
    """The transforms ``xform_{i}_{j}`` of one direction, from stream i to stream j > i, counted in that direction.

    Args:
        transforms: ``{(source, target): module}``, counted from the highest resolution, whichever the direction.
        levels: number of streams.
        up: the direction is from low to high resolution; names then count from the lowest resolution, as published.
    """

    def __init__(self, transforms: Mapping[tuple[int, int], nn.Module], levels: int, *, up: bool = False) -> None:
        super().__init__()
        self.levels, self.up = levels, up
        for source, target in transforms:
            if not 0 <= source < levels or not 0 <= target < levels or (source > target) != up or source == target:
                raise ValueError(
                    f"transforms: {(source, target)} is not a pair (source, target) going "
                    f"{'up' if up else 'down'} among {levels} streams"
                )
        for (source, target), transform in sorted(transforms.items(), key=lambda item: self._count(*item[0])):
            i, j = self._count(source, target)
            self.add_module(f"xform_{i}_{j}", transform)
        self._into = [self._names_into(target) for target in range(levels)]

    def _count(self, *levels: int) -> tuple[int, ...]:
        return tuple(self.levels - 1 - level for level in levels) if self.up else levels

    def _names_into(self, target: int) -> list[tuple[Part, str]]:
        """The sources that may add to ``target``, and the names of their transforms, in the order of these."""
        sources = range(self.levels - 1, target, -1) if self.up else range(target)
        return [(Part(source), "xform_{}_{}".format(*self._count(source, target))) for source in sources]

    def into(self, target: int) -> Terms:
        """The (source, transform) pairs that add to ``target``, in the order of their names."""
        terms = [(part, self._modules.get(name)) for part, name in self._into[target]]
        return tuple([(part, transform) for part, transform in terms if transform is not None])

    def leave_out(self, target: int) -> None:
        """Have no transforms into ``target`` any more."""
        _, j = self._count(0, target)
        for name in [name for name in self._modules if name.endswith(f"_{j}")]:
            delattr(self, name)


_couplings: WeakKeyDictionary[HalfSilo, dict[Part, Coupling]] = WeakKeyDictionary()


def _coupling(silo: HalfSilo, target: Part, terms: Terms, creates: bool = False) -> Coupling:
    """One of a half silo's couplings, by target: the same in every pass, as making and checking one takes its time."""
    if is_traced():
        return Coupling(target, terms, creates)
    known = _couplings.setdefault(silo, {})
    coupling = known.get(target)
    if coupling is None or coupling.terms != terms or coupling.creates != creates:
        coupling = known[target] = Coupling(target, terms, creates)
    return coupling


class RevBlock(Reversible):
    """Reversible residual block on the channel halves ``x = [x0, x1]`` of one stream (RevNet).

    ``y1 = x1 + F(x0)``, ``y0 = x0 + G(y1)``, ``y = [y0, y1]``; inverse ``x0 = y0 - G(y1)``, ``x1 = y1 - F(x0)``.

    Args:
        f: any module from ``[N, ceil(C/2), H, W]`` to ``[N, floor(C/2), H, W]``.
        g: the other way round.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f = HalfSilo({(0, 1): f}, levels=2)
        self.g = HalfSilo({(1, 0): g}, levels=2, up=True)

    def couplings(self) -> Iterator[Coupling]:
        x0, x1 = Part(0, half=0), Part(0, half=1)
        ((_, f),), ((_, g),) = self.f.into(1), self.g.into(0)
        yield _coupling(self.f, x1, ((x0, f),))
        yield _coupling(self.g, x0, ((x1, g),))

    def run(self, tape: Tape | Stored | TapeAt) -> None:
        tape.step(*self.couplings())


class RevSilo(Reversible):
    """Reversible fusion of streams of several resolutions: all downward sums, then all upward sums.

    ``y_j = x_j + sum_{i<j} F_ij(x_i)`` from the silo's inputs, then ``z_j = y_j + sum_{i>j} G_ij(y_i)``.
    In place, ``j`` runs from the lowest resolution in the first pass and from the highest in the second; the inverse
    runs both backwards. (Paper, section 3.2.)

    Args:
        down: ``{(i, j): F_ij}``, i < j: any module from stream i's shape to stream j's.
        up: ``{(i, j): G_ij}``, i > j.
        levels: number of streams that leave.
        created: how many of them, the lowest resolutions, do not enter: they start from zero.
    """

    def __init__(
        self,
        down: Mapping[tuple[int, int], nn.Module],
        up: Mapping[tuple[int, int], nn.Module],
        levels: int,
        created: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= created < levels:
            raise ValueError(f"created: expected 0 to {levels - 1} of {levels} streams, got {created}")
        for target in range(levels - created, levels):
            if not any(j == target for _, j in down):
                raise ValueError(f"down: stream {target} is created but nothing goes into it")
        self.levels, self.created = levels, created
        self.f = HalfSilo(down, levels)
        self.g = HalfSilo(up, levels, up=True)

    def keep(self, streams: Collection[int]) -> None:
        """Leave out the transforms whose sums do not reach these streams of those that leave."""
        for j in set(range(self.levels)) - set(streams):
            self.g.leave_out(j)
            if j < min(streams) and j < self.levels - self.created:  # nothing that is kept reads y_j
                self.f.leave_out(j)

    def couplings(self) -> Iterator[Coupling]:
        entering = self.levels - self.created
        for j in range(entering, self.levels):
            yield _coupling(self.f, Part(j), self._from_inputs(j, entering), creates=True)
        for silo, targets in (self.f, range(entering - 1, 0, -1)), (self.g, range(self.levels - 1)):
            couplings = [_coupling(silo, Part(j), silo.into(j)) for j in targets]
            yield from (coupling for coupling in couplings if coupling.terms)

    def _from_inputs(self, target: int, entering: int) -> Terms:
        """A created stream reads the silo's inputs: other created streams are zero there and have no transform."""
        terms = self.f.into(target)
        if any(source.level >= entering for source, _ in terms):
            raise ValueError(f"down: stream {target} is created from another created stream, whose input is zero")
        return terms


class PerLevel(Reversible):
    """A reversible block on each of several streams, independently: ``rev_transform_{i}`` on stream i."""

    def __init__(self, blocks: Sequence[RevBlock]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"rev_transform_{i}", block)

    @property
    def blocks(self) -> list[Reversible]:
        return [block for block in self.children() if isinstance(block, Reversible)]

    def couplings(self) -> Iterator[Coupling]:
        for level, block in enumerate(self.blocks):
            yield from (coupling.at(level) for coupling in block.couplings())

    def run(self, tape: Tape | Stored | TapeAt) -> None:
        for level, block in enumerate(self.blocks):
            tape.call(block, level)


class ReversibleSequence(Reversible):
    """Reversible blocks one after another, on one tape: the container that makes memory independent of depth.

    Args:
        blocks: reversible modules; each takes the streams that the one before it leaves.
        reversible: recompute (True) or store (False) activations.
        stream: see :attr:`Reversible.stream`.
        retain_graph: see :class:`Reversible`.
        start: index of the first block in names.
    """

    def __init__(
        self,
        *blocks: Reversible,
        reversible: bool = True,
        stream: str | StreamFormat | None = None,
        retain_graph: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.reversible, self.stream, self.retain_graph = reversible, stream, retain_graph
        for i, block in enumerate(blocks, start):
            if not isinstance(block, Reversible):
                raise TypeError(f"blocks[{i - start}]: expected a Reversible, got {type(block).__name__}")
            self.add_module(str(i), block)

    @property
    def blocks(self) -> list[Reversible]:
        return [block for block in self.children() if isinstance(block, Reversible)]

    def couplings(self) -> Iterator[Coupling]:
        for block in self.blocks:
            yield from block.couplings()

    def run(self, tape: Tape | Stored | TapeAt) -> None:
        for block in self.blocks:
            tape.call(block)


@torch.no_grad()
def check_invertible(module: Reversible, *streams: Tensor, rtol: float | None = None) -> list[float]:
    """Check that a reversible module gets its inputs back, as backward does it: random numbers are replayed.

    Args:
        module: any :class:`Reversible`, in train or eval mode. Its buffers change as in one forward.
        streams: inputs, ``[N, C, H, W]`` each.
        rtol: largest allowed ``max|x' - x| / max|x|``; by default 1e-3 in float32, 1e-10 in float64, 0.1 below.

    Returns:
        That error of each input.

    Raises:
        AssertionError: an error is above ``rtol`` or not a number; the message names the stream and the usual causes.
    """
    state = State(module.coupler, module, resolve(module.stream, streams[0]))
    state.enter(streams)
    entered = [y.clone() for y in state.streams]
    state.round_trip(module.couplings())
    errors = []
    inputs, state.streams = state.decoded(), Levels(entered)
    for i, (inverted, x) in enumerate(zip(inputs, state.decoded(), strict=True)):
        limit = rtol if rtol is not None else {torch.float32: 1e-3, torch.float64: 1e-10}.get(x.dtype, 0.1)
        error = 0.0
        if x.numel():
            error = ((inverted - x).abs().max() / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)).item()
        if not error <= limit:
            raise AssertionError(
                f"stream {i} comes back with a relative error of {error:.3g}, more than {limit:.3g}: a transform "
                "computes another function the second time (hidden state outside buffers, a random generator of its "
                "own, an input changed in place), or its values overflow or are too large for the dtype"
            )
        errors.append(error)
    return errors
