"""A transform inside a reversible block: run once without a graph, run again in backward exactly as it was.

A reversible block keeps none of a transform's activations, so backward calls it a second time. That second call must
compute the same function and leave no trace: :class:`Branch` records in the forward what the function depended on
besides its input and parameters, and replays it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from revbifpn.anomaly import check_finite
from revbifpn.streams import values

_state = threading.local()


def is_recomputing() -> bool:
    """Whether the calling code runs for the second time, inside backward or ``inverse()``.

    Forward hooks of modules inside a reversible block run in the forward and again in the recompute; a hook that
    counts or logs asks this to act once.
    """
    return getattr(_state, "recomputing", False)


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    before, _state.recomputing = is_recomputing(), True
    try:
        yield
    finally:
        _state.recomputing = before


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one device type. The weight cache is left out: it would outlive the streams' versions."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device: torch.device) -> Autocast:
        if not torch.amp.is_autocast_available(device.type):
            return cls(device.type, False, None)
        enabled = torch.is_autocast_enabled(device.type)
        return cls(device.type, enabled, torch.get_autocast_dtype(device.type))

    def restore(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype, self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class Generators:
    """States of the default random generators: the CPU's and those of the CUDA devices in use."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def current(cls, *tensors: Tensor) -> Generators:
        return cls(torch.get_rng_state(), *get_device_states(*tensors))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Generators):
            return NotImplemented
        mine, theirs = [self.cpu, *self.states], [other.cpu, *other.states]
        return all(map(torch.equal, mine, theirs))

    @contextlib.contextmanager
    def restore(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


@dataclass(frozen=True)
class Buffers:
    """Buffers as a call found them: copies of those that it changed, the others themselves and their versions."""

    changed: dict[str, Tensor]
    kept: dict[str, tuple[Tensor, int]]

    def restore(self) -> dict[str, Tensor]:
        """What a second call is to see, and may change."""
        for name, (buffer, version) in self.kept.items():
            if _version(buffer) != version:
                raise RuntimeError(
                    f"buffer {name!r} was modified in place between a reversible forward and its backward, which needs "
                    "it as it was (statistics of a norm in eval mode, say, after a forward in train mode)"
                )
        kept = {name: buffer for name, (buffer, _) in self.kept.items()}
        return kept | {name: buffer.clone() for name, buffer in self.changed.items()}


def _version(x: Tensor) -> int:
    """Number of in-place changes so far, where it is counted."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Record:
    """What one call of a transform depended on besides its inputs and parameters."""

    autocast: Autocast
    generators: Generators | None  # None: the call drew no random numbers
    training: tuple[bool, ...]  # of every submodule, in the order of ``modules()``
    buffers: Buffers


def _updates_statistics(module: nn.Module) -> bool:
    """A BatchNorm whose output does not depend on the running statistics that it updates."""
    known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return known and module.training and module.track_running_stats


@contextlib.contextmanager
def _flags(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """Give every submodule its recorded training flag, and let no norm layer touch its running statistics."""
    modules = list(module.modules())
    now = [m.training for m in modules]
    tracking = []
    try:
        for m, flag in zip(modules, training, strict=True):
            m.training = flag
            if _updates_statistics(m):
                tracking.append(m)
                m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
        for m, flag in zip(modules, now, strict=True):
            m.training = flag


@dataclass(frozen=True)
class Term:
    """What a branch adds to a stream: ``scale * p + shift`` (``[C]`` or ``[N, C]`` each), upsampled by the coupling.

    ``center [C]`` asks the coupling's adjoint for the sums that the branch's pullback needs.
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

    def adopts(self, buffer: Tensor) -> bool:
        """Whether nothing was added yet and :meth:`adopt` would take ``buffer``."""
        return self.value is None and buffer.shape == self.like.shape

    def adopt(self, buffer: Tensor) -> None:
        """Take over a tensor that nobody else keeps as the sum's first addend."""
        self.value = buffer


# ``pullback(du, sums, into)``: from the gradient du of the term (after the adjoint of upsampling) and the sums it asked
# for, add the inputs' gradients to ``into`` (None where not wanted) and return the parameters'.
Pullback = Callable[[Tensor, Tensor | None, Sequence[Gradient | None]], list[Tensor | None]]


def _expect_own(p: Tensor, known: set[int], module: nn.Module) -> None:
    """Refuse a result that depends on tensors which want a gradient and would silently get none."""
    seen, front = set(), [p.grad_fn]
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"{type(module).__name__} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is "
                "neither its input nor one of its parameters, so a reversible block cannot give it one: register it "
                "as a parameter, or detach it"
            )
        front += [function for function, _ in node.next_functions]


