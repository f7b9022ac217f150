"""The autograd nodes of a pass. Activations and their gradients do not travel through autograd.

A :class:`~revbifpn.engine.state.State` owns the streams ``y`` and, in backward, their gradients ``dy``; autograd
carries only a 0-dim token from node to node, which puts the nodes in order. Going backward, each node recomputes its
branches, subtracts what they had added (so ``y`` becomes the input of that coupling again, in the same memory) and
accumulates into ``dy`` in place::

    enter --token--> step --token--> ... --token--> leave       ordinary tensors come in at enter and go out at leave,
                                          \\-------> read        or through a function of one level, at read

Parameters are inputs of their node, so ``torch.autograd.grad``, hooks, gradient accumulation and DDP see them as usual.
Nodes point to the state alone, so that no reference cycle keeps the streams alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from revbifpn.engine import ownership
from revbifpn.engine.branch import Branch, Gradient
from revbifpn.engine.coupling import Part
from revbifpn.engine.lowered import Lowered, split
from revbifpn.engine.record import Backends
from revbifpn.engine.state import PartGradient, State
from revbifpn.streams import Values
from revkernels.functional import forbid_double_backward


def forbid_second_derivative() -> None:
    """Raise inside a backward that is being differentiated itself; nodes call it first in ``backward``."""
    forbid_double_backward(
        "a reversible pass",
        "as its backward recomputes activations in place. For second derivatives build the model from plain PyTorch "
        "(revbifpn, not revbifpn.fast) with reversible=False, stream='float32' and se_sig_act=torch.nn.Sigmoid",
    )


class Enter(torch.autograd.Function):
    """Ordinary tensors become the pass's streams; backward hands out their gradients."""

    @staticmethod
    def forward(ctx: Any, state: State, owned: bool, *inputs: Tensor) -> Tensor:
        ctx.state = state
        ctx.set_materialize_grads(False)
        state.enter(inputs, owned)
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_second_derivative()
        state = ctx.state
        state.expect(0)
        grads = state.grads
        state.release()
        return None, None, *grads


class Step(torch.autograd.Function):
    """Couplings, one after another: forward is :meth:`State.advance`, backward :meth:`State.retreat`."""

    @classmethod
    def record(cls, *arguments: Any) -> Tensor:
        """``apply`` without the look at every argument that torch.func needs: Enter's has asked for it."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State, couplings: Sequence[Lowered], *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.couplings = state, couplings
        parts = zip(couplings, split(parameters, couplings), strict=True)
        ctx.advanced = [state.advance(lowered, part) for lowered, part in parts]
        ctx.position = state.position
        ctx.save_for_backward(*parameters)
        return token.new_empty(())

    @staticmethod
    def backward(ctx: Any, token: None) -> tuple:
        forbid_second_derivative()
        state, needs, saved = ctx.state, ctx.needs_input_grad, ctx.saved_tensors
        state.expect(ctx.position)
        gradients: list[Tensor | None] = [None] * len(saved)
        end = len(saved)
        with state.going_back():
            for lowered, advanced in zip(reversed(ctx.couplings), reversed(ctx.advanced), strict=True):
                start = end - len(lowered.parameters())
                needs_input = any(needs[: 3 + start])  # something before this coupling wants a gradient
                gradients[start:end] = state.retreat(lowered, advanced, saved[start:end], needs_input)
                if not needs_input:
                    break
                end = start
        return None, None, None, *gradients


class Leave(torch.autograd.Function):
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
        forbid_second_derivative()
        # The caller may still hold the outputs, and autograd may share the gradients: the pass works on copies.
        ctx.state.reenter(ctx.position, ctx.saved_tensors, grads)
        return None, None


class Exit(torch.autograd.Function):
    """One stream goes out as an ordinary tensor, which backward takes it back from; the others stay with the pass."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State, level: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.level, ctx.position = state, level, state.position
        y, ctx.rest = state.give(level)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        forbid_second_derivative()
        (y,) = ctx.saved_tensors
        ctx.state.take_back(ctx.position, ctx.level, y, ctx.rest, dy)
        return None, None, None


