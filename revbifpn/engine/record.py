"""What one call of a module depended on besides its inputs and parameters, and how to put that in force again.

A reversible pass keeps none of a transform's activations: backward calls the module a second time, which must compute
the same function and leave no trace. A :class:`Recorder` watches the first call; a :class:`Replay` sets the scene for
the second, and again for its gradient, since parts of a module (a checkpoint in it) may run only then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils import parametrize
from torch.utils.checkpoint import get_device_states, set_device_states

from revbifpn.engine.capture import NothingRandom
from revbifpn.engine.collectives import Collective, RecordedCollectives, may_communicate, replayed
from revbifpn.streams import is_capturing

_state = threading.local()


def is_recomputing() -> bool:
    """Whether the calling code runs for the second time, inside backward or ``inverse()``.

    Forward hooks of modules inside a reversible block run in the forward and again in the recompute; a hook that
    counts or logs asks this to act once.
    """
    return getattr(_state, "recomputing", False)


@contextmanager
def recomputing() -> Iterator[None]:
    """What runs in the block is the second call."""
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

    def restore(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
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
        own, others = [self.cpu, *self.states], [other.cpu, *other.states]
        return all(map(torch.equal, own, others))

    def put(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


# What decides between kernels, or their precision, for the whole process: attributes of torch.backends.
_SETTINGS = (
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
)
_read_settings = attrgetter(*_SETTINGS)


@dataclass(frozen=True)
class Backends:
    """Settings of PyTorch's backends that results depend on: TF32, reduced precision, determinism, autotuning."""

    settings: tuple[Any, ...]
    deterministic: tuple[bool, bool]
    tunable: bool

    @classmethod
    def current(cls) -> Backends:
        settings = _read_settings(torch.backends)
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        tunable = torch.backends.cuda.is_built() and torch.cuda.tunable.is_enabled()
        return cls(settings, (torch.are_deterministic_algorithms_enabled(), warn_only), tunable)

    def put(self) -> None:
        for path, now, value in zip(_SETTINGS, Backends.current().settings, self.settings, strict=True):
            if now != value:
                owner, _, name = path.rpartition(".")
                setattr(attrgetter(owner)(torch.backends) if owner else torch.backends, name, value)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        if torch.backends.cuda.is_built():
            torch.cuda.tunable.enable(self.tunable)

    @contextmanager
    def restore(self) -> Iterator[None]:
        now = Backends.current()
        if now == self:
            yield
            return
        self.put()
        try:
            yield
        finally:
            now.put()


class Buffers:
    """Buffers as a call found them: copies of those that it changed, the others themselves and their versions."""

    def __init__(self, changed: dict[str, Tensor], unchanged: dict[str, tuple[Tensor, int]]) -> None:
        self.changed, self.unchanged = changed, unchanged

    def restore(self) -> dict[str, Tensor]:
        """What a second call is to see, and may change."""
        for name, (buffer, version) in self.unchanged.items():
            if version_of(buffer) != version:
                raise RuntimeError(
                    f"buffer {name!r} was modified in place between a reversible forward and its backward, which needs "
                    "it as it was (statistics of a norm in eval mode, say, after a forward in train mode)"
                )
        unchanged = {name: buffer for name, (buffer, _) in self.unchanged.items()}
        return unchanged | {name: buffer.clone() for name, buffer in self.changed.items()}


def version_of(x: Tensor) -> int:
    """Number of in-place changes so far, where it is counted."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Record:
    """What one call of a module depended on besides its inputs and parameters.

    Attributes:
        random: states of the generators before and after; None: the call drew no random numbers.
        training: flag of every submodule, in the order of ``modules()``.
        collectives: what it received from other processes; None: nothing in it asks them.
    """

    autocast: Autocast
    random: tuple[Generators, Generators] | None
    training: tuple[bool, ...]
    buffers: Buffers
    collectives: tuple[Collective, ...] | None = None


def updates_statistics(module: nn.Module) -> bool:
    """A BatchNorm whose output does not depend on the running statistics that it updates."""
    known = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return known and module.training and bool(module.track_running_stats)


def updates_uncounted(module: nn.Module) -> bool:
    """Another norm with running statistics: PyTorch's kernels update them without counting it as an in-place change."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


