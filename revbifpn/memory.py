"""Peak training memory, in bytes, on any device.

With ``s`` running over the storages that are made while the meter is on, and ``t`` over time,

    peak = max_t  sum_{s alive at t} bytes(s)

so parameters, buffers, the image and whatever else existed before do not count, views and in-place results add
nothing, and a storage stops counting at the moment its last reference goes. On CUDA the caching allocator's own peak is
read, minus what was allocated before. Elsewhere :class:`PeakMemory` watches every op below autograd, backward
included, for the storages of its results; the same watch over fake tensors gives the same bytes without computing
anything. What a kernel allocates and frees inside one call is seen on CUDA only.

A step's memory grows linearly with its batch, so two batches tell what one sample costs and what is fixed:

    bytes per sample = (peak(2b) - peak(b)) / b

Everything that does not scale with the batch (weight gradients in flight, workspaces, the loss) cancels.
"""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


class _StorageLog(TorchDispatchMode):
    """Logs ``(serial, bytes)`` when a storage is made or resized, ``(serial, -bytes)`` when it is freed."""

    # Their argument is a tensor made from Python data a moment ago, the only new storage that no op returns.
    _LIFTS = (torch.ops.aten.lift.default, torch.ops.aten.lift_fresh.default)

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.parts: list[str] = []  # by serial: what ran when the storage was made
        self.part = ""
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # by address: serial, reference
        self._bytes: list[int] = []  # by serial

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # States of random generators are real tensors in a fake run too: they can be compared, and stay as they are.
        on_states = func is torch.ops.aten.equal.default and not any(isinstance(t, FakeTensor) for t in args)
        with unset_fake_temporarily() if on_states else nullcontext():
            result = func(*args, **kwargs)
        given = {s._cdata: s for s in _storages([args, kwargs])}
        for address, storage in given.items():
            if address in self._alive:
                self._resize(self._alive[address][0], storage.nbytes())
        for storage in _storages(result):
            address = storage._cdata
            if address not in self._alive and (address not in given or func in self._LIFTS):
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        serial, address = len(self._bytes), storage._cdata
        self._bytes.append(0)
        self.parts.append(self.part)

        def freed(_: weakref.ref) -> None:
            self._resize(serial, 0)
            del self._alive[address]

        self._alive[address] = serial, weakref.ref(storage, freed)
        self._resize(serial, storage.nbytes())

    def _resize(self, serial: int, size: int) -> None:
        if size != self._bytes[serial]:
            self.events.append((serial, size - self._bytes[serial]))
            self._bytes[serial] = size

    def serials(self, tensors: Iterable[Tensor]) -> set[int]:
        """The serials of those of ``tensors`` whose storage was made here and lives."""
        return {self._alive[s._cdata][0] for s in _storages(list(tensors)) if s._cdata in self._alive}

    def stop(self) -> None:
        """Drops the references: what is freed from now on is not logged."""
        self._alive.clear()


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(tree, Tensor):
        if tree.layout == torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _storages(branch)
    elif isinstance(tree, dict):
        yield from _storages(list(tree.values()))


