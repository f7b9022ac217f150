"""What may not be in a CUDA graph, found by running it once: the capture lint.

A graph replays kernels. Whatever the host reads, decides or counts on the way is done once, at the capture: a value
read with ``.item()`` would be that of the capture for ever, were it not that CUDA refuses it, with an error that does
not say what it was. The lint runs a step uncaptured, on any device, and names the first call that is in the way.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revbifpn.streams import rehearsed_capture

_aten = torch.ops.aten


class NotCapturableError(RuntimeError):
    """A step does what a CUDA graph cannot hold; the message says what, and where."""


_READ = "reads a value of a tensor on the host"
_STATE = "reads or sets the state of a random generator (a graph replays the generators that it was captured with)"
_WAIT = "waits for the device"

# Methods that read a tensor without a call of PyTorch's dispatcher where it is on the CPU.
_READS = (
    *("item", "tolist", "numpy", "cpu", "__array__"),
    *("__bool__", "__int__", "__float__", "__index__", "__complex__"),
)
_METHODS: dict[Any, str] = {getattr(Tensor, name): _READ for name in _READS}
_METHODS[Tensor.pin_memory] = "allocates pinned memory"

# Functions that no mode sees, by their owner.
_FUNCTIONS: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (torch, ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed"), _STATE),
    (torch.random, ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed", "fork_rng"), _STATE),
    (
        torch.cuda,
        ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all", "manual_seed", "manual_seed_all"),
        _STATE,
    ),
    (torch.cuda, ("synchronize",), _WAIT),
    (torch.cuda.Stream, ("synchronize", "query"), _WAIT),
    (torch.cuda.Event, ("synchronize", "query", "elapsed_time"), _WAIT),
)


def _copy(destination: torch.device, source: torch.device) -> str:
    return "copies between host and device" if "cpu" in (destination.type, source.type) else ""


def _why_not(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why a graph cannot hold a call of an op; empty if it can."""
    if torch.Tag.data_dependent_output in op.tags:
        return _READ
    if op.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return "indexes with a mask, so that shapes depend on values" if masks else ""
    if torch.Tag.dynamic_output_shape in op.tags and kwargs.get("output_size") is None:
        return "makes a tensor whose shape depends on values"
    if kwargs.get("pin_memory") or op.overloadpacket is _aten._pin_memory:
        return "allocates pinned memory"
    if op is _aten._to_copy.default:
        device = kwargs.get("device") or args[0].device
        return _copy(device, args[0].device) if device.type != args[0].device.type else ""
    if op is _aten.copy_.default:
        return _copy(args[0].device, args[1].device) if args[0].device.type != args[1].device.type else ""
    return ""


def _where() -> str:
    """The innermost line that is neither PyTorch's nor the lint's."""
    torch_files = os.path.dirname(torch.__file__)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith(torch_files):
            return f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return "a thread of PyTorch's"


def _refusal(call: str, why: str) -> NotCapturableError:
    return NotCapturableError(f"{call} {why}, which a CUDA graph cannot hold: {_where()}")


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        why = _why_not(func, args, kwargs)
        if why:
            raise _refusal(str(func), why)
        return func(*args, **kwargs)


class NothingRandom(TorchDispatchMode):
    """Refuses random numbers in a module that is to be recomputed in the same graph, which has no states to replay."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotCapturableError(
                f"{type(self.module).__name__} draws random numbers ({func}) and is recomputed in backward, which "
                "reads and sets the state of a generator: a CUDA graph cannot hold that. Branches of revbifpn.fast "
                "that revbifpn.fused.why_not_fused has nothing against keep what they drew; so does reversible=False"
            )
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _METHODS:
            raise _refusal(f"Tensor.{func.__name__}", _METHODS[func])
        return func(*args, **(kwargs or {}))


@contextmanager
def _refused(owner: Any, name: str, why: str) -> Iterator[None]:
    """A function that raises in this thread and goes on as before in others."""
    function, thread = getattr(owner, name), threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise _refusal(f"{owner.__name__}.{name}", why)
        return function(*args, **kwargs)

    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextmanager
def capture_lint() -> Iterator[None]:
    """Run the block as if it was captured into a CUDA graph, and stop at the first call that no graph can hold.

    It needs no GPU: the same calls are in the way on any device. What runs in the block runs: parameters are updated,
    statistics move.

    Raises:
        NotCapturableError: a value is read on the host (``item``, ``bool``, ``tolist``, ``cpu``, ``equal``), a shape
            depends on values (``nonzero``, masks), the host waits for the device, copies to or from it, or allocates
            pinned memory, or a random generator's state is read or set.

    Example:
        >>> with capture_lint():
        ...     loss(model(x)).backward()
    """
    with ExitStack() as scene:
        for owner, names, why in _FUNCTIONS:
            for name in names:
                scene.enter_context(_refused(owner, name, why))
        for context in (rehearsed_capture(), _Methods(), _Ops()):
            scene.enter_context(context)
        yield
