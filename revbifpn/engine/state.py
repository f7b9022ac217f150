"""The streams of one pass, their gradients, and how far it is: a coupling's advance, and its retreat in backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revbifpn.engine.anomaly import label
from revbifpn.engine.branch import Branch, Contribution, Gradient, Pullback
from revbifpn.engine.coupling import Coupling, Levels, Part
from revbifpn.engine.lowered import Coupler, Grid, Lowered
from revbifpn.engine.record import Backends
from revbifpn.streams import (
    INT32,
    OverflowCounter,
    StreamFormat,
    Values,
    float_and_rest,
    has_values,
    integers_of,
    is_capturing,
    values,
)

_AGAIN = (
    "a second backward through one reversible forward pass: its streams were already inverted in place. "
    "Run the forward again, or sum the losses and call backward once, or set retain_graph=True on the model, or "
    "use reversible=False."
)
_AGAIN_STORED = (
    "a second backward through one pass with an exact stream: what it had stored is used up. Run the forward again, or "
    "sum the losses and call backward once, or set retain_graph=True on the model, or use stream='float32' with "
    "reversible=False."
)


class Call(NamedTuple):
    """One call of a branch in a pass: what it was recorded with, or what it kept for backward."""

    branch: Branch
    record: Any = None
    kept: tuple[Contribution, Pullback] | None = None
    signature: Tensor | None = None  # of the contribution, where backward is to compare it


class Advanced(NamedTuple):
    """What :meth:`State.advance` leaves for :meth:`State.retreat`."""

    calls: list[Call]
    remainder: Tensor | None  # of dividing an exact stream


class Observer:
    """Looks at the streams of a pass around every coupling; see :mod:`revbifpn.monitor`."""

    def before(self, state: State, lowered: Lowered) -> None:
        """The coupling is about to be added."""

    def after(self, state: State, lowered: Lowered) -> None:
        """It was."""

    def undone(self, state: State, lowered: Lowered, position: int) -> None:
        """It was taken off again in backward; ``position`` is that of :meth:`before`."""


@dataclass
class State:
    """Streams, gradients and position of one pass. It lives as long as the graph that points to it.

    Attributes:
        stored: keep what branches compute for backward, instead of inverting streams and recomputing.
        retain: a second backward may come: keep a copy of the streams from the first one on.
        gradient_dtype: of the streams' gradients; None for that of the streams.
    """

    coupler: Coupler
    root: Any = None  # a module, knows the names of the transforms
    format: StreamFormat = StreamFormat()
    stored: bool = False
    retain: bool = False
    gradient_dtype: torch.dtype | None = None
    streams: Levels = field(default_factory=Levels)
    grads: Levels = field(default_factory=Levels)
    position: int = 0  # couplings applied and not yet undone
    task: int = -1  # autograd's number of the backward call that the gradients belong to
    final: list[Tensor] = field(default_factory=list)  # with ``retain``, the streams at the end of the forward
    backends: Backends = field(default_factory=Backends.current)
    backends_changed: bool = False  # since the forward, as the backward call found them

    def __post_init__(self) -> None:
        self.overflow = OverflowCounter(self.format, getattr(self.root, "labels", ()))
        self.observer: Observer | None = getattr(self.root, "observer", None)
        self.checks = self.format.exact and not self.stored and getattr(self.root, "self_check", False)

    # Streams ----------------------------------------------------------------------------------

    def enter(self, inputs: Sequence[Tensor], owned: bool = False) -> None:
        """Take the inputs as streams: themselves where the caller gave them away, copies or encodings otherwise."""
        for x in inputs:
            self.format.check(x)
            self.checks = self.checks and not is_capturing(x.device)  # values to compare come with the replay
        if owned and not self.format.exact:
            self.streams = Levels([x.data for x in inputs])
        else:
            self.streams = Levels(
                [self.format.encode(x, level, self.overflow.of(level, x.device)) for level, x in enumerate(inputs)]
            )

    def decoded(self) -> tuple[Tensor, ...]:
        """The streams as ordinary tensors; the state keeps them no longer."""
        streams, self.streams = self.streams, Levels()
        return tuple(values(self.format.decode(y, level)) for level, y in enumerate(streams))

    def read(self, part: Part) -> Values:
        """The values of a part, as branches take them."""
        return self.format.decode(self.streams.part(part), part.level)

    def copy_of(self, level: int) -> Tensor:
        """A stream's values, in memory of their own."""
        y = self.read(Part(level))
        return y.clone() if isinstance(y, Tensor) else values(y)

    def give(self, level: int) -> tuple[Tensor, Tensor | None]:
        """A stream as an ordinary tensor, which the state keeps no longer, and what that has lost of it."""
        y, self.streams[level] = self.streams[level], self.streams[level].new_empty(0)
        bits = self.format.bits(level)
        return (y, None) if bits is None or y.is_floating_point() else float_and_rest(y, bits)

    def take_back(self, position: int, level: int, y: Tensor, rest: Tensor | None, dy: Tensor | None) -> None:
        """Backward begins at ``position``, with a stream that :meth:`give` gave away, and its gradient."""
        if self.retain and not self.final:
            self.final = [stream.clone() for stream in self.streams]
        elif self.retain:
            self.streams, self.position = Levels([stream.clone() for stream in self.final]), position
        self.expect(position)
        self.task, self.backends_changed = torch._C._current_graph_task_id(), Backends.current() != self.backends
        # The caller may still hold the tensor, and autograd may share the gradient: the pass works on copies.
        bits, own = self.format.bits(level), self.streams[level].is_floating_point()
        self.streams[level] = y.clone() if own or bits is None else integers_of(y, rest, bits)
        self.grads = Levels([None] * len(self.streams))
        self.grads[level] = None if dy is None else self._own_gradient(dy)

    def _grid(self, level: int, *, counted: bool) -> Grid | None:
        bits = self.format.bits(level)
        if bits is None:
            return None
        return Grid(bits, self.overflow.of(level, self.streams[level].device, self.position) if counted else None)

    def _linear(self, lowered: Lowered) -> list[Values]:
        return [self.read(source) for source, _ in lowered.coupling.linear]

    # Forward ----------------------------------------------------------------------------------

    def lower(self, coupling: Coupling) -> Lowered:
        """The coupling with the branches that fit the streams.

        Raises:
            ValueError: it scales an exact stream, or the stream is one of integers, which nothing here keeps the
                remainders of.
        """
        if coupling.scale != 1 and self.format.exact and not self.coupler.divides:
            raise ValueError(
                f"scale: a {self.format.name} stream lies on a grid, which {coupling.scale:g} y leaves; "
                "use stream='float32'"
            )
        if self.format.name == INT32 and not self.coupler.divides:
            raise ValueError("stream: int32 is for dual-residual networks; expected 'float32', 'fixed32' or 'fixed16'")
        return self.coupler.lower(coupling, [self.read(source) for source in coupling.sources])

    def call(
        self, branch: Branch, inputs: Sequence[Values], parameters: Sequence[Tensor], *, stored: bool
    ) -> tuple[Contribution, Call]:
        """Call a branch for the first time."""
        if stored:
            kept = branch.store(parameters, inputs)
            return kept[0], Call(branch, kept=kept)
        contribution, record = branch.record(*inputs)
        checked = self.checks and has_values(contribution.p)
        return contribution, Call(branch, record, signature=_signature(contribution.p) if checked else None)

    def advance(self, lowered: Lowered, parameters: Sequence[Tensor]) -> Advanced:
        """Apply a coupling; returns what :meth:`retreat` needs."""
        contributions, calls = [], []
        for source, branch, own in zip(lowered.sources, lowered.branches, lowered.split(parameters), strict=True):
            contribution, call = self.call(branch, [self.read(source)], own, stored=self.stored)
            contributions.append(contribution)
            calls.append(call)
        return Advanced(calls, self.add(lowered, contributions, undone=not self.stored))

    def apply(self, lowered: Lowered) -> None:
        """Apply a coupling that nothing will differentiate."""
        self.add(lowered, [b.evaluate(self.read(s)) for b, s in zip(lowered.branches, lowered.sources, strict=True)])

    def add(self, lowered: Lowered, contributions: Sequence[Contribution], *, undone: bool = False) -> Tensor | None:
        """``y_t <- s y_t + sum_k contribution_k + sum_j c_j y_j``, a new stream where the coupling creates it.

        Returns:
            What :meth:`subtract` needs to undo it, if it will be ``undone``.
        """
        target = lowered.target
        if lowered.creates:
            if target.level != len(self.streams):
                raise ValueError(
                    f"streams: stream {target.level} is created next, which takes as many before it, "
                    f"got {len(self.streams)}"
                )
            self.streams.append(self.streams[0].new_zeros(contributions[0].p.shape))  # going down, nothing is upsampled
        if self.observer is not None:
            self.observer.before(self, lowered)
        grid = self._grid(target.level, counted=True)
        y = self.streams.part(target)
        remainder = lowered.advance_(y, contributions, self._linear(lowered), grid, undone=undone)
        if self.observer is not None:
            self.observer.after(self, lowered)
        self.position += 1
        return remainder

    # Backward ---------------------------------------------------------------------------------

    def subtract(
        self, lowered: Lowered, contributions: Sequence[Contribution], remainder: Tensor | None = None
    ) -> None:
        """``y_t <- (y_t - sum_k contribution_k - sum_j c_j y_j) / s``."""
        grid = self._grid(lowered.target.level, counted=False)
        lowered.retreat_(self.streams.part(lowered.target), contributions, self._linear(lowered), grid, remainder)

    def undo(self, lowered: Lowered, remainder: Tensor | None = None) -> None:
        """Undo a coupling with its branches as they are now, for ``inverse()``."""
        if lowered.creates:
            self.streams.pop()
        else:
            sources = zip(lowered.branches, lowered.sources, strict=True)
            self.subtract(lowered, [branch.evaluate(self.read(s), update=False) for branch, s in sources], remainder)
        self.position -= 1

    def retreat(
        self, lowered: Lowered, advanced: Advanced, parameters: Sequence[Tensor], needs_input: bool
    ) -> list[Tensor | None]:
        """Undo a coupling and pull the gradient of its target through it; returns the parameters' gradients.

        With ``needs_input`` unset nothing before this coupling wants a gradient: its input and their gradients are not
        formed.
        """
        pulls = self.grads[lowered.target.level] is not None
        undoes = needs_input and not lowered.creates and not self.stored
        gradients: list[Tensor | None] = [None] * len(parameters)
        if pulls or undoes:
            contributions, pullbacks = self._replayed(lowered, advanced.calls, parameters, needs_input)
            if undoes:
                self.subtract(lowered, contributions, advanced.remainder)
                if self.observer is not None:
                    self.observer.undone(self, lowered, self.position - 1)
            if pulls:
                gradients = self._pull(lowered, contributions, pullbacks, needs_input)
        if not needs_input:
            self.release()
            return gradients
        if lowered.creates:
            self.streams.pop()
            self.grads.pop()
        self.position -= 1
        return gradients

    def _replayed(
        self, lowered: Lowered, calls: Sequence[Call], parameters: Sequence[Tensor], needs_input: bool
    ) -> tuple[list[Contribution], list[Pullback]]:
        """Contributions and pullbacks of a coupling's branches, from its sources as they are now."""
        contributions: list[Contribution] = []
        pullbacks: list[Pullback] = []
        for source, call, own in zip(lowered.sources, calls, lowered.split(parameters), strict=True):
            contribution, pullback = self.replay(call, own, [self.read(source)], [needs_input])
            assert contribution is not None, "only segments, which are read, leave it out"
            contributions.append(contribution)
            pullbacks.append(pullback)
        return contributions, pullbacks

    def _pull(
        self,
        lowered: Lowered,
        contributions: list[Contribution],
        pullbacks: list[Pullback],
        needs_input: bool,
    ) -> list[Tensor | None]:
        """``dy_k += J_k^T dy_t``, ``dy_j += c_j dy_t``, ``dy_t <- s dy_t``; uses both lists up."""
        coupling = lowered.coupling
        dy = PartGradient(self, coupling.target).tensor()
        pulled = lowered.adjoint(dy, contributions)
        contributions.clear()  # the last references to p: only the pullbacks' graphs are needed from here on
        gradients: list[Tensor | None] = []
        found: list[Gradient] = []
        for source in reversed(lowered.sources):
            into = lowered.gradient(PartGradient(self, source)) if needs_input else None
            gradients = [*pullbacks.pop()(*pulled.pop(), [into]), *gradients]
            if into is not None:
                found.append(into)
        if needs_input:
            lowered.pull_linear_(dy, [PartGradient(self, source) for source, _ in coupling.linear], found[::-1])
        return gradients

    def replay(
        self, call: Call, parameters: Sequence[Tensor], inputs: Sequence[Values], needs: Sequence[bool]
    ) -> tuple[Contribution | None, Pullback]:
        """What a call computed, and its pullback: kept since then, or computed again.

        Raises:
            RuntimeError: it computes other values than it did, and the stream is exact.
        """
        if call.kept is not None:
            return call.kept
        contribution, pullback = call.branch.recompute(call.record, parameters, inputs, needs)
        if call.signature is not None and contribution is not None:
            if not torch.equal(_signature(contribution.p), call.signature):
                raise RuntimeError(
                    f"{self.name_of(call.branch)} computed other values in backward than in forward, which a "
                    f"{self.format.name} stream cannot take: it is undone bit for bit. Usual causes: another number of "
                    "threads, a non-deterministic kernel (torch.use_deterministic_algorithms), state outside of "
                    "buffers, a random generator of its own, values that are not finite. stream='float32' tolerates "
                    "small differences"
                )
        return contribution, pullback

    def name_of(self, branch: Branch) -> str:
        """The name of a branch's transform in the root."""
        names = {id(m): name for name, m in self.root.named_modules()} if self.root is not None else {}
        return names.get(id(branch.module)) or label(branch.module)

    def begin(self, position: int) -> None:
        """A node at the end of the forward, where the pass was at ``position``, reads streams in backward.

        A new backward call starts with gradients of zero: an earlier one may have read a level and stopped there.
        """
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.backends_changed = task, Backends.current() != self.backends
            if self.retain and not self.final:
                self.final = [y.clone() for y in self.streams]
            elif self.retain and self.position != position:
                self.streams, self.position = Levels([y.clone() for y in self.final]), position
            self.grads = Levels([None] * len(self.streams))
        self.expect(position)

    def reenter(self, position: int, streams: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Backward begins at ``position``, with streams that had left, and their gradients."""
        if self.retain:
            self.streams, self.position = Levels(), position
        self.expect(position)
        if self.streams:
            raise RuntimeError(_AGAIN)
        self.backends_changed = Backends.current() != self.backends
        self.enter(streams)
        self.grads = Levels([None if g is None else self._own_gradient(g) for g in grads])

    def expect(self, position: int) -> None:
        """Refuse to go on where the streams are not what this node left behind."""
        if self.position != position:
            raise RuntimeError(_AGAIN_STORED if self.stored else _AGAIN)

    def _own_gradient(self, dy: Tensor) -> Tensor:
        """A copy of a stream's gradient."""
        return dy.to(self.gradient_dtype or dy.dtype, memory_format=torch.contiguous_format, copy=True)

    def release(self) -> None:
        """Let go of the streams: nothing before this point of the backward wants a gradient."""
        self.streams, self.grads, self.position = Levels(), Levels(), -1
        if self.checks:
            self.root.self_check = False  # a whole step went well

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Backward computes here: with the backends' settings of the forward.

        An exception leaves streams that nothing may use: they go at once, to make room for a retry.
        """
        try:
            if self.backends_changed:
                with self.backends.restore():
                    yield
            else:
                yield
        except BaseException:
            self.streams, self.grads, self.final, self.position = Levels(), Levels(), [], -1
            raise

    def round_trip(self, couplings: Iterable[Coupling]) -> None:
        """Apply couplings, and undo them as backward does: with what was recorded, and no gradients."""
        done = []
        for coupling in couplings:
            lowered = self.lower(coupling)
            done.append((lowered, self.advance(lowered, lowered.parameters())))
        self.grads = Levels([None] * len(self.streams))
        for lowered, advanced in reversed(done):
            self.retreat(lowered, advanced, lowered.parameters(), needs_input=True)


def _signature(p: Tensor) -> Tensor:
    """The sums of a tensor's bits, per channel: other values all but certainly have other sums."""
    bits = p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])
    return bits.sum((0, *range(2, p.dim())), dtype=torch.int64)


class PartGradient(Gradient):
    """``dy`` of a part of a pass's streams."""

    def __init__(self, state: State, part: Part) -> None:
        self.state, self.part = state, part
        self.dtype = state.gradient_dtype or state.streams[part.level].dtype

    def tensor(self) -> Tensor:
        level, grads = self.part.level, self.state.grads
        if grads[level] is None:
            stream = self.state.streams[level]
            grads[level] = torch.zeros(stream.shape, dtype=self.dtype, device=stream.device)
        return grads.part(self.part)

    def adopts(self, buffer: Tensor) -> bool:
        level = self.part.level
        whole = self.part.half is None and self.state.grads[level] is None
        return whole and buffer.shape == self.state.streams[level].shape and buffer.dtype == self.dtype

    def adopt(self, buffer: Tensor) -> None:
        self.state.grads[self.part.level] = buffer
