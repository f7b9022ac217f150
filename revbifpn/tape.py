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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.branch import Branch, Gradient, Pullback, Term

_AGAIN = (
    "a second backward through one reversible forward pass: its streams were already inverted in place. "
    "Run the forward again, or sum the losses and call backward once."
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

    def update_(self, lowered: Lowered, y: Tensor, terms: Sequence[Term], *, subtract: bool) -> None:
        """``y <- y +/- sum_k up_{f_k}(a_k p_k + b_k)``."""
        for term in terms:
            if term.p.shape != y.shape:
                raise ValueError(
                    f"transform: expected a result of its target's shape {tuple(y.shape)}, got {tuple(term.p.shape)}"
                )
            y.sub_(term.p) if subtract else y.add_(term.p)

    def adjoint(self, lowered: Lowered, dy: Tensor, terms: Sequence[Term]) -> list[tuple[Tensor, Tensor | None]]:
        """``up_{f_k}^T(dy)`` and the sums that ``term.center`` asks for, per term."""
        return [(dy, None)] * len(terms)

    def stored(self, lowered: Lowered, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        """``y + sum_k up_{f_k}(F_k(x_k))`` as an ordinary differentiable tensor; ``y = None`` is zero."""
        for branch, x in zip(lowered.branches, inputs, strict=True):
            p = branch.module(x)
            y = p if y is None else y + p
        return y


@dataclass
class State:
    """Streams, gradients and position of one pass. It lives as long as the graph that points to it."""

    coupler: Coupler
    root: nn.Module | None = None  # knows the names of the transforms
    streams: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    position: int = 0  # couplings applied and not yet undone
    task: int = -1  # autograd's number of the backward call that the gradients belong to

    def lower(self, coupling: Coupling) -> Lowered:
        """The coupling with the branches that fit the streams."""
        return self.coupler.lower(coupling, [source.of(self.streams) for source, _ in coupling.terms])

    def advance(self, lowered: Lowered) -> list[Any]:
        """``y_t += sum_k up(branch_k(y_k))``; returns the branches' records."""
        terms, records = [], []
        for source, branch in zip(lowered.sources, lowered.branches, strict=True):
            term, record = branch.forward(source.of(self.streams))
            terms.append(term)
            records.append(record)
        if torch.is_anomaly_enabled():
            self.check_finite(lowered, terms)
        self.add_(lowered, terms)
        return records

    def check_finite(self, lowered: Lowered, terms: list[Term]) -> None:
        """In anomaly mode, name the transform whose result is not finite."""
        names = {id(m): name for name, m in self.root.named_modules()} if self.root is not None else {}
        for branch, term in zip(lowered.branches, terms, strict=True):
            if not all(t is None or t.isfinite().all() for t in (term.p, term.scale, term.shift)):
                name = names.get(id(branch.module), type(branch.module).__name__)
                raise RuntimeError(f"{name} computed values that are not finite in the forward pass")

    def add_(self, lowered: Lowered, terms: list[Term]) -> None:
        """``y_t += sum_k up(p_k)``, a new stream where the coupling creates it."""
        if lowered.creates:
            if lowered.target.level != len(self.streams):
                raise ValueError(
                    f"streams: stream {lowered.target.level} is created next, which takes as many before it, "
                    f"got {len(self.streams)}"
                )
            self.streams.append(self.streams[0].new_zeros(terms[0].p.shape))  # going down, nothing is upsampled
        self.coupler.update_(lowered, lowered.target.of(self.streams), terms, subtract=False)
        self.position += 1

    def undo(self, lowered: Lowered) -> None:
        """``y_t -= sum_k up(branch_k(y_k))`` with the branches as they are now, for ``inverse()``."""
        if not lowered.creates:
            terms = [
                branch.evaluate(source.of(self.streams))
                for source, branch in zip(lowered.sources, lowered.branches, strict=True)
            ]
            self.coupler.update_(lowered, lowered.target.of(self.streams), terms, subtract=True)
        else:
            self.streams.pop()
        self.position -= 1

    def retreat(
        self,
        lowered: Lowered,
        records: Sequence[Any],
        parameters: Sequence[Tensor],
        needs_input: bool,
    ) -> list[Tensor | None]:
        """Undo a coupling and pull the gradient through it, in one sweep.

        ``x_t = y_t - sum_k up(p_k)``, ``dp_k = up^T(dy_t)``, ``dy_k += J_k^T dp_k``; returns the parameters' gradients.
        With ``needs_input`` unset nothing before this coupling wants a gradient: ``x`` and ``dx`` are not formed.
        """
        position, self.position = self.position, -1  # an exception on the way leaves streams that nothing may use
        dy = self.grads[lowered.target.level]
        if dy is None and not needs_input:
            self.release()
            return [None] * len(parameters)
        terms, pullbacks = self._recompute(lowered, records, parameters, needs_input and dy is not None)
        if needs_input and not lowered.creates:
            self.coupler.update_(lowered, lowered.target.of(self.streams), terms, subtract=True)
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

    def _recompute(
        self, lowered: Lowered, records: Sequence[Any], parameters: Sequence[Tensor], needs_dx: bool
    ) -> tuple[list[Term], list[Pullback]]:
        terms, pullbacks = [], []
        parameters = list(parameters)
        for source, branch, record in zip(lowered.sources, lowered.branches, records, strict=True):
            count = len(branch.parameters())
            own, parameters = parameters[:count], parameters[count:]
            term, pullback = branch.recompute(record, own, [source.of(self.streams)], [needs_dx])
            terms.append(term)
            pullbacks.append(pullback)
        return terms, pullbacks

    def begin(self) -> None:
        """Zero gradients at the start of a backward call: an earlier one may have read a level and stopped there."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.grads = task, [None] * len(self.streams)

    def expect(self, position: int) -> None:
        """Refuse to go on where the streams are not what this node left behind."""
        if self.position != position:
            raise RuntimeError(_AGAIN)


class PartGradient(Gradient):
    """``dy`` of a part of the tape's streams."""

    def __init__(self, state: State, part: Part) -> None:
        self.state, self.part = state, part

    def tensor(self) -> Tensor:
        grads, level = self.state.grads, self.part.level
        if grads[level] is None:
            grads[level] = torch.zeros_like(self.state.streams[level], memory_format=torch.contiguous_format)
        return self.part.of(grads)

    def adopts(self, buffer: Tensor) -> bool:
        level = self.part.level
        stream = self.state.streams[level]
        whole = self.part.half is None and self.state.grads[level] is None
        return whole and buffer.shape == stream.shape and buffer.dtype == stream.dtype

    def adopt(self, buffer: Tensor) -> None:
        self.state.grads[self.part.level] = buffer


class Tape:
    """The streams of one pass while it runs forward, and the end of its chain of autograd nodes."""

    def __init__(self, coupler: Coupler, root: nn.Module | None = None) -> None:
        self.coupler = coupler
        self.state = State(coupler, root)
        self.token: Tensor | None = None  # None: nothing is recorded

    def step(self, coupling: Coupling) -> None:
        """Apply a coupling to the streams, recorded if the pass is."""
        lowered = self.state.lower(coupling)
        if self.token is None:
            sources = zip(lowered.branches, lowered.sources, strict=True)
            self.state.add_(lowered, [branch(source.of(self.state.streams)) for branch, source in sources])
        else:
            self.token = _Step.apply(self.token, self.state, lowered, *lowered.parameters())

    def leave(self) -> tuple[Tensor, ...]:
        """Hand the streams out as ordinary tensors; the tape keeps them no longer."""
        if self.token is None:
            streams, self.state.streams = tuple(self.state.streams), []
            return streams
        return _Leave.apply(self.token, self.state)

    def read(self, level: int, transform: nn.Module, *others: Tensor) -> Tensor:
        """``transform(stream, *others)``, recomputed in backward; the streams stay on the tape."""
        stream = self.state.streams[level]
        branch = self.coupler.branch(transform, stream, *others)
        if self.token is None:
            return _recomputed(branch, stream, *others)
        return _Read.apply(self.token, self.state, level, branch, len(others), *others, *branch.parameters())


def forbid_double_backward() -> None:
    """Raise inside a backward that is being differentiated itself; call it first in ``backward``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through a reversible pass is not supported: its backward recomputes "
            "activations in place. For second derivatives use reversible=False and plain PyTorch (not revbifpn.fast)."
        )


class _Enter(torch.autograd.Function):
    """Ordinary tensors become the tape's streams; backward hands out their gradients."""

    @staticmethod
    def forward(ctx: Any, state: State, owned: bool, *inputs: Tensor) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        state.streams = own(inputs, owned)
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
        ctx.records = state.advance(lowered)
        ctx.position = state.position
        ctx.save_for_backward(*parameters)
        return token.new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_double_backward()
        ctx.state.expect(ctx.position)
        gradients = ctx.state.retreat(ctx.lowered, ctx.records, ctx.saved_tensors, ctx.needs_input_grad[0])
        return None, None, None, *gradients


class _Leave(torch.autograd.Function):
    """The streams go out as ordinary tensors. Saving them lets autograd notice an in-place change by their user."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.position = state, state.position
        streams, state.streams = tuple(state.streams), []
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
        state.streams = [y.clone(memory_format=torch.contiguous_format) for y in ctx.saved_tensors]
        state.grads = [None if g is None else g.clone(memory_format=torch.contiguous_format) for g in grads]
        return None, None


class _Read(torch.autograd.Function):
    """``transform(y_level, *others)`` without a graph; backward recomputes it and adds to ``dy_level``."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, state: State, level: int, branch: Branch, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.level, ctx.branch, ctx.count, ctx.position = state, level, branch, count, state.position
        term, ctx.record = branch.forward(state.streams[level], *tensors[:count])
        ctx.save_for_backward(*tensors)
        return term.p

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_double_backward()
        state, count = ctx.state, ctx.count
        state.expect(ctx.position)
        state.begin()
        saved = ctx.saved_tensors
        if dp is None:
            return (None,) * (5 + len(saved))
        others, parameters = saved[:count], saved[count:]
        inputs = [state.streams[ctx.level], *others]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5 : 5 + count]]
        _, pullback = ctx.branch.recompute(ctx.record, parameters, inputs, needs)
        dothers = [Gradient(x) if need else None for x, need in zip(others, needs[1:], strict=True)]
        into = PartGradient(state, Part(ctx.level)) if needs[0] else None
        dparameters = pullback(dp, None, [into, *dothers])
        return None, None, None, None, None, *_values(dothers), *dparameters


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


def own(inputs: Sequence[Tensor], owned: bool) -> list[Tensor]:
    """The tape's own streams: the inputs themselves where the caller gave them away, copies otherwise."""
    return [x.data if owned else x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]


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

    def read(self, level: int, transform: nn.Module, *others: Tensor) -> Tensor:
        """``transform(stream, *others)``, recomputed in backward."""
        stream = self._get(Part(level))
        return _recomputed(self.coupler.branch(transform, stream, *others), stream, *others)


def open_tape(root: nn.Module, inputs: Sequence[Tensor], coupler: Coupler, *, owned: bool = False) -> Tape:
    """A tape whose streams are ``inputs`` of ``root``, recorded for backward only if something wants a gradient."""
    tape = Tape(coupler, root)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *root.parameters())):
        tape.token = _Enter.apply(tape.state, owned, *inputs)
    else:
        tape.state.streams = own(inputs, owned)
    return tape


__all__ = ["Coupler", "Coupling", "Lowered", "Part", "State", "Stored", "Tape", "Upsampled", "open_tape", "recomputed"]
