"""The tape: owner of the streams of one forward pass, and the autograd nodes that run it backwards.

Activations and their gradients do not travel through autograd. A :class:`State` owns the streams ``y`` and, in
backward, their gradients ``dy``; autograd carries only a 0-dim token from node to node, which puts the nodes in order.
A :class:`Tape` is that state with the last token: what forward writes on. Nodes point to the state alone, so that no
reference cycle keeps the streams alive.
Going backward, each node recomputes its branches, subtracts what they had added (so ``y`` becomes the input of that
coupling again, in the same memory) and accumulates into ``dy`` in place::

    enter --token--> step --token--> ... --token--> leave       ordinary tensors come in at enter and go out at leave,
                                          \\-------> read        or through a function of one level, at read

Parameters are inputs of their node, so ``torch.autograd.grad``, hooks, gradient accumulation and DDP see them as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.anomaly import check_finite
from revbifpn.branch import Branch, Gradient, Pullback, Term
from revbifpn.streams import FIXED16, Encoded, OverflowCounter, StreamFormat, autocast_dtype, has_values, values
from revkernels import reference

_AGAIN = (
    "a second backward through one reversible forward pass: its streams were already inverted in place. "
    "Run the forward again, or sum the losses and call backward once."
)
_AGAIN_STORED = (
    "a second backward through one pass with an exact stream: what it had stored is used up. Run the forward again, or "
    "sum the losses and call backward once, or use stream='float32' with reversible=False."
)


@dataclass(frozen=True)
class Part:
    """A stream, or one channel half of it: the first half has the odd channel."""

    level: int
    half: int | None = None

    def of(self, streams: Sequence[Tensor]) -> Tensor:
        x = streams[self.level]
        return x if self.half is None else x.chunk(2, dim=1)[self.half]


@dataclass(frozen=True)
class Coupling:
    """``target += sum_k up_{f_k}(branch_k(source_k))``; ``creates``: the target starts from zero and is a new level."""

    target: Part
    terms: tuple[tuple[Part, nn.Module], ...]  # (source, transform)
    creates: bool = False

    def __post_init__(self) -> None:
        for source, _ in self.terms:
            if source.level == self.target.level and (
                source.half == self.target.half or None in (source.half, self.target.half)
            ):
                raise ValueError(
                    f"terms: {source} overlaps the target {self.target}; adding F(x) to x itself has no inverse"
                )

    def at(self, level: int) -> Coupling:
        """The same coupling among the streams from ``level`` on."""

        def moved(part: Part) -> Part:
            return replace(part, level=part.level + level)

        terms = tuple((moved(source), transform) for source, transform in self.terms)
        return replace(self, target=moved(self.target), terms=terms)


class Upsampled(nn.Sequential):
    """A transform followed by upsampling: kernels that upsample while they add take the two apart."""

    def __init__(self, transform: nn.Module, factor: int, mode: str) -> None:
        super().__init__(transform, nn.Upsample(scale_factor=factor, mode=mode))
        self.factor, self.mode = factor, mode


@dataclass(frozen=True)
class Lowered:
    """A coupling as a coupler runs it on given inputs: one branch and upsampling factor per term."""

    target: Part
    creates: bool
    sources: tuple[Part, ...]
    branches: tuple[Branch, ...]
    factors: tuple[int, ...]
    mode: str = "bilinear"

    def parameters(self) -> list[Tensor]:
        return [q for branch in self.branches for q in branch.parameters()]

    def split(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Values for :meth:`parameters`, branch by branch."""
        rest = iter(parameters)
        return ([next(rest) for _ in branch.parameters()] for branch in self.branches)