class Branch:
    """Any module as a branch: its vector-Jacobian product comes from autograd, on a graph built in backward.

    Correct for random layers (generator states are replayed), BatchNorm (running statistics are updated once),
    other buffers (the second call sees the values the first one saw, on copies), autocast, train/eval flags changed
    between forward and backward, and parameters swapped in by ``torch.func.functional_call``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def __call__(self, *inputs: Tensor) -> Term:
        """Call the module as it is; nothing is recorded."""
        p = self.module(*map(values, inputs))
        check_finite(self.module, p)
        return Term(p)

    def forward(self, *inputs: Tensor) -> tuple[Term, Record]:
        """Call the module without a graph and record what it depended on."""
        module, inputs = self.module, [*map(values, inputs)]
        kept_out = {id(b) for m in module.modules() if _updates_statistics(m) for b in m.buffers(recurse=False)}
        buffers = {name: b for name, b in module.named_buffers() if id(b) not in kept_out}
        before = {name: (b.clone(), _version(b)) for name, b in buffers.items()}
        versions = [_version(x) for x in inputs]
        training = tuple(m.training for m in module.modules())
        autocast = Autocast.current(inputs[0].device)
        generators = Generators.current(*inputs)
        with torch.no_grad(), autocast.restore():
            p = module(*inputs)
        check_finite(module, p)
        if generators == Generators.current(*inputs):
            generators = None
        if versions != [_version(x) for x in inputs]:
            raise RuntimeError(
                f"{type(module).__name__} changes its input in place, which a reversible block needs as it was: "
                "use inplace=False in its first layer"
            )
        now, changed, kept = dict(module.named_buffers()), {}, {}
        for name, (value, version) in before.items():
            if now.get(name) is buffers[name] and _version(buffers[name]) == version:
                kept[name] = buffers[name], version
            else:
                changed[name] = value
        return Term(p), Record(autocast, generators, training, Buffers(changed, kept))

    def evaluate(self, *inputs: Tensor) -> Term:
        """Call the module without a graph and without a trace in its buffers, as it is now."""
        module = self.module
        training = [m.training for m in module.modules()]
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        with torch.no_grad(), _recomputing(), _flags(module, training):
            return Term(torch.func.functional_call(module, buffers, tuple(map(values, inputs))))

    def recompute(
        self, record: Record, parameters: Sequence[Tensor], inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Term, Pullback]:
        """Call the module as ``record`` says, on ``parameters``, with a graph.

        Args:
            record: of the forward call.
            parameters: the values used in the forward, in the order of :meth:`parameters`.
            inputs: the values used in the forward; the graph keeps references to them, not copies.
            needs: which of the inputs a gradient is wanted for.

        Returns:
            The term, and the function from its gradient to those of inputs and parameters (None for "not needed").
        """
        # ``.data`` has a version counter of its own: the coupling may update another half of the same tensor.
        inputs = [values(x).data.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        parameters = _leaves(parameters)
        state = self._named(parameters) | record.buffers.restore()
        replay = contextlib.nullcontext() if record.generators is None else record.generators.restore()
        with (
            torch.enable_grad(),
            _recomputing(),
            _flags(self.module, record.training),
            record.autocast.restore(),
            replay,
        ):
            p = torch.func.functional_call(self.module, state, tuple(inputs))
        return Term(p.detach()), self._pullback(p, inputs, parameters)

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Term, Pullback]:
        """Call the module with a graph, which the pullback keeps: as :meth:`recompute`, without a second call."""
        inputs = [values(x).detach().clone().requires_grad_() for x in inputs]
        parameters = _leaves(parameters)
        with torch.enable_grad(), Autocast.current(inputs[0].device).restore():
            p = torch.func.functional_call(self.module, self._named(parameters), tuple(inputs))
        check_finite(self.module, p)
        return Term(p.detach()), self._pullback(p, inputs, parameters)

    def _named(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self.module.named_parameters()), parameters, strict=True))

    def _pullback(self, p: Tensor, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Pullback:
        _expect_own(p, {id(t) for t in (*inputs, *parameters)}, self.module)

        def pullback(du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None]) -> list[Tensor | None]:
            wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
            found: tuple[Tensor | None, ...] = (None,) * len(wanted)
            if wanted and p.requires_grad:
                found = torch.autograd.grad(p, wanted, du.to(p.dtype), allow_unused=True)
            gradients = iter(found)
            for x, total in zip(inputs, into, strict=True):
                dx = next(gradients) if x.requires_grad else None
                if dx is not None and total is not None:
                    total.tensor().add_(dx)
            return [next(gradients) if q.requires_grad else None for q in parameters]

        return pullback


def _leaves(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [q.detach().requires_grad_(q.requires_grad) for q in parameters]
