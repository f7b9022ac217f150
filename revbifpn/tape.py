"""The tape: owner of the streams of one forward pass, and the autograd nodes that run it backwards.

Activations and their gradients do not travel through autograd. A :class:`Tape` owns the streams ``y`` and, in
backward, their gradients ``dy``; autograd carries only a 0-dim token from node to node, which puts the nodes in order.
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

from revbifpn.branch import Branch, Pullback, Term

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


class Upsampled(nn.Sequential):
    """A transform followed by upsampling: kernels that upsample while they add take the two apart."""

    def __init__(self, transform: nn.Module, factor: int, mode: str) -> None:
        super().__init__(transform, nn.Upsample(scale_factor=factor, mode=mode))
        self.factor, self.mode = factor, mode


class Coupler:
    """How contributions are added to a stream and taken off again; this one in plain PyTorch.

    ``split`` takes a transform apart into a branch and the upsampling (factor, mode) left to the coupler.
    """

    def split(self, transform: nn.Module) -> tuple[Branch, int, str]:
        return Branch(transform), 1, "bilinear"

    def update_(self, y: Tensor, terms: Sequence[Term], factors: Sequence[int], mode: str, subtract: bool) -> None:
        """``y <- y +/- sum_k up_{f_k}(a_k p_k + b_k)``."""
        for term in terms:
            y.sub_(term.p) if subtract else y.add_(term.p)

    def adjoint(
        self, dy: Tensor, terms: Sequence[Term], factors: Sequence[int], mode: str
    ) -> list[tuple[Tensor, Tensor | None]]:
        """``up_{f_k}^T(dy)`` and the sums that ``term.center`` asks for, per contribution."""
        return [(dy, None)] * len(terms)

    def sum(self, y: Tensor | None, p: Sequence[Tensor], factors: Sequence[int], mode: str) -> Tensor:
        """``y + sum_k up_{f_k}(p_k)`` as an ordinary differentiable tensor; ``y = None`` is zero."""
        for p_k in p:
            y = p_k if y is None else y + p_k
        return y

    def shape(self, term: Term, factor: int) -> list[int]:
        n, c, h, w = term.p.shape
        return [n, c, h * factor, w * factor]


class _Lowered:
    """A coupling as this coupler runs it: branches, and what is left of their upsampling."""

    def __init__(self, coupling: Coupling, coupler: Coupler) -> None:
        self.target, self.creates = coupling.target, coupling.creates
        self.sources = [source for source, _ in coupling.terms]
        self.branches, self.factors, modes = [], [], set()
        for _, transform in coupling.terms:
            branch, factor, mode = coupler.split(transform)
            self.branches.append(branch)
            self.factors.append(factor)
            modes |= {mode} if factor > 1 else set()
        if len(modes) > 1:
            raise ValueError(f"mode: one coupling upsamples in one mode, got {sorted(modes)}")
        self.mode = modes.pop() if modes else "bilinear"

    def parameters(self) -> list[Tensor]:
        return [q for branch in self.branches for q in branch.parameters()]


@dataclass
class Tape:
    """Streams, gradients and position of one pass. It lives as long as the graph that points to it."""

    coupler: Coupler
    streams: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    token: Tensor | None = None  # autograd's end of the chain while the forward runs; None: nothing is recorded
    position: int = 0  # couplings applied and not yet undone

    # Forward ------------------------------------------------------------------------------------

    def step(self, coupling: Coupling) -> None:
        """Apply a coupling to the streams, recorded if the pass is."""
        lowered = _Lowered(coupling, self.coupler)
        if self.token is None:
            sources = zip(lowered.branches, lowered.sources, strict=True)
            self._add_(lowered, [branch(source.of(self.streams)) for branch, source in sources])
        else:
            self.token = _Step.apply(self.token, self, lowered, *lowered.parameters())

    def advance(self, lowered: _Lowered) -> list[Any]:
        """``y_t += sum_k up(branch_k(y_k))``; returns the branches' records."""
        terms, records = [], []
        for source, branch in zip(lowered.sources, lowered.branches, strict=True):
            term, record = branch.forward(source.of(self.streams))
            terms.append(term)
            records.append(record)
        self._add_(lowered, terms)
        return records

    def _add_(self, lowered: _Lowered, terms: list[Term]) -> None:
        if lowered.creates:
            shape = self.coupler.shape(terms[0], lowered.factors[0])
            self.streams.append(self.streams[0].new_zeros(shape))
        self._update_(lowered, terms, subtract=False)
        self.position += 1

    def _update_(self, lowered: _Lowered, terms: list[Term], *, subtract: bool) -> None:
        self.coupler.update_(lowered.target.of(self.streams), terms, lowered.factors, lowered.mode, subtract)

    def leave(self) -> tuple[Tensor, ...]:
        """Hand the streams out as ordinary tensors; the tape keeps them no longer."""
        if self.token is None:
            streams, self.streams = tuple(self.streams), []
            return streams
        return _Leave.apply(self.token, self)

    def read(self, level: int, transform: nn.Module, *others: Tensor) -> Tensor:
        """``transform(stream, *others)``, recomputed in backward; the streams stay on the tape."""
        if self.token is None:
            return recomputed(transform, self.streams[level], *others)
        branch = Branch(transform)
        return _Read.apply(self.token, self, level, branch, len(others), *others, *branch.parameters())

    # Backward -----------------------------------------------------------------------------------

    def undo(self, lowered: _Lowered) -> None:
        """``y_t -= sum_k up(branch_k(y_k))`` with the branches as they are now, for ``inverse()``."""
        if not lowered.creates:
            terms = [
                branch.evaluate(source.of(self.streams))
                for source, branch in zip(lowered.sources, lowered.branches, strict=True)
            ]
            self._update_(lowered, terms, subtract=True)
        else:
            self.streams.pop()
        self.position -= 1

    def retreat(
        self,
        lowered: _Lowered,
        records: Sequence[Any],
        parameters: Sequence[Tensor],
        needs_input: bool,
    ) -> list[Tensor | None]:
        """Undo a coupling and pull the gradient through it, in one sweep.

        ``x_t = y_t - sum_k up(p_k)``, ``dp_k = up^T(dy_t)``, ``dy_k += J_k^T dp_k``; returns the parameters' gradients.
        With ``needs_input`` unset nothing before this coupling wants a gradient: ``x`` and ``dx`` are not formed.
        """
        dy = self.grads[lowered.target.level]
        if dy is None and not needs_input:
            self.release()
            return [None] * len(parameters)
        terms, pullbacks = self._recompute(lowered, records, parameters, needs_input and dy is not None)
        if needs_input and not lowered.creates:
            self._update_(lowered, terms, subtract=True)
        gradients: list[Tensor | None] = [None] * len(parameters)
        if dy is not None:
            pulled = self.coupler.adjoint(lowered.target.of(self.grads), terms, lowered.factors, lowered.mode)
            terms.clear()  # the last references to p: only the pullbacks' graphs are needed from here on
            gradients = []
            for source in reversed(lowered.sources):
                dxs, dparameters = pullbacks.pop()(*pulled.pop())
                self.accumulate(source, dxs[0])
                gradients = dparameters + gradients
        if needs_input:
            self._drop(lowered)
        else:
            self.release()
        return gradients

    def release(self) -> None:
        """Let go of the streams: nothing before this point of the backward wants a gradient."""
        self.streams, self.grads, self.position = [], [], -1

    def _recompute(
        self, lowered: _Lowered, records: Sequence[Any], parameters: Sequence[Tensor], needs_dx: bool
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

    def _drop(self, lowered: _Lowered) -> None:
        if lowered.creates:
            self.streams.pop()
            self.grads.pop()
        self.position -= 1

    def accumulate(self, part: Part, dx: Tensor | None) -> None:
        """``dy_part += dx``, in place."""
        if dx is None:
            return
        if self.grads[part.level] is None:
            stream = self.streams[part.level]
            self.grads[part.level] = torch.zeros_like(stream, memory_format=torch.contiguous_format)
        part.of(self.grads).add_(dx)

    def expect(self, position: int) -> None:
        """Refuse to go on where the streams are not what this node left behind."""
        if self.position != position:
            raise RuntimeError(_AGAIN)


def forbid_double_backward() -> None:
    """Raise inside a backward that is being differentiated itself; call it first in ``backward``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through a reversible pass is not supported: its backward recomputes "
            "activations in place. Use reversible=False for second derivatives."
        )


class _Enter(torch.autograd.Function):
    """Ordinary tensors become the tape's streams; backward hands out their gradients."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, owned: bool, *inputs: Tensor) -> Tensor:
        ctx.tape = tape
        ctx.set_materialize_grads(False)
        tape.streams = own(inputs, owned)
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_double_backward()
        tape = ctx.tape
        tape.expect(0)
        grads = tape.grads
        tape.release()
        return None, None, *grads


class _Step(torch.autograd.Function):
    """One coupling; backward is :meth:`Tape.retreat`."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tape: Tape, lowered: _Lowered, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.lowered = tape, lowered
        ctx.records = tape.advance(lowered)
        ctx.position = tape.position
        ctx.save_for_backward(*parameters)
        return token.new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_double_backward()
        ctx.tape.expect(ctx.position)
        gradients = ctx.tape.retreat(ctx.lowered, ctx.records, ctx.saved_tensors, ctx.needs_input_grad[0])
        return None, None, None, *gradients


class _Leave(torch.autograd.Function):
    """The streams go out as ordinary tensors. Saving them lets autograd notice an in-place change by their user."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tape: Tape) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.position = tape, tape.position
        streams, tape.streams = tuple(tape.streams), []
        ctx.save_for_backward(*streams)
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        forbid_double_backward()
        tape = ctx.tape
        tape.expect(ctx.position)
        if tape.streams:
            raise RuntimeError(_AGAIN)
        # The caller may still hold the outputs, and autograd may share the gradients: the tape works on copies.
        tape.streams = [y.clone(memory_format=torch.contiguous_format) for y in ctx.saved_tensors]
        tape.grads = [None if g is None else g.clone(memory_format=torch.contiguous_format) for g in grads]
        return None, None


class _Read(torch.autograd.Function):
    """``transform(y_level, *others)`` without a graph; backward recomputes it and adds to ``dy_level``."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, tape: Tape, level: int, branch: Branch, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.level, ctx.branch, ctx.count, ctx.position = tape, level, branch, count, tape.position
        term, ctx.record = branch.forward(tape.streams[level], *tensors[:count])
        ctx.save_for_backward(*tensors)
        return term.p

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_double_backward()
        tape, count = ctx.tape, ctx.count
        tape.expect(ctx.position)
        if ctx.record is None:
            raise RuntimeError(_AGAIN)
        record, ctx.record = ctx.record, None
        if not tape.grads:
            tape.grads = [None] * len(tape.streams)
        if dp is None:
            return (None,) * (5 + len(ctx.saved_tensors))
        others, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        inputs = [tape.streams[ctx.level], *others]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5 : 5 + count]]
        _, pullback = ctx.branch.recompute(record, parameters, inputs, needs)
        (dx, *dothers), dparameters = pullback(dp, None)
        if dx is not None:
            tape.accumulate(Part(ctx.level), dx)
        return None, None, None, None, None, *dothers, *dparameters


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
        if dp is None:
            return (None,) * (2 + len(ctx.saved_tensors))
        inputs, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needs = ctx.needs_input_grad[2 : 2 + ctx.count]
        _, pullback = ctx.branch.recompute(ctx.record, parameters, inputs, needs)
        dinputs, dparameters = pullback(dp, None)
        return None, None, *dinputs, *dparameters


def recomputed(transform: nn.Module, *inputs: Tensor) -> Tensor:
    """``transform(*inputs)``, keeping the inputs instead of the activations in between."""
    branch = Branch(transform)
    if not torch.is_grad_enabled():
        return transform(*inputs)
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
        lowered = _Lowered(coupling, self.coupler)
        p = [
            branch.module(self._get(source)) for source, branch in zip(lowered.sources, lowered.branches, strict=True)
        ]
        y = None if lowered.creates else self._get(lowered.target)
        y = self.coupler.sum(y, p, lowered.factors, lowered.mode)
        if lowered.creates:
            self._levels.append(y.to(self._get(Part(0)).dtype))
        elif lowered.target.half is None:
            self._levels[lowered.target.level] = y
        else:
            self._levels[lowered.target.level][lowered.target.half] = y

    def leave(self) -> tuple[Tensor, ...]:
        return tuple(self._get(Part(i)) for i in range(len(self._levels)))


def open_tape(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], coupler: Coupler, *, owned: bool = False
) -> Tape:
    """A tape whose streams are ``inputs``, recorded for backward only if something wants a gradient."""
    tape = Tape(coupler)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *parameters)):
        tape.token = _Enter.apply(tape, owned, *inputs)
    else:
        tape.streams = own(inputs, owned)
    return tape


__all__ = ["Coupler", "Coupling", "Part", "Stored", "Tape", "Upsampled", "open_tape", "recomputed"]
