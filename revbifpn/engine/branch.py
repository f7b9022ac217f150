"""A branch: a transform as a coupling runs it, forward once without a graph and once more, with one, in backward."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy

from revbifpn.engine.anomaly import check_finite, label
from revbifpn.engine.coupling import Upsampled
from revbifpn.engine.record import (
    Record,
    Recorder,
    Replay,
    changed_input,
    flags,
    recomputing,
    uncached_parametrizations,
)
from revbifpn.streams import HALVES, Values, autocast_dtype, values

_M = TypeVar("_M", bound=nn.Module)


class Contribution(NamedTuple):
    """What a branch adds to a stream: ``scale * p + shift`` (``[C]`` or ``[N, C]`` each), upsampled by the coupling.

    ``center [C]`` asks the coupling's adjoint for the sums that the branch's pullback needs, if it has them in passing.
    """

    p: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    center: Tensor | None = None


class Gradient:
    """The gradient of an input so far: a sum to be added to, made when its first addend comes."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The sum, to be added to in place."""
        if self.value is None:
            self.value = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        return self.value

    def add(self, x: Tensor) -> None:
        """Add x, which the caller does not use any more."""
        self.tensor().add_(x)

    def adopts(self, buffer: Tensor) -> bool:
        """Whether nothing was added yet and :meth:`adopt` would take ``buffer``."""
        return self.value is None and buffer.shape == self.like.shape and buffer.dtype == self.like.dtype

    def adopt(self, buffer: Tensor) -> None:
        """Take over a tensor that nobody else keeps as the sum's first addend."""
        self.value = buffer