class Coupler:
    """How contributions are added to a stream and taken off again: here in plain PyTorch, upsampling in branches."""

    def lower(self, coupling: Coupling, inputs: Sequence[Tensor]) -> Lowered:
        """Choose the branches that run the coupling's transforms on ``inputs``."""
        sources, transforms = zip(*coupling.terms, strict=True)
        ones = (1,) * len(sources)
        return Lowered(coupling.target, coupling.creates, sources, tuple(map(Branch, transforms)), ones)

    def branch(self, transform: nn.Module, *inputs: Tensor) -> Branch:
        """Choose the branch that runs a transform outside couplings, between the streams and the pyramid."""
        return Branch(transform)

    def apply(self, transform: nn.Module, *inputs: Tensor) -> Tensor:
        """``transform(*inputs)`` as an ordinary differentiable tensor."""
        return transform(*inputs)

    def update_(
        self,
        lowered: Lowered,
        y: Tensor,
        terms: Sequence[Term],
        *,
        subtract: bool,
        fraction_bits: int | None = None,
        overflow: Tensor | None = None,
    ) -> None:
        """``y <- y +/- sum_k up_{f_k}(a_k p_k + b_k)``, on a grid where ``fraction_bits`` says so."""
        for term in terms:
            if term.p.shape != y.shape:
                raise ValueError(
                    f"transform: expected a result of its target's shape {tuple(y.shape)}, got {tuple(term.p.shape)}"
                )
        if fraction_bits is not None:
            p, none, ones = [term.p for term in terms], [None] * len(terms), [1] * len(terms)
            reference.couple_(y, p, none, none, ones, "nearest", subtract, fraction_bits, overflow)
            return
        for term in terms:
            y.sub_(term.p) if subtract else y.add_(term.p)

    def adjoint(self, lowered: Lowered, dy: Tensor, terms: Sequence[Term]) -> list[tuple[Tensor, Tensor | None]]:
        """``up_{f_k}^T(dy)`` and the sums that ``term.center`` asks for, per term."""
        return [(dy, None)] * len(terms)

    def stored(self, lowered: Lowered, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        """``y + sum_k up_{f_k}(F_k(x_k))`` as an ordinary differentiable tensor; ``y = None`` is zero."""
        for branch, x in zip(lowered.branches, inputs, strict=True):
            p = branch.module(x)
            check_finite(branch.module, p)
            y = p if y is None else y + p
        return y


Replay = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[bool]], tuple[Term | None, Pullback]]
"""``replay(parameters, inputs, needs)``: what :meth:`revbifpn.branch.Branch.recompute` gives."""


