"""The tape: what a pass writes on while it runs forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revbifpn.engine.branch import Branch, ModuleBranch
from revbifpn.engine.coupling import Coupling, Part
from revbifpn.engine.lowered import Coupler
from revbifpn.engine.nodes import Enter, Exit, Leave, Read, Recomputed, Show, Step, own
from revbifpn.engine.state import State
from revbifpn.engine.traced import is_traced
from revbifpn.streams import FIXED16, INT32, StreamFormat, Values, autocast_dtype, reduced_dtype

T = TypeVar("T")


class Tape:
    """The streams of one pass while it runs forward, and the end of its chain of autograd nodes."""

    def __init__(self, state: State, dtype: torch.dtype | None = None) -> None:
        self.state, self.dtype = state, dtype  # of the streams that leave; None: as they are
        self.token: Tensor | None = None  # None: nothing is recorded

    def step(self, *couplings: Coupling) -> None:
        """Apply couplings, recorded as one node if the pass is.

        All are lowered before the first is applied: none of several may read a stream that another creates.
        """
        lowered = [self.state.lower(coupling) for coupling in couplings]
        if self.token is None:
            for each in lowered:
                self.state.apply(each)
        else:
            parameters = [q for each in lowered for q in each.parameters()]
            self.token = Step.record(self.token, self.state, lowered, *parameters)

    def call(self, block: nn.Module, level: int = 0) -> None:
        """Call a block that starts at ``level``; what travels through autograd goes in and comes out.

        So hooks on the call's tensors, such as those that gather sharded parameters, see its forward and its backward.
        """
        self.carry(block(TapeAt(self, level), *(() if self.token is None else (self.token,))))

    def call_and_read(self, block: nn.Module, read: Callable[[], T]) -> T:
        """``read()`` after a block, as the result of its call: hooks on it see what is read, forward and backward."""
        return block(TapeAt(self, 0), *(() if self.token is None else (self.token,)), read=read)

    def carry(self, token: Tensor | None) -> None:
        """Go on from ``token``, which a hook may have put in place of the last one."""
        self.token = self.token if token is None else token

    def carried(self) -> Tensor | None:
        return self.token

    def finish(self) -> None:
        """All couplings have been applied."""
        self.state.overflow.report()

    def leave(self) -> tuple[Tensor, ...]:
        """Hand the streams out as ordinary tensors; the tape keeps them no longer."""
        streams = self.state.decoded() if self.token is None else Leave.apply(self.token, self.state)
        return streams if self.dtype is None else tuple(y.to(self.dtype) for y in streams)

    def exit(self, level: int) -> Tensor:
        """Hand one stream out as an ordinary tensor; the others stay on the tape, for backward alone."""
        if self.token is None:
            return self.state.give(level)[0]
        return Exit.apply(self.token, self.state, level)

    def show(self, level: int) -> Tensor:
        """A copy of a stream's values."""
        return self.state.copy_of(level) if self.token is None else Show.apply(self.token, self.state, level)

    def read(self, level: int, transform: nn.Module, *others: Tensor, stored: bool = False) -> Tensor:
        """``transform(stream, *others)``; the streams stay on the tape.

        Args:
            stored: keep what the transform computes for backward, instead of recomputing it there.
        """
        stream = self.state.read(Part(level))
        branch = self.state.coupler.branch(transform, stream, *others)
        if self.token is None:
            return own(_recomputed(branch, stream, *others), *self.state.streams)
        stored = stored and not self.state.retain
        return Read.apply(self.token, self.state, level, branch, stored, len(others), *others, *branch.parameters())


def recomputed(transform: nn.Module, *inputs: Tensor) -> Tensor:
    """``transform(*inputs)``, keeping the inputs instead of the activations in between."""
    return _recomputed(ModuleBranch(transform), *inputs)


def _recomputed(branch: Branch, *inputs: Values) -> Tensor:
    if not torch.is_grad_enabled():
        return branch.evaluate(*inputs).p
    return Recomputed.apply(branch, len(inputs), *inputs, *branch.parameters())


