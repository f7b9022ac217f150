"""Blocks as one reversible stack: which couplings, and the pass that runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.dual_residual.precision import warn_if_useless
from revbifpn.dual_residual.step import Bound, DualCoupler, refuse_caches
from revbifpn.engine.anomaly import names_of
from revbifpn.engine.coupling import Coupling, Levels, Part
from revbifpn.engine.lowered import Coupler
from revbifpn.engine.state import State
from revbifpn.engine.tape import Stored, Tape, TapeAt, open_tape
from revbifpn.engine.traced import is_traced
from revbifpn.reversible import Reversible
from revbifpn.streams import FIXED32, HALVES, INT32, StreamFormat, reduced_dtype, values
from revkernels.functional import MOST_REMAINDER_BITS

PRETRAINED = (1.0, 0.0)


def stream_of(exact: bool | str | StreamFormat) -> StreamFormat:
    """The format that an ``exact`` argument asks for: True is ``"int32"``."""
    stream = StreamFormat.of((INT32 if exact else None) if isinstance(exact, bool) else exact) or StreamFormat()
    if stream.name == FIXED32:
        raise ValueError("exact: expected True, False, 'int32', 'fixed16' or a StreamFormat of these, got 'fixed32'")
    return stream


def check_coefficients(alpha: float, beta: float, stream: StreamFormat) -> None:
    """Refuse coefficients that have no inverse on streams like these.

    Raises:
        ValueError: one is not finite; beta is 0 and alpha not 1; beta is no ``2^-k`` and the stream exact.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    if stream.exact:
        mantissa, exponent = math.frexp(beta)
        if mantissa != 0.5 or not 0 <= 1 - exponent <= MOST_REMAINDER_BITS:
            raise ValueError(
                f"beta: expected 2^-k with k from 0 to {MOST_REMAINDER_BITS} for an exact stream ({stream.name}): its "
                f"integers are divided by 2^k, got {beta:g}; use exact=False for others"
            )
    elif beta == 0 and alpha != 1:
        raise ValueError(f"beta: expected a number other than 0, which has no inverse, got 0 with alpha = {alpha:g}")


@dataclass(frozen=True)
class DualStreams:
    """The end of a pass, from which it can be inverted.

    Attributes:
        x: ``x_n``, an ordinary tensor.
        previous: ``x_{n-1}``; the paper's ``y_n`` is ``beta previous``.
        remainders: packed bits of the exact stream's divisions, uint8, per block; None where there are none.
    """

    x: Tensor
    previous: Tensor
    _state: State = field(repr=False)
    _couplings: tuple[Coupling, ...] = field(repr=False)
    remainders: tuple[Tensor | None, ...] = ()