@dataclass
class State:
    """Streams, gradients and position of one pass. It lives as long as the graph that points to it.

    Attributes:
        stored: keep what branches compute for backward, instead of inverting streams and recomputing.
        gradient_dtype: of the streams' gradients; None for that of the streams.
    """

    coupler: Coupler
    root: nn.Module | None = None  # knows the names of the transforms
    format: StreamFormat = StreamFormat()
    stored: bool = False
    gradient_dtype: torch.dtype | None = None
    streams: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    position: int = 0  # couplings applied and not yet undone
    task: int = -1  # autograd's number of the backward call that the gradients belong to

    def __post_init__(self) -> None:
        self.overflow = OverflowCounter(self.format)
        self.observer: Observer | None = getattr(self.root, "observer", None)
        self.checks = self.format.exact and not self.stored and getattr(self.root, "self_check", False)

    def enter(self, inputs: Sequence[Tensor], owned: bool = False) -> None:
        """Take the inputs as streams: themselves where the caller gave them away, copies or encodings otherwise."""
        for x in inputs:
            self.format.check(x)
        if owned and not self.format.exact:
            self.streams = [x.data for x in inputs]
        else:
            self.streams = [
                self.format.encode(x, level, self.overflow.of(level, x.device)) for level, x in enumerate(inputs)
            ]

    def decoded(self) -> tuple[Tensor, ...]:
        """The streams as ordinary tensors; the state keeps them no longer."""
        streams, self.streams = self.streams, []
        return tuple(values(self.format.decode(y, level)) for level, y in enumerate(streams))

    def read(self, part: Part) -> Tensor | Encoded:
        """The values of a part, as branches take them."""
        return self.format.decode(part.of(self.streams), part.level)

    def lower(self, coupling: Coupling) -> Lowered:
        """The coupling with the branches that fit the streams."""
        return self.coupler.lower(coupling, [self.read(source) for source, _ in coupling.terms])

    def run(
        self, branch: Branch, inputs: Sequence[Tensor], parameters: Sequence[Tensor], *, stored: bool
    ) -> tuple[Term, Replay]:
        """Call a branch once; the replay gives its term and pullback in backward."""
        if stored:
            term, pullback = branch.store(parameters, inputs)
            return term, lambda *_: (term, pullback)
        term, record = branch.forward(*inputs)
        replay = partial(branch.recompute, record)
        if self.checks and has_values(term.p):
            replay = partial(self._verified, branch, _signature(term.p), replay)
        return term, replay

    def _verified(self, branch: Branch, signature: Tensor, replay: Replay, *arguments: Any) -> tuple:
        term, pullback = replay(*arguments)
        if term is not None and not torch.equal(_signature(term.p), signature):
            raise RuntimeError(
                f"{self.name_of(branch)} computed other values in backward than in forward, which a {self.format.name} "
                "stream cannot take: it is undone bit for bit. Usual causes: another number of threads, a "
                "non-deterministic kernel (torch.use_deterministic_algorithms), state outside of buffers, a random "
                "generator of its own, values that are not finite. stream='float32' tolerates small differences"
            )
        return term, pullback

    def name_of(self, branch: Branch) -> str:
        """The name of a branch's transform in the root."""
        names = {id(m): name for name, m in self.root.named_modules()} if self.root is not None else {}
        return names.get(id(branch.module), type(branch.module).__name__)

    def advance(self, lowered: Lowered, parameters: Sequence[Tensor]) -> list[Replay]:
        """``y_t += sum_k up(branch_k(y_k))``; returns how to run the branches again."""
        terms, replays = [], []
        for source, branch, own in zip(lowered.sources, lowered.branches, lowered.split(parameters), strict=True):
            term, replay = self.run(branch, [self.read(source)], own, stored=self.stored)
            terms.append(term)
            replays.append(replay)
        self.add_(lowered, terms)
        return replays

    def _update_(self, lowered: Lowered, terms: Sequence[Term], *, subtract: bool) -> None:
        level, y = lowered.target.level, lowered.target.of(self.streams)
        options = {}
        if self.format.exact:
            overflow = None if subtract else self.overflow.of(level, y.device)
            options = {"fraction_bits": self.format.bits(level), "overflow": overflow}
        self.coupler.update_(lowered, y, terms, subtract=subtract, **options)

    def add_(self, lowered: Lowered, terms: list[Term]) -> None:
        """``y_t += sum_k up(p_k)``, a new stream where the coupling creates it."""
        if lowered.creates:
            if lowered.target.level != len(self.streams):
                raise ValueError(
                    f"streams: stream {lowered.target.level} is created next, which takes as many before it, "
                    f"got {len(self.streams)}"
                )
            self.streams.append(self.streams[0].new_zeros(terms[0].p.shape))  # going down, nothing is upsampled
        if self.observer is not None:
            self.observer.before(self, lowered)
        self._update_(lowered, terms, subtract=False)
        if self.observer is not None:
            self.observer.after(self, lowered)
        self.position += 1

    def undo(self, lowered: Lowered) -> None:
        """``y_t -= sum_k up(branch_k(y_k))`` with the branches as they are now, for ``inverse()``."""
        if not lowered.creates:
            sources = zip(lowered.branches, lowered.sources, strict=True)
            self._update_(lowered, [branch.evaluate(self.read(source)) for branch, source in sources], subtract=True)
        else:
            self.streams.pop()
        self.position -= 1

    def retreat(
        self,
        lowered: Lowered,
        replays: Sequence[Replay],
        parameters: Sequence[Tensor],
        needs_input: bool,
    ) -> list[Tensor | None]:
        """Undo a coupling and pull the gradient through it, in one sweep.

        ``x_t = y_t - sum_k up(p_k)``, ``dp_k = up^T(dy_t)``, ``dy_k += J_k^T dp_k``; returns the parameters' gradients.
        With ``needs_input`` unset nothing before this coupling wants a gradient: ``x`` and ``dx`` are not formed.
        """
        position = self.position
        dy = self.grads[lowered.target.level]
        if dy is None and not needs_input:
            self.release()
            return [None] * len(parameters)
        needs = [needs_input and dy is not None]
        terms, pullbacks = [], []
        for source, replay, own in zip(lowered.sources, replays, lowered.split(parameters), strict=True):
            term, pullback = replay(own, [self.read(source)], needs)
            terms.append(term)
            pullbacks.append(pullback)
        if needs_input and not lowered.creates and not self.stored:
            self._update_(lowered, terms, subtract=True)
            if self.observer is not None:
                self.observer.undone(self, lowered, position - 1)
        gradients: list[Tensor | None] = [None] * len(parameters)
        if dy is not None:
            pulled = self.coupler.adjoint(lowered, lowered.target.of(self.grads), terms)
            terms.clear()  # the last references to p: only the pullbacks' graphs are needed from here on
            gradients = []
            for source in reversed(lowered.sources):
                into = PartGradient(self, source) if needs_input else None
                gradients = pullbacks.pop()(*pulled.pop(), [into]) + gradients
        if not needs_input:
            self.release()
            return gradients
        if lowered.creates:
            self.streams.pop()
            self.grads.pop()
        self.position = position - 1
        return gradients

    def release(self) -> None:
        """Let go of the streams: nothing before this point of the backward wants a gradient."""
        self.streams, self.grads, self.position = [], [], -1
        if self.checks:
            self.root.self_check = False  # a whole step went well

    @contextmanager
    def dropped_on_failure(self) -> Iterator[None]:
        """An exception in backward leaves streams that nothing may use: they go at once, to make room for a retry."""
        try:
            yield
        except BaseException:
            self.streams, self.grads, self.position = [], [], -1
            raise

    def begin(self) -> None:
        """Zero gradients at the start of a backward call: an earlier one may have read a level and stopped there."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.grads = task, [None] * len(self.streams)

    def own_gradient(self, dy: Tensor) -> Tensor:
        """A copy of a stream's gradient."""
        return dy.to(self.gradient_dtype or dy.dtype, memory_format=torch.contiguous_format, copy=True)

    def expect(self, position: int) -> None:
        """Refuse to go on where the streams are not what this node left behind."""
        if self.position != position:
            raise RuntimeError(_AGAIN_STORED if self.stored else _AGAIN)