class PeakMemory:
    """Context manager that meters the peak of tensor memory made inside its block, see :mod:`revbifpn.memory`.

    Args:
        device: where the tensors are; ``"cuda"`` reads the allocator, anything else watches storages.

    After the block, or inside it for the figure so far:

    - ``peak_bytes``: most bytes alive at once, beyond those alive at the start;
    - ``live_bytes``: bytes alive now (at the end of the block, once it has ended), likewise;
    - ``reserved_bytes``: on CUDA the peak of the memory that the allocator took from the driver (cached blocks and what
      existed before included), otherwise None.

    Automatic garbage collection is off inside the block, so that a figure does not depend on when it happens to run:
    tensors held by a reference cycle count to the end. A block left by an exception leaves nothing behind.

    Example:
        >>> with PeakMemory() as meter:
        ...     model(x).sum().backward()
        >>> meter.peak_bytes
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        self._log: _StorageLog | None = None
        self._final: tuple[int, int, int | None] | None = None
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            gc.collect()  # elsewhere only what is made inside is counted
        else:
            # The mode's first op imports this, and exceptions caught on the way would hold on to the caller's frames.
            importlib.import_module("torch._dynamo")
        self._gc_was_on = gc.isenabled()
        gc.disable()
        self._final = None
        if self._cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._log = _StorageLog()
            self._log.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if self._log is None:
                torch.cuda.synchronize(self.device)
            else:
                self._log.__exit__(*exception)
            self._final = self._read()
        finally:
            if self._log is not None:
                self._log.stop()
            if self._gc_was_on:
                gc.enable()

    def _read(self) -> tuple[int, int, int | None]:
        if self._final is not None:
            return self._final
        if self._cuda:
            return (
                torch.cuda.max_memory_allocated(self.device) - self._before,
                torch.cuda.memory_allocated(self.device) - self._before,
                torch.cuda.max_memory_reserved(self.device),
            )
        if self._log is None:
            return 0, 0, None
        return (*_replay(self._log.events), None)

    @property
    def peak_bytes(self) -> int:
        return self._read()[0]

    @property
    def live_bytes(self) -> int:
        return self._read()[1]

    @property
    def reserved_bytes(self) -> int | None:
        return self._read()[2]

    def begin(self, part: str) -> None:
        """What is made from now on belongs to this part of a network; for :meth:`parts`."""
        if self._log is not None:
            self._log.part = part

    def parts(self, without: Iterable[Tensor] = ()) -> dict[str, int]:
        """The bytes at the peak by the part that they belong to, had ``without`` never been allocated.

        Only inside the block, and off CUDA, as :meth:`peak_without`.
        """
        without = list(without)
        peak = self.peak_without(without)
        assert self._log is not None
        left_out, events = self._log.serials(without), self._log.events
        live, alive = 0, dict.fromkeys(self._log.parts, 0)
        for serial, change in events:
            if serial not in left_out:
                live += change
                alive[self._log.parts[serial]] += change
                if live == peak:
                    break
        return alive

    def peak_without(self, tensors: Iterable[Tensor]) -> int:
        """The peak so far, had the storages of ``tensors`` (parameter gradients, say) never been allocated.

        Only inside the block.

        Raises:
            RuntimeError: on CUDA, whose allocator keeps the peak only, or after the block.
        """
        if self._cuda:
            raise RuntimeError(
                "peak_without: CUDA's allocator keeps only the peak itself; meter on CPU or on fake tensors"
            )
        if self._log is None or self._final is not None:
            raise RuntimeError("peak_without: call it inside the `with` block, while the tensors are known")
        return _replay(self._log.events, self._log.serials(tensors))[0]


def _replay(events: list[tuple[int, int]], without: Iterable[int] = ()) -> tuple[int, int]:
    """Peak and last value of the running sum of the events, less those of the serials in ``without``."""
    peak = live = 0
    for serial, change in events:
        if serial not in without:
            live += change
            peak = max(peak, live)
    return peak, live


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step, in bytes.

    Attributes:
        batch: samples in the step.
        peak_bytes: most bytes alive at once during forward and backward; without parameters, buffers, input and labels,
            and without the gradients of parameters unless they were asked for.
        kept_bytes: bytes alive between forward and backward: activations kept, output and loss.
        parameter_bytes, buffer_bytes, gradient_bytes: of the whole model.
        input_bytes: of the batch of images.
        reserved_bytes: CUDA only: peak of what the allocator took from the driver, everything included.
        meter: ``"cuda allocator"``, ``"tensors"`` or ``"fake tensors"``.
    """

    batch: int
    peak_bytes: int
    kept_bytes: int
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    input_bytes: int
    reserved_bytes: int | None
    meter: str


@dataclass(frozen=True)
class SampleMemory:
    """Two steps that differ in their batch only, and what they say about one sample."""

    small: StepMemory
    large: StepMemory

    @property
    def bytes_per_sample(self) -> float:
        """``(peak(large) - peak(small)) / (large.batch - small.batch)``, in bytes."""
        return (self.large.peak_bytes - self.small.peak_bytes) / (self.large.batch - self.small.batch)

    @property
    def fixed_bytes(self) -> float:
        """What the peak has beside its batch times ``bytes_per_sample``, in bytes."""
        return self.large.peak_bytes - self.large.batch * self.bytes_per_sample

    @property
    def kept_bytes_per_sample(self) -> float:
        """The same of the bytes alive between forward and backward."""
        return (self.large.kept_bytes - self.small.kept_bytes) / (self.large.batch - self.small.batch)