class Held(Gradient):
    """The gradient of an input as it was found, to be read: its only addend may share memory with others."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self.value = x if self.value is None else self.value + x


class Pullback(Protocol):
    """The vector-Jacobian product of one call of a branch; good for one use."""

    def __call__(
        self, du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None], *, spare: bool = False
    ) -> Sequence[Tensor | None]:
        """Add the inputs' gradients to ``into`` and return the parameters'.

        Args:
            du: gradient of the contribution, after the adjoint of upsampling.
            sums: what the contribution's ``center`` asked for; None: the pullback takes them by itself.
            into: the gradient of every input; None where it is not wanted.
            spare: du may be written over.

        Returns:
            One gradient per parameter, in the order of :meth:`Branch.parameters`; None for one that wants none.
        """


class Branch(Protocol):
    """What a coupling runs for one of its terms. One is made per coupling and pass.

    The contract: :meth:`record` and then :meth:`recompute`, on the same inputs and parameters, compute the same
    function; with an exact stream they give the same bits. Only ``record``, and ``evaluate(update=True)``, leave a
    trace: running statistics move once.
    """

    @property
    def module(self) -> nn.Module:
        """The transform."""

    def parameters(self) -> list[Tensor]:
        """The tensors that its pullback gives gradients of."""

    def evaluate(self, *inputs: Values, update: bool = True) -> Contribution:
        """Call the module as it is now; nothing is recorded. ``update``: buffers change as in any call."""

    def record(self, *inputs: Values) -> tuple[Contribution, Any]:
        """The contribution, and what :meth:`recompute` needs besides inputs and parameters."""

    def recompute(
        self, record: Any, parameters: Sequence[Tensor], inputs: Sequence[Values], needs: Sequence[bool]
    ) -> tuple[Contribution | None, Pullback]:
        """The contribution again (None: a caller never needs it) and its pullback.

        Args:
            record: of the forward call.
            parameters: the values used there, in the order of :meth:`parameters`.
            inputs: the values used there; the pullback keeps references to them, not copies.
            needs: which of the inputs a gradient is wanted for.
        """

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Values]) -> tuple[Contribution, Pullback]:
        """:meth:`record` and :meth:`recompute` at once: the pullback keeps what it needs since forward."""


# Modules whose kernels are the same with and without gradients, and which do all their work when they are called.
_INDIFFERENT: set[type[nn.Module]] = {
    *(nn.Sequential, Upsampled, nn.Identity, nn.Linear, nn.Flatten, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d),
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
    *(nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
}


def indifferent_to_gradients(cls: type[_M]) -> type[_M]:
    """Declare of a module class that its forward does what is the same with and without gradients, and at once.

    The first call of a branch of such modules alone needs no graph. Others have one, for the time of the call.
    """
    _INDIFFERENT.add(cls)
    return cls


class ModuleBranch:
    """Any module as a branch: its vector-Jacobian product comes from autograd, on a graph built in backward.

    Correct for random layers (generator states are replayed), BatchNorm (running statistics are updated once),
    other buffers (the second call sees the values the first one saw, on copies), autocast, train/eval flags changed
    between forward and backward, parameters swapped in by ``torch.func.functional_call``, cached parametrisations,
    units of ``fully_shard`` (which gather parameters, and reduce their gradients in the pull, by hooks of their own),
    and checkpoints inside, whose own second call runs in the same scene.

    Both calls run with gradients enabled, on inputs that want one, unless the modules are known to be indifferent:
    without, kernels may differ (attention's, recurrent layers').

    Args:
        module: called with the inputs and then with ``others``.
        others: further tensors, of any origin, that want a gradient: they count as parameters.
    """

    def __init__(self, module: nn.Module, others: Sequence[Tensor] = ()) -> None:
        self.module, self.modules, self.others = module, list(module.modules()), tuple(others)
        sharded = {id(q): q for unit in filter(_is_unit, self.modules) for q in unit.parameters()}
        self._own = {name: q for name, q in module.named_parameters() if id(q) not in sharded}
        # Stands for the parameters of sharded units among a node's inputs, so that backward comes by.
        self._units = (torch.zeros((), requires_grad=True),) if any(q.requires_grad for q in sharded.values()) else ()
        if any(map(is_lazy, self._own.values())):
            raise RuntimeError(
                f"{type(self.module).__name__} has parameters that are not initialised yet (a Lazy layer): call it "
                "once on an input of its own before the reversible block that it is in"
            )

        halves = {q.dtype for q in self._own.values() if q.dtype in HALVES}
        self._half = halves.pop() if len(halves) == 1 else None

    def _values(self, x: Values) -> Tensor:
        """An input, in 16 bits where the parameters are: streams hold more."""
        if self._half is None or x.dtype != torch.float32 or autocast_dtype(x.device) is not None:
            return values(x)
        return x.to(self._half)

    def parameters(self) -> list[Tensor]:
        return [*self._own.values(), *self._units, *self.others]

    def _others(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values of ``others`` among those of the parameters."""
        return parameters[len(parameters) - len(self.others) :]

    def evaluate(self, *inputs: Values, update: bool = True) -> Contribution:
        module, tensors = self.module, (*map(self._values, inputs), *self.others)
        if update:
            p = module(*tensors)
        else:
            buffers = {name: b.clone() for name, b in module.named_buffers()}
            with torch.no_grad(), recomputing(), flags(self.modules, [m.training for m in self.modules]):
                p = torch.func.functional_call(module, buffers, tensors)
        check_finite(module, p)
        return Contribution(p)

    def _is_indifferent(self) -> bool:
        def plain(m: nn.Module) -> bool:
            return not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)

        return all(type(m) in _INDIFFERENT and plain(m) for m in self.modules)

    def record(self, *inputs: Values) -> tuple[Contribution, Record]:
        tensors = [*(self._values(x).detach() for x in inputs), *(t.detach() for t in self.others)]
        recorder = Recorder(self.module, self.modules, tensors, listens=not self._units)
        graph = not self._is_indifferent()
        with recorder.watch(), uncached_parametrizations(), recorder.autocast.restore(), torch.set_grad_enabled(graph):
            p = _call(self.module, [_wanting(x) if graph else x for x in tensors])
        check_finite(self.module, p)
        return Contribution(p.detach()), recorder.finish()

    def recompute(
        self, record: Record, parameters: Sequence[Tensor], inputs: Sequence[Values], needs: Sequence[bool]
    ) -> tuple[Contribution, Pullback]:
        # ``.data`` has a version counter of its own: the coupling may update another half of the same tensor.
        read = [self._values(x).data for x in inputs]
        tensors = [_wanting(x) if need else x for x, need in zip(read, needs, strict=True)]
        parameters = _leaves(parameters)
        replay = Replay(self.module, self.modules, record, self._named(parameters))
        with torch.enable_grad():
            p = replay.call(*tensors, *self._others(parameters))
        return Contribution(p.detach()), self._pullback(p, tensors, parameters, replay)

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Values]) -> tuple[Contribution, Pullback]:
        tensors = [_wanting(_copy(self._values(x).detach())) for x in inputs]
        parameters = _leaves(parameters)
        named = self._named(parameters)
        recorder = Recorder(self.module, self.modules, tensors, listens=False)
        with torch.enable_grad(), recorder.autocast.restore(), uncached_parametrizations():
            p = torch.func.functional_call(self.module, named, (*tensors, *self._others(parameters)))
        check_finite(self.module, p)
        replay = Replay(self.module, self.modules, recorder.finish(), named, kept=True)
        return Contribution(p.detach()), self._pullback(p, tensors, parameters, replay)

    def _named(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._own, parameters[: len(self._own)], strict=True))

    def _pullback(self, p: Tensor, inputs: Sequence[Tensor], parameters: Sequence[Tensor], replay: Replay) -> Pullback:
        known = None if self._units else {id(t) for t in (*inputs, *parameters)}
        calls_python = _check_graph(p, known, self.module)

        def pullback(
            du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None], *, spare: bool = False
        ) -> list[Tensor | None]:
            if p.requires_grad:
                # Into leaves of our own, not by autograd.grad, which checkpoints of the reentrant kind refuse.
                replay.pull(lambda: torch.autograd.backward(p, du.to(p.dtype)), calls_python=calls_python)
            for x, total in zip(inputs, into, strict=True):
                if x.grad is not None and total is not None:
                    total.add(x.grad)
            return [q.grad for q in parameters]

        return pullback


def _call(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    try:
        return module(*inputs)
    except RuntimeError as error:
        if "a leaf Variable that requires grad is being used in an in-place operation" in str(error):
            raise changed_input(module) from error
        raise


def _wanting(x: Tensor) -> Tensor:
    """x, a leaf, as an input that wants a gradient."""
    return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x


def _copy(x: Tensor) -> Tensor:
    """A copy with x's strides, on which the order of sums may depend."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _leaves(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [q.detach().requires_grad_(q.requires_grad) for q in parameters]


def _is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on it or a part of it."""
    return any(map(_is_unit, module.modules()))


def _check_graph(p: Tensor, known: set[int] | None, module: nn.Module) -> bool:
    """Refuse a result that depends on tensors which want a gradient and would silently get none.

    Args:
        known: those that get one; None: sharded units are in the module, which make theirs as they are called.

    Returns:
        Whether a node of its graph is written in Python.
    """
    seen, front, calls_python = set(), [p.grad_fn], False
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        calls_python = calls_python or isinstance(node, BackwardCFunction)
        leaf = getattr(node, "variable", None)
        if leaf is not None and known is not None and id(leaf) not in known:
            raise RuntimeError(
                f"{label(module)} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
                "neither its input nor one of its parameters, so a reversible block cannot give it one: register it "
                "as a parameter, or detach it"
            )
        front += [function for function, _ in node.next_functions]
    return calls_python