def _signature(p: Tensor) -> Tensor:
    """The sums of a tensor's bits, per channel: other values have other sums, as good as always."""
    bits = p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])
    return bits.sum((0, *range(2, p.dim())), dtype=torch.int64)


class Observer:
    """Looks at the streams of a pass around every coupling; see :mod:`revbifpn.monitor`."""

    def before(self, state: State, lowered: Lowered) -> None:
        """The coupling is about to be added."""

    def after(self, state: State, lowered: Lowered) -> None:
        """It was."""

    def undone(self, state: State, lowered: Lowered, position: int) -> None:
        """It was taken off again in backward; ``position`` is that of :meth:`before`."""


class PartGradient(Gradient):
    """``dy`` of a part of the tape's streams."""

    def __init__(self, state: State, part: Part) -> None:
        self.state, self.part = state, part
        self.dtype = state.gradient_dtype or state.streams[part.level].dtype

    def tensor(self) -> Tensor:
        grads, level = self.state.grads, self.part.level
        if grads[level] is None:
            stream = self.state.streams[level]
            grads[level] = torch.zeros(stream.shape, dtype=self.dtype, device=stream.device)
        return self.part.of(grads)

    def adopts(self, buffer: Tensor) -> bool:
        level = self.part.level
        whole = self.part.half is None and self.state.grads[level] is None
        return whole and buffer.shape == self.state.streams[level].shape and buffer.dtype == self.dtype

    def adopt(self, buffer: Tensor) -> None:
        self.state.grads[self.part.level] = buffer