def measure_step(
    model: nn.Module,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fake: bool = False,
    parameter_gradients: bool = False,
) -> StepMemory:
    """Meters one training step: forward in train mode, loss, backward; no optimizer.

    The loss is the cross-entropy of ``[N, classes]`` logits, or the sum of the means of a pyramid's maps. On CUDA a
    first step, not metered, loads and tunes kernels and leaves the parameters' gradients allocated; the metered one
    accumulates into them. Elsewhere the storages that end as a parameter's ``grad`` are left out of the peak exactly.

    Args:
        model: moved to ``device`` and set to train mode; its gradients are None afterwards. Untouched when ``fake``.
        input_shape: ``(C, H, W)`` of an image.
        batch: images in the step.
        dtype: float32, or bfloat16 / float16 to run the forward under autocast of that dtype.
        device: where to run.
        fake: run a copy of the model on fake tensors: same ops, shapes and bytes, nothing computed; only off CUDA.
        parameter_gradients: count the parameters' gradients too.

    Raises:
        ValueError: batch below 1, a dtype that autocast does not take, fake on CUDA.
        RuntimeError: CUDA asked for and not available.
    """
    device = torch.device(device)
    if batch < 1:
        raise ValueError(f"batch: got {batch}, needs at least 1")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: got {dtype}, needs torch.float32, torch.bfloat16 or torch.float16")
    if device.type == "cuda" and fake:
        raise ValueError("fake: fake tensors stand for tensors off CUDA only; CUDA's allocator needs real ones")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: {device} was asked for, but torch.cuda.is_available() is False")

    with ExitStack() as stack:
        if fake:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            model = _fake_copy(model, mode)
            stack.enter_context(mode)
        else:
            model.to(device)
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        stack.enter_context(_no_gradients_left(parameters))
        images = torch.randn(batch, *input_shape, device=device)  # [N, C, H, W]
        labels = torch.zeros(batch, dtype=torch.long, device=device)  # [N]

        if device.type == "cuda":
            _loss(model, images, labels, dtype).backward()
            if parameter_gradients:
                model.zero_grad(set_to_none=True)
        with PeakMemory(device) as meter:
            loss = _loss(model, images, labels, dtype)
            kept = meter.live_bytes
            loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            leave_out = not parameter_gradients and device.type != "cuda"
            peak = meter.peak_without(gradients) if leave_out else None
        return StepMemory(
            batch=batch,
            peak_bytes=meter.peak_bytes if peak is None else peak,
            kept_bytes=kept,
            parameter_bytes=_bytes(model.parameters()),
            buffer_bytes=_bytes(model.buffers()),
            gradient_bytes=_bytes(gradients),
            input_bytes=_bytes([images]),
            reserved_bytes=meter.reserved_bytes,
            meter="cuda allocator" if device.type == "cuda" else "fake tensors" if fake else "tensors",
        )


def measure_sample(
    model: nn.Module, input_shape: tuple[int, int, int] = (3, 224, 224), *, batch: int = 8, **options: Any
) -> SampleMemory:
    """Meters a step at ``batch`` and one at ``2 * batch``; ``options`` as in :func:`measure_step`.

    Each moment of a step needs ``fixed + batch * per_sample`` bytes, once the batch exceeds the chunks of samples that
    some of the work is done in, and the peak is the largest of these lines. From there on the slope between two batches
    is exact where one moment is the peak of both, and too low, never too high, where it is not.
    """
    small, large = (measure_step(model, input_shape, batch=n, **options) for n in (batch, 2 * batch))
    return SampleMemory(small, large)


def _loss(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    reduced = dtype != torch.float32
    with torch.autocast(images.device.type, dtype) if reduced else nullcontext():
        output = model(images)
    if isinstance(output, Tensor) and output.dim() == 2:
        return F.cross_entropy(output.float(), labels)
    levels = [output] if isinstance(output, Tensor) else output
    return reduce(torch.add, (level.mean() for level in levels))


@contextmanager
def _no_gradients_left(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No parameter has a gradient at the start, nor at the end, however it ends."""

    def clear() -> None:
        for p in parameters:
            p.grad = None

    clear()
    try:
        yield
    finally:
        clear()


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake; no parameter is copied."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(s.nbytes() for s in {s._cdata: s for s in _storages(list(tensors))}.values())