class DualResidualSequence(Reversible):
    """Blocks of equal input and output as one dual-residual stack (arXiv 2401.04105).

    ``x_i = B_i(x_{i-1}) + (alpha - 1) x_{i-1} + beta x_{i-2}``, with ``x_{-1} = 0``; the result is
    ``x_n + beta x_{n-1}``, or ``x_n`` with ``add_y=False``.

    Args:
        blocks: modules whose result has their input's shape and dtype, ``[N, ...]``.
        alpha, beta: the coefficients. ``(1, 0)`` is the network of the blocks themselves, bit for bit: not invertible,
            so that training it is refused. They may be set at any time; a pass keeps those that it began with.
        exact: streams of integers, inverted bit for bit: True or ``"int32"``, ``"fixed16"``, or a
            :class:`~revbifpn.StreamFormat` of these with other ``fraction_bits``. ``beta`` is then ``2^-k``.
        add_y: the result is ``x_n + y_n``.
        reversible, retain_graph: see :class:`~revbifpn.reversible.Reversible`.

    Raises:
        ValueError: no blocks; coefficients without an inverse.
        TypeError: a block is no module.

    Example:
        >>> stack = DualResidualSequence(*vit.blocks, alpha=0.5, beta=0.5)
        >>> stack(x).sum().backward()
    """

    coupler: Coupler = DualCoupler()

    def __init__(
        self,
        *blocks: nn.Module,
        alpha: float | None = None,
        beta: float | None = None,
        exact: bool | str | StreamFormat = False,
        add_y: bool = True,
        reversible: bool = True,
        retain_graph: bool = False,
    ) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks: expected at least one module, got none")
        for i, block in enumerate(blocks):
            if not isinstance(block, nn.Module):
                raise TypeError(f"blocks[{i}]: expected a module, got {type(block).__name__}")
            self.add_module(str(i), block)
        self.labels = tuple(self._modules)
        self.stream, self.add_y, self.reversible, self.retain_graph = stream_of(exact), add_y, reversible, retain_graph
        self.calls: tuple[Callable[..., Any], ...] = (_call,) * len(blocks)
        default = (1 - 2.0**-7, 2.0**-7) if self._format.exact else PRETRAINED
        self.set(default[0] if alpha is None else alpha, default[1] if beta is None else beta)

    @property
    def _format(self) -> StreamFormat:
        return self.stream or StreamFormat()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._modules.values())  # type: ignore[arg-type]

    @property
    def alpha(self) -> float:
        return self._coefficients[0]

    @property
    def beta(self) -> float:
        return self._coefficients[1]

    def set(self, alpha: float, beta: float) -> None:
        """Other coefficients, for passes that begin from now on.

        Raises:
            ValueError: as :func:`check_coefficients`.
        """
        alpha, beta = float(alpha), float(beta)
        check_coefficients(alpha, beta, self._format)
        self._coefficients = alpha, beta

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}, stream={self._format.name}"

    @property
    def is_pretrained(self) -> bool:
        """Whether the coefficients are those of the network itself."""
        return self._coefficients == PRETRAINED

    def check_trainable(self) -> None:
        """Refuse to train at ``(1, 0)``.

        Raises:
            RuntimeError: gradients are on, a block is in train mode, and nothing stores activations.
        """
        if self.is_pretrained and self.reversible and torch.is_grad_enabled() and not is_traced():
            if any(block.training for block in self.blocks):
                raise RuntimeError(
                    f"alpha = 1, beta = 0 is the pretrained network, which has no inverse to train it reversibly with "
                    f"(blocks {self.labels[0]} to {self.labels[-1]}): set other coefficients (a Schedule, or "
                    "set_coefficients(model, 0.5, 0.5)), or call model.eval(), or revert(model)"
                )

    def coupling(self, i: int, transform: nn.Module | None = None, coefficients: tuple | None = None) -> Coupling:
        """The coupling of block i; with ``i = len(blocks)`` that which adds ``y_n``."""
        alpha, beta = coefficients or self._coefficients
        source, target = Part(i % 2), Part(1 - i % 2)
        if i == len(self.labels):
            return Coupling(source, linear=((target, beta),))
        if transform is None:
            transform = Bound(self.blocks[i], self.labels[i], call=self.calls[i])
        terms, linear = ((source, transform),), ((source, alpha - 1),)
        return Coupling(target, terms, creates=i == 0, linear=linear, scale=1.0 if i == 0 else beta)

    def couplings(self) -> Iterator[Coupling]:
        for i in range(len(self.labels) + self.add_y):
            yield self.coupling(i)

    def begin(self, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Pass:
        """A pass from x; the arguments are those of its blocks, which may want gradients."""
        return Pass(self, x, [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)])

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The stack of x.

        Args:
            x: ``[N, ...]``, float.
            args, kwargs: passed on to every block.

        Returns:
            A tensor like x.
        """
        if isinstance(x, (Tape, Stored, TapeAt)):
            return super().forward(x, *args, **kwargs)
        with names_of(self):
            if self.is_pretrained:
                self.check_trainable()
                for call, block in zip(self.calls, self.blocks, strict=True):
                    x = _first(call(block, x, *args, **kwargs))
                return x
            run = self.begin(x, args, kwargs)
            for _ in self.labels:
                run.step(args, kwargs)
            return run.end()

    @torch.no_grad()
    def forward_streams(self, x: Tensor, *args: Any, **kwargs: Any) -> DualStreams:
        """``x_n`` and ``x_{n-1}``, and the bits that :meth:`inverse` needs of an exact stream. Not differentiable."""
        state = State(self.coupler, self, self._format)
        state.enter([x])
        couplings, remainders = [], []
        for i in range(len(self.labels)):
            coupling = self.coupling(i, Bound(self.blocks[i], self.labels[i], args, kwargs, self.calls[i]))
            lowered = state.lower(coupling)
            sources = zip(lowered.branches, lowered.sources, strict=True)
            remainders.append(state.add(lowered, [b.evaluate(state.read(s)) for b, s in sources], undone=True))
            couplings.append(coupling)
        state.overflow.report()
        last = len(self.labels) % 2
        x, previous = (values(state.copy_of(level)) for level in (last, 1 - last))
        return DualStreams(x, previous, state, tuple(couplings), tuple(remainders))

    @torch.no_grad()
    def inverse(self, *streams: Any) -> Tensor:
        """The input, from a :class:`DualStreams`; or, with float streams, from ``(x_n, x_{n-1})``.

        Blocks are evaluated as they are now, which with random layers in train mode is another function: use
        ``eval()``. (Backward replays random numbers and is not affected.)

        Raises:
            TypeError: two tensors with an exact stream, whose inverse needs the remainders.
        """
        if len(streams) == 1 and isinstance(streams[0], DualStreams):
            end = streams[0]
            state = State(self.coupler, self, end._state.format)
            state.streams = Levels([y.clone() for y in end._state.streams])
            state.position = end._state.position
            steps = list(zip(end._couplings, end.remainders, strict=True))
        else:
            if self._format.exact or len(streams) != 2:
                raise TypeError(
                    "streams: expected what forward_streams returned, which has the remainders of an exact stream, or "
                    f"x_n and x_{{n-1}} of a float one, got {len(streams)} argument(s) and stream {self._format.name}"
                )
            state = State(self.coupler, self, self._format)
            state.enter(streams if len(self.labels) % 2 == 0 else streams[::-1])
            steps = [(self.coupling(i), None) for i in range(len(self.labels))]
        for coupling, remainder in reversed(steps):
            state.undo(state.lower(coupling), remainder)
        return state.decoded()[0]


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


class Pass:
    """One forward pass of a stack, block by block, with the coefficients that it began with.

    Args:
        stack: whose blocks run.
        x: enters.
        others: further arguments of the blocks, which may want a gradient.
    """

    def __init__(self, stack: DualResidualSequence, x: Tensor, others: Sequence[Tensor] = ()) -> None:
        self.stack, self.coefficients, self.position = stack, stack._coefficients, 0
        self.half = x.dtype if x.dtype in HALVES else None
        if self.half is not None:  # streams hold more
            x = x.float()
        self.tape = self._open(x, others)

    def _open(self, x: Tensor, others: Sequence[Tensor]) -> Tape | Stored:
        stack, stream = self.stack, self.stack._format
        if is_traced() or (torch.is_grad_enabled() and not stack.reversible and not stream.exact):
            return Stored(stack.coupler, [x])
        stored, retain = not stack.reversible, stack.retain_graph
        if not stream.exact and torch.is_grad_enabled():
            name, dtype = f"{stack.labels[0]} .. {stack.labels[-1]}", reduced_dtype(x) or x.dtype
            warn_if_useless(*self.coefficients, len(stack.labels), dtype, name)
        return open_tape(stack, [x], stack.coupler, stream, stored=stored, retain=retain, others=others)

    def step(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Bound:
        """Run the next block; returns it as it was called."""
        i, stack = self.position, self.stack
        if isinstance(self.tape, Tape) and self.tape.token is not None and not self.tape.state.stored:
            refuse_caches(stack.labels[i], (*args, *(kwargs or {}).values()))
        check = stack.self_check and not stack._format.exact
        bound = Bound(stack.blocks[i], stack.labels[i], args, kwargs, stack.calls[i], check=check)
        self.tape.step(stack.coupling(i, bound, self.coefficients))
        self.position += 1
        return bound

    def show(self) -> Tensor:
        """``x_i`` after i blocks."""
        return self._as_entered(self.tape.show(self.position % 2))

    def end(self) -> Tensor:
        """The result, after the last block."""
        if self.stack.add_y:
            self.tape.step(self.stack.coupling(self.position, None, self.coefficients))
        self.tape.finish()
        if isinstance(self.tape, Tape) and self.tape.token is not None and not self.stack._format.exact:
            self.stack.self_check = False  # a whole forward went well
        return self._as_entered(self.tape.exit(self.position % 2))

    def _as_entered(self, x: Tensor) -> Tensor:
        return x if self.half is None else x.to(self.half)