class Tape:
    """The streams of one pass while it runs forward, and the end of its chain of autograd nodes."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.token: Tensor | None = None  # None: nothing is recorded

    def step(self, coupling: Coupling) -> None:
        """Apply a coupling to the streams, recorded if the pass is."""
        state = self.state
        lowered = state.lower(coupling)
        if self.token is None:
            sources = zip(lowered.branches, lowered.sources, strict=True)
            state.add_(lowered, [branch(state.read(source)) for branch, source in sources])
        else:
            self.token = _Step.apply(self.token, state, lowered, *lowered.parameters())

    def finish(self) -> None:
        """All couplings have been applied."""
        self.state.overflow.report()

    def leave(self) -> tuple[Tensor, ...]:
        """Hand the streams out as ordinary tensors; the tape keeps them no longer."""
        if self.token is None:
            return self.state.decoded()
        return _Leave.apply(self.token, self.state)

    def read(self, level: int, transform: nn.Module, *others: Tensor, stored: bool = False) -> Tensor:
        """``transform(stream, *others)``; the streams stay on the tape.

        Args:
            stored: keep what the transform computes for backward, instead of recomputing it there.
        """
        stream = self.state.read(Part(level))
        branch = self.state.coupler.branch(transform, stream, *others)
        if self.token is None:
            return _recomputed(branch, stream, *others)
        return _Read.apply(self.token, self.state, level, branch, stored, len(others), *others, *branch.parameters())


def forbid_double_backward() -> None:
    """Raise inside a backward that is being differentiated itself; call it first in ``backward``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through a reversible pass is not supported: its backward recomputes "
            "activations in place. For second derivatives use reversible=False, stream='float32' and plain PyTorch, "
            "not revbifpn.fast."
        )


class _Enter(torch.autograd.Function):
    """Ordinary tensors become the tape's streams; backward hands out their gradients."""

    @staticmethod
    def forward(ctx: Any, state: State, owned: bool, *inputs: Tensor) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        state.enter(inputs, owned)
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_double_backward()
        state = ctx.state
        state.expect(0)
        grads = state.grads
        state.release()
        return None, None, *grads


class _Step(torch.autograd.Function):
    """One coupling; backward is :meth:`State.retreat`."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State, lowered: Lowered, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.lowered = state, lowered
        ctx.replays = state.advance(lowered, parameters)
        ctx.position = state.position
        ctx.save_for_backward(*parameters)
        return token.new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_double_backward()
        ctx.state.expect(ctx.position)
        with ctx.state.dropped_on_failure():
            gradients = ctx.state.retreat(ctx.lowered, ctx.replays, ctx.saved_tensors, ctx.needs_input_grad[0])
        return None, None, None, *gradients


class _Leave(torch.autograd.Function):
    """The streams go out as ordinary tensors. Saving them lets autograd notice an in-place change by their user."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.position = state, state.position
        streams = state.decoded()
        ctx.save_for_backward(*streams)
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        forbid_double_backward()
        state = ctx.state
        state.expect(ctx.position)
        if state.streams:
            raise RuntimeError(_AGAIN)
        # The caller may still hold the outputs, and autograd may share the gradients: the tape works on copies.
        state.enter(ctx.saved_tensors)
        state.grads = [None if g is None else state.own_gradient(g) for g in grads]
        return None, None