@contextmanager
def flags(modules: Sequence[nn.Module], training: Sequence[bool], *, tracking: bool = False) -> Iterator[None]:
    """Give every module its recorded training flag; unless ``tracking``, no norm layer updates its statistics."""
    now = [m.training for m in modules]
    stopped: list[Any] = []
    try:
        for m, flag in zip(modules, training, strict=True):
            m.training = flag
            if not tracking and updates_statistics(m):
                stopped.append(m)
                stopped[-1].track_running_stats = False
        yield
    finally:
        for norm in stopped:
            norm.track_running_stats = True
        for m, flag in zip(modules, now, strict=True):
            m.training = flag


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """Parametrised weights are computed where they are used: one that ``parametrize.cached()`` keeps from another call
    hangs on that call's graph, or on none."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled


class Recorder:
    """Watches one call: made before it; :meth:`finish` after it gives the record.

    Args:
        module, modules: that is called, and all in it.
        inputs: of the call.
        listens: to what other processes say in it. Not where parameters are gathered in it, which happens again.
    """

    def __init__(
        self, module: nn.Module, modules: Sequence[nn.Module], inputs: Sequence[Tensor], *, listens: bool = True
    ) -> None:
        self.module, self.inputs = module, inputs
        skipped = {id(b) for m in modules if updates_statistics(m) for b in m._buffers.values()}
        self.buffers = {name: b for name, b in module.named_buffers() if id(b) not in skipped}
        norms = (m for m in modules if updates_uncounted(m))
        self.uncounted = {id(b) for m in norms for b in m._buffers.values()} - skipped
        self.before = {name: (b.clone(), version_of(b)) for name, b in self.buffers.items()}
        self.versions = [version_of(x) for x in inputs]
        self.training = tuple(m.training for m in modules)
        self.autocast = Autocast.current(inputs[0].device)
        self.capturing = is_capturing(inputs[0].device)
        self.generators = None if self.capturing else Generators.current(*inputs)
        self.collectives = RecordedCollectives() if listens and may_communicate(modules) else None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Enter it around the call: a graph being captured has no states to compare, so nothing may be drawn."""
        with NothingRandom(self.module) if self.capturing else nullcontext(), self.collectives or nullcontext():
            yield

    def finish(self) -> Record:
        """The record.

        Raises:
            RuntimeError: the call changed its input in place.
        """
        if self.versions != [version_of(x) for x in self.inputs]:
            raise changed_input(self.module)
        random = None
        if self.generators is not None:
            generators = Generators.current(*self.inputs)
            random = None if generators == self.generators else (self.generators, generators)
        now = dict(self.module.named_buffers()) if self.before else {}
        changed, unchanged = {}, {}
        for name, (value, version) in self.before.items():
            buffer = self.buffers[name]
            if now.get(name) is buffer and version_of(buffer) == version and id(buffer) not in self.uncounted:
                unchanged[name] = buffer, version
            else:
                changed[name] = value
        collectives = None if self.collectives is None else tuple(self.collectives.done)
        return Record(self.autocast, random, self.training, Buffers(changed, unchanged), collectives)


def changed_input(module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__} changes its input in place, which a reversible block needs as it was: "
        "use inplace=False in its first layer"
    )


class _Within(nn.Module):
    """Calls a function, for :func:`within`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def within(module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
    """``function()`` while parameters and buffers of ``module`` are ``tensors``, by name."""
    tensors = {f"module.{name}": value for name, value in tensors.items()}
    return torch.func.functional_call(_Within(module), tensors, (function,))


class Replay:
    """A module as a recorded call found it, on given parameters.

    Args:
        module, modules: that was called, and all in it.
        record: of the call.
        parameters: by name, the values that it used.
        kept: the graph is that of the recorded call, whose lazy parts must save the same tensors: norms go on updating
            statistics, those of copies.
    """

    def __init__(
        self,
        module: nn.Module,
        modules: Sequence[nn.Module],
        record: Record,
        parameters: dict[str, Tensor],
        *,
        kept: bool = False,
    ) -> None:
        self.module, self.modules, self.record = module, modules, record
        self.parameters, self.kept = parameters, kept
        self._generators = record.random and record.random[0]

    @contextmanager
    def _scene(self) -> Iterator[None]:
        """Flags, autocast and generators of the recorded call; random numbers go on from one scene to the next."""
        record = self.record
        with (
            recomputing(),
            flags(self.modules, record.training, tracking=self.kept),
            uncached_parametrizations(),
            record.autocast.restore(),
        ):
            if self._generators is None:
                yield
                return
            devices = self._generators.devices
            with torch.random.fork_rng(devices=devices):
                self._generators.put()
                yield
                self._generators = Generators(torch.get_rng_state(), devices, _device_states(devices))

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters, and buffers as the recorded call found them, by name."""
        copies = {name: b.clone() for name, b in self.module.named_buffers()} if self.kept else {}
        return self.parameters | copies | self.record.buffers.restore()

    def call(self, *inputs: Tensor) -> Tensor:
        """The module's second call.

        Raises:
            RuntimeError: it drew other random numbers than the first.
        """
        with self._scene(), replayed(self.record.collectives):
            p = torch.func.functional_call(self.module, self._tensors(), inputs)
        if self.record.random is not None and self._generators != self.record.random[1]:
            raise RuntimeError(
                f"{type(self.module).__name__} did not draw the same random numbers in backward as in forward: another "
                "thread drew from the same generator meanwhile. Random layers in several threads cannot be recomputed; "
                "train in several processes, or use reversible=False"
            )
        return p

    def pull(self, backward: Callable[[], None], *, calls_python: bool) -> None:
        """Run ``backward`` where parts of the module that run in it find what the recorded call found.

        Args:
            calls_python: nodes of the graph are written in Python, and may accumulate into parameters by themselves.
        """
        with self._scene():
            if calls_python or self.kept or self.record.buffers.changed:
                within(self.module, self._tensors(), backward)
            else:
                backward()


def _device_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.cuda.get_rng_state(device) for device in devices]
