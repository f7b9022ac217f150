"""What is timed and metered of a network: its training step and its inference, alone or in a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.networks import COMPILED, DEFAULTS, DTYPES, GRAPH, ONNXRUNTIME, PUBLISHED, Network
from revbifpn.estimate import StepEstimator
from revbifpn.memory import PeakMemory, measure_sample, measure_step

TRAIN, INFER = "train", "inference"


class Runner:
    """A network's model, and the steps of it that are timed."""

    def __init__(self, network: Network, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        self.network, self.device = network, device
        # The published code asks for CUDA's autocast state when it recomputes, so on a CPU it knows float32 only.
        as_float = network.variant == ONNXRUNTIME or (network.variant == PUBLISHED and device.type == "cpu")
        self.dtype = "float32" if as_float else dtype
        self.model = network.make().to(device)

    def action(self, task: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
        """One step of ``task``, as often as it is called; captured in a CUDA graph where the variant says so."""
        self.model.train(task == TRAIN)
        step = partial(self._train if task == TRAIN else self._infer, images, labels)
        return _capture(step, self.model) if GRAPH in self.network.variant else step

    def _flags(self) -> contextmanager:
        return tf32(products=False, convolutions=True) if DEFAULTS in self.network.variant else nullcontext()

    def _forward(self, images: Tensor) -> Tensor:
        dtype = DTYPES[self.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(images)

    def _train(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        with self._flags():
            F.cross_entropy(self._forward(images).float(), labels).backward()

    @torch.no_grad()
    def _infer(self, images: Tensor, labels: Tensor) -> None:
        with self._flags():
            self._forward(images)

    @property
    def is_metered(self) -> bool:
        """Whether a meter sees its allocations."""
        if self.network.kind == ONNXRUNTIME:
            return False
        return not self.network.is_graph and (self.network.kind != COMPILED or self.device.type == "cuda")

    def peak(self, task: str, images: Tensor) -> tuple[int | None, str | None]:
        """Peak bytes and their meter, see :mod:`revbifpn.memory`."""
        if not self.is_metered:
            return None, None
        self.model.train(task == TRAIN)
        with self._flags():
            if task == TRAIN:
                options = {"batch": len(images), "dtype": DTYPES[self.dtype], "device": self.device}
                memory = measure_step(self.model, tuple(images.shape[1:]), **options)
                return memory.peak_bytes, memory.meter
            with PeakMemory(self.device) as meter, torch.no_grad():
                self._forward(images)
        return meter.peak_bytes, "cuda allocator" if self.device.type == "cuda" else "tensors"

    def largest_batch(self, resolution: int, batch: int, optimizer_states: int) -> Callable[[float], int]:
        """The largest batch of a training step in so many bytes, everything but the CUDA context counted.

        On a GPU from the allocator's peaks at ``batch`` and half of it, elsewhere from a simulated step in a GPU's
        chunks.
        """
        dtype = DTYPES[self.dtype]
        if self.device.type != "cuda":
            options = {"optimizer_states": optimizer_states, "device": "cuda"}
            return StepEstimator(self.model, resolution, dtype, **options).largest_batch
        options = {"batch": max(1, batch // 2), "dtype": dtype, "device": self.device}
        memory = measure_sample(self.model, (3, resolution, resolution), **options)
        large = memory.large
        constant = large.parameter_bytes + large.buffer_bytes + (1 + optimizer_states) * large.gradient_bytes
        total = large.peak_bytes + large.input_bytes + constant
        per_sample = memory.bytes_per_sample + large.input_bytes / large.batch
        return lambda memory_bytes: max(0, large.batch + math.floor((memory_bytes - total) / per_sample))


@contextmanager
def tf32(*, products: bool, convolutions: bool) -> Iterator[None]:
    """Whether matrix products and cuDNN's convolutions in float32 use TF32; PyTorch's defaults are False and True."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag, allowed in zip(flags, (products, convolutions), strict=True):
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


def _capture(step: Callable[[], None], model: nn.Module) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