class Show(torch.autograd.Function):
    """A copy of a stream's values; the gradient of the copy is one of the stream."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, state: State, level: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.level, ctx.position = state, level, state.position
        return state.copy_of(level)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple:
        forbid_second_derivative()
        if dy is not None:
            ctx.state.begin(ctx.position)
            PartGradient(ctx.state, Part(ctx.level)).tensor().add_(dy)
        return None, None, None


class Read(torch.autograd.Function):
    """``transform(y_level, *others)`` without a graph; backward recomputes it and adds to ``dy_level``."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, state: State, level: int, branch: Branch, stored: bool, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state, ctx.level, ctx.count, ctx.position = state, level, count, state.position
        ownership.prepare()
        others, parameters = tensors[:count], tensors[count:]
        inputs = [state.read(Part(level)), *others]
        contribution, ctx.call = state.call(branch, inputs, parameters, stored=stored)
        ctx.save_for_backward(*tensors)
        # A stored contribution belongs to the node, whose own output it must not be: that were a cycle.
        return own(contribution.p.detach() if stored else contribution.p, *state.streams, *tensors)

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_second_derivative()
        state, count = ctx.state, ctx.count
        state.begin(ctx.position)
        saved = ctx.saved_tensors
        if dp is None:
            return (None,) * (6 + len(saved))
        spare = ownership.is_own(dp)
        others, parameters = saved[:count], saved[count:]
        inputs = [state.read(Part(ctx.level)), *others]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6 : 6 + count]]
        with state.going_back():
            _, pullback = state.replay(ctx.call, parameters, inputs, needs)
            dothers = [Gradient(x) if need else None for x, need in zip(others, needs[1:], strict=True)]
            into = PartGradient(state, Part(ctx.level)) if needs[0] else None
            dparameters = pullback(dp, None, [into, *dothers], spare=spare)
        return None, None, None, None, None, None, *_values(dothers), *dparameters


@runtime_checkable
class Repeats(Protocol):
    """A branch that can compute its contribution again without a graph."""

    def repeat(self, record: Any, parameters: Sequence[Tensor], inputs: Sequence[Values]) -> Tensor:
        """The contribution as new memory, from the record of :meth:`Branch.record`."""


def repetition(y: Tensor) -> Callable[[], Tensor] | None:
    """What computes ``y`` once more, in a backward before it reaches y: a consumer need not save y then.

    Returns:
        None where y was not read from a tape, or its branch cannot.
    """
    node: Any = y.grad_fn
    cls: Any = Read
    if not isinstance(node, cls._backward_cls) or node.call.kept or not isinstance(node.call.branch, Repeats):
        return None

    def again() -> Tensor:
        state, saved = node.state, node.saved_tensors
        state.begin(node.position)
        inputs = [state.read(Part(node.level)), *saved[: node.count]]
        with state.going_back():
            return node.call.branch.repeat(node.call.record, saved[node.count :], inputs)

    return again


class Recomputed(torch.autograd.Function):
    """``transform(*inputs)`` without a graph, recomputed in backward from its saved inputs."""

    @staticmethod
    def forward(ctx: Any, branch: Branch, count: int, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.branch, ctx.count, ctx.backends = branch, count, Backends.current()
        contribution, ctx.record = branch.record(*tensors[:count])
        ctx.save_for_backward(*tensors)
        return own(contribution.p, *tensors)

    @staticmethod
    def backward(ctx: Any, dp: Tensor | None) -> tuple:
        forbid_second_derivative()
        saved = ctx.saved_tensors
        if dp is None:
            return (None,) * (2 + len(saved))
        inputs, parameters = saved[: ctx.count], saved[ctx.count :]
        needs = ctx.needs_input_grad[2 : 2 + ctx.count]
        with ctx.backends.restore():
            _, pullback = ctx.branch.recompute(ctx.record, parameters, inputs, needs)
            dinputs = [Gradient(x) if need else None for x, need in zip(inputs, needs, strict=True)]
            dparameters = pullback(dp, None, dinputs)
        return None, None, *_values(dinputs), *dparameters


def _values(gradients: Sequence[Gradient | None]) -> list[Tensor | None]:
    return [None if g is None else g.value for g in gradients]


def own(p: Tensor, *held: Tensor) -> Tensor:
    """p, or a copy where it shares memory with a tensor that somebody else holds: a transform may return its input."""
    return p.clone() if any(torch._C._is_alias_of(p, t) for t in held) else p  # type: ignore[attr-defined]