class Stored:
    """The same couplings with ordinary autograd: every step makes new tensors and keeps what backward needs."""

    def __init__(self, coupler: Coupler, inputs: Sequence[Tensor]) -> None:
        self.coupler = coupler
        self._levels: list[Tensor | list[Tensor]] = list(inputs)  # a level in use by halves is a list of two

    def _get(self, part: Part) -> Tensor:
        level = self._levels[part.level]
        if part.half is None:
            return torch.cat(level, dim=1) if isinstance(level, list) else level
        if not isinstance(level, list):
            level = self._levels[part.level] = list(level.chunk(2, dim=1))
        return level[part.half]

    def step(self, *couplings: Coupling) -> None:
        """As :meth:`Tape.step`."""
        for coupling in couplings:
            self._apply(coupling)

    def _apply(self, coupling: Coupling) -> None:
        target = coupling.target
        inputs = [self._get(source) for source in coupling.sources]
        linear = [self._get(source) for source, _ in coupling.linear]
        y = self.coupler.stored(coupling, None if coupling.creates else self._get(target), inputs, linear)
        if coupling.creates:
            self._levels.append(y.to(self._get(Part(0)).dtype))
        elif target.half is None:
            self._levels[target.level] = y
        else:
            self._levels[target.level][target.half] = y

    def call(self, block: nn.Module, level: int = 0) -> None:
        """As :meth:`Tape.call`."""
        self.carry(block(TapeAt(self, level), self._levels))

    def call_and_read(self, block: nn.Module, read: Callable[[], T]) -> T:
        """As :meth:`Tape.call_and_read`."""
        return block(TapeAt(self, 0), self._levels, read=read)

    def carry(self, levels: Sequence[Tensor | list[Tensor]]) -> None:
        self._levels = list(levels)

    def carried(self) -> list[Tensor | list[Tensor]]:
        return self._levels

    def leave(self) -> tuple[Tensor, ...]:
        return tuple(self._get(Part(i)) for i in range(len(self._levels)))

    def exit(self, level: int) -> Tensor:
        """As :meth:`Tape.exit`."""
        return self._get(Part(level))

    def show(self, level: int) -> Tensor:
        """A stream."""
        return self._get(Part(level))

    def finish(self) -> None:
        """All couplings have been applied."""

    def read(self, level: int, transform: nn.Module, *others: Tensor, stored: bool = False) -> Tensor:
        """As :meth:`Tape.read`."""
        stream = self._get(Part(level))
        if stored or is_traced():
            return self.coupler.apply(transform, stream, *others)
        return _recomputed(self.coupler.branch(transform, stream, *others), stream, *others)


@dataclass(frozen=True)
class TapeAt:
    """A tape as a block sees it whose stream 0 is the tape's stream ``level``."""

    tape: Tape | Stored
    level: int

    def step(self, *couplings: Coupling) -> None:
        self.tape.step(*[coupling.at(self.level) for coupling in couplings])

    def call(self, block: nn.Module, level: int = 0) -> None:
        self.tape.call(block, self.level + level)

    def carry(self, carried: Any) -> None:
        self.tape.carry(carried)

    def carried(self) -> Any:
        return self.tape.carried()


def open_tape(
    root: nn.Module,
    inputs: Sequence[Tensor],
    coupler: Coupler,
    stream: StreamFormat,
    *,
    stored: bool = False,
    retain: bool = False,
    owned: bool = False,
    others: Sequence[Tensor] = (),
) -> Tape:
    """A tape whose streams are ``inputs`` of ``root``, recorded for backward only if something wants a gradient.

    Args:
        others: tensors besides inputs and parameters that may want one.
    """
    gradient_dtype = None
    if stream.name == FIXED16:  # streams and gradients of 16 bits, where branches compute in as many
        gradient_dtype = reduced_dtype(inputs[0]) or torch.float32
    elif stream.name == INT32:
        gradient_dtype = torch.float32
    state = State(coupler, root, stream, stored and not retain, retain, gradient_dtype)
    tape = Tape(state, None if autocast_dtype(inputs[0].device) else reduced_dtype(inputs[0]))
    if torch.is_grad_enabled() and any(t.requires_grad for t in chain(inputs, others, root.parameters())):
        tape.token = Enter.apply(tape.state, owned, *inputs)
    else:
        tape.state.enter(inputs, owned)
    return tape