class _Read(torch.autograd.Function):
    """``transform(y_level, *others)`` without a graph; backward recomputes it and adds to ``dy_level``."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, state: State, level: int, branch: Branch, stored: bool, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.level, ctx.count, ctx.position = state, level, count, state.position
        others, parameters = tensors[:count], tensors[count:]
        term, ctx.replay = state.run(branch, [state.read(Part(level)), *others], parameters, stored=stored)
        ctx.save_for_backward(*tensors)
        return term.p.detach() if stored else term.p  # the node keeps a stored term: its own output were a cycle

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_double_backward()
        state, count = ctx.state, ctx.count
        state.expect(ctx.position)
        state.begin()
        saved = ctx.saved_tensors
        if dp is None:
            return (None,) * (6 + len(saved))
        others, parameters = saved[:count], saved[count:]
        inputs = [state.read(Part(ctx.level)), *others]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6 : 6 + count]]
        with state.dropped_on_failure():
            _, pullback = ctx.replay(parameters, inputs, needs)
            dothers = [Gradient(x) if need else None for x, need in zip(others, needs[1:], strict=True)]
            into = PartGradient(state, Part(ctx.level)) if needs[0] else None
            dparameters = pullback(dp, None, [into, *dothers])
        return None, None, None, None, None, None, *_values(dothers), *dparameters


class _Recomputed(torch.autograd.Function):
    """``transform(*inputs)`` without a graph, recomputed in backward from its saved inputs."""

    @staticmethod
    def forward(ctx: Any, branch: Branch, count: int, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.branch, ctx.count = branch, count
        term, ctx.record = branch.forward(*tensors[:count])
        ctx.save_for_backward(*tensors)
        return term.p

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_double_backward()
        saved = ctx.saved_tensors
        if dp is None:
            return (None,) * (2 + len(saved))
        inputs, parameters = saved[: ctx.count], saved[ctx.count :]
        needs = ctx.needs_input_grad[2 : 2 + ctx.count]
        _, pullback = ctx.branch.recompute(ctx.record, parameters, inputs, needs)
        dinputs = [Gradient(x) if need else None for x, need in zip(inputs, needs, strict=True)]
        dparameters = pullback(dp, None, dinputs)
        return None, None, *_values(dinputs), *dparameters


def _values(gradients: Sequence[Gradient | None]) -> list[Tensor | None]:
    return [None if g is None else g.value for g in gradients]


def recomputed(transform: nn.Module, *inputs: Tensor) -> Tensor:
    """``transform(*inputs)``, keeping the inputs instead of the activations in between."""
    return _recomputed(Branch(transform), *inputs)


def _recomputed(branch: Branch, *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return branch(*inputs).p
    return _Recomputed.apply(branch, len(inputs), *inputs, *branch.parameters())


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

    def step(self, coupling: Coupling) -> None:
        inputs = [self._get(source) for source, _ in coupling.terms]
        lowered = self.coupler.lower(coupling, inputs)
        y = self.coupler.stored(lowered, None if lowered.creates else self._get(lowered.target), inputs)
        if lowered.creates:
            self._levels.append(y.to(self._get(Part(0)).dtype))
        elif lowered.target.half is None:
            self._levels[lowered.target.level] = y
        else:
            self._levels[lowered.target.level][lowered.target.half] = y

    def leave(self) -> tuple[Tensor, ...]:
        return tuple(self._get(Part(i)) for i in range(len(self._levels)))

    def finish(self) -> None:
        """All couplings have been applied."""

    def read(self, level: int, transform: nn.Module, *others: Tensor, stored: bool = False) -> Tensor:
        """As :meth:`Tape.read`."""
        stream = self._get(Part(level))
        if stored:
            return self.coupler.apply(transform, stream, *others)
        return _recomputed(self.coupler.branch(transform, stream, *others), stream, *others)


@dataclass(frozen=True)
class TapeAt:
    """A tape as a block sees it whose stream 0 is the tape's stream ``level``."""

    tape: Tape | Stored | TapeAt
    level: int

    def step(self, coupling: Coupling) -> None:
        self.tape.step(coupling.at(self.level))


def open_tape(
    root: nn.Module,
    inputs: Sequence[Tensor],
    coupler: Coupler,
    stream: StreamFormat,
    *,
    stored: bool = False,
    owned: bool = False,
) -> Tape:
    """A tape whose streams are ``inputs`` of ``root``, recorded for backward only if something wants a gradient."""
    gradient_dtype = None
    if stream.name == FIXED16:  # streams and gradients of 16 bits, where branches compute in as many
        gradient_dtype = autocast_dtype(inputs[0].device) or torch.float32
    tape = Tape(State(coupler, root, stream, stored, gradient_dtype))
    if torch.is_grad_enabled() and any(t.requires_grad for t in chain(inputs, root.parameters())):
        tape.token = _Enter.apply(tape.state, owned, *inputs)
    else:
        tape.state.enter(inputs, owned)
    return tape
