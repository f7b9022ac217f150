"""How much memory a training step will take, and which batch fits, without running it.

The step is simulated on fake tensors (:mod:`revbifpn.memory`): the same ops, shapes and bytes, no arithmetic and no
device. At every moment t of it the memory alive is a line in the batch n, and the peak is the highest one,

    activations(n) = max_t (fixed_t + n * per_sample_t),
    total(n) = activations(n) + images(n) + parameters + gradients + optimizer,

so it bends where another moment takes over, and the steeper line wins as n grows. Batches up to a *limit* are simulated
as they are. Beyond it the peak is on the line through ``limit / 2`` and ``limit``: fake tensors cost nothing per
element, but the fused branches work through a batch in chunks of :func:`revbifpn.fused.chunk_bytes`, and every chunk is
ops to simulate. Chunks are constant there: the limit is where the peak is ``SATURATED`` of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from revbifpn import fused
from revbifpn.memory import StepMemory, measure_step

SMALLEST_LIMIT = 8  # samples
SATURATED = 32  # chunks in the peak, from which on chunks no longer grow with the batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training step, in bytes.

    Attributes:
        activations: peak of forward and backward, what :func:`revbifpn.memory.measure_step` calls ``peak_bytes``.
        images: of the batch.
        parameters: and buffers.
        gradients: of the parameters that want one.
        optimizer: its state.
    """

    activations: int
    images: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum: an upper bound of what is alive at once, since gradients arrive one by one."""
        return self.activations + self.images + self.parameters + self.gradients + self.optimizer


class StepEstimator:
    """The memory of training steps of one model at one resolution, at any batch.

    Args:
        model: anything that maps ``[N, C, H, W]`` to logits or a pyramid, on any device (meta as well); left as it is.
            C is its ``in_chans`` where it has that attribute, else 3.
        resolution: side of the square images, or ``(H, W)``, in pixels.
        dtype: float32, or bfloat16 / float16 for the forward under autocast of that dtype.
        optimizer_states: tensors that the optimizer keeps per parameter: 0 for SGD, 1 with momentum, 2 for Adam.
        device: type of device to train on, which sets the size of chunks; by default that of the model's parameters.

    Raises:
        ValueError: a resolution or dtype that the model or autocast does not take, ``optimizer_states`` below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        resolution: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        optimizer_states: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if optimizer_states < 0:
            raise ValueError(f"optimizer_states: got {optimizer_states}, needs at least 0")
        if device is None:
            device = next((p.device for p in model.parameters()), "cpu")
        sides = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(sides) != 2 or any(side < 1 for side in sides):
            raise ValueError(f"resolution: got {resolution}, needs a positive number of pixels or (height, width)")
        self.shape, self.dtype = (getattr(model, "in_chans", 3), *sides), dtype
        self._model = _without_data(model)
        self._state_bytes = optimizer_states * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self._chunk = fused.chunk_bytes(torch.device(device))
        self._steps: dict[int, StepMemory] = {}
        self._limit = 0

    def estimate(self, batch: int) -> MemoryEstimate:
        """The memory of a step at ``batch``.

        Raises:
            ValueError: batch below 1.
        """
        if batch < 1:
            raise ValueError(f"batch: got {batch}, needs at least 1")
        if batch <= SMALLEST_LIMIT or batch <= self._find_limit():
            return self._as_estimate(self._step(batch).peak_bytes, batch)
        peak, slope = self._line()
        return self._as_estimate(math.ceil(peak + slope * (batch - self._limit)), batch)

    def largest_batch(self, memory_bytes: float) -> int:
        """The largest batch with ``estimate(batch).total <= memory_bytes``; 0 where none fits.

        One sample is no batch where a norm that takes the batch's statistics has one value of it per channel.
        """
        limit = self._find_limit()
        total = self.estimate(limit).total
        if total <= memory_bytes:
            _, slope = self._line()
            per_sample = slope + self._step(limit).input_bytes / limit
            return limit + int((memory_bytes - total) / per_sample)
        fits, too_large, alone = 0, limit, True
        lower, upper = self._as_estimate(0, 0).total, total
        while too_large - fits > 1:  # the total is nearly a line between the two
            share = (memory_bytes - lower) / (upper - lower)
            batch = min(max(fits + 1, round(fits + share * (too_large - fits))), too_large - 1)
            try:
                total = self.estimate(batch).total
            except ValueError:
                if batch > 1:
                    raise
                fits, alone = 1, False
                continue
            if total <= memory_bytes:
                fits, lower = batch, total
            else:
                too_large, upper = batch, total
        return fits if alone or fits > 1 else 0

    def line_batches(self) -> tuple[int, ...]:
        """The batches that are simulated before any is asked for: the smallest limit, half the limit and the limit.

        :meth:`estimate` is exact at them, and beyond the last it is on the line through the last two.
        """
        limit = self._find_limit()
        return tuple(sorted({SMALLEST_LIMIT, limit // 2, limit}))

    def _step(self, batch: int) -> StepMemory:
        if batch not in self._steps:
            with fused.chunks_of(self._chunk):  # it runs on the CPU, for another device
                self._steps[batch] = measure_step(self._model, self.shape, batch=batch, dtype=self.dtype, fake=True)
        return self._steps[batch]

    def _find_limit(self) -> int:
        """The smallest ``8 * 2^i`` at which the peak is :data:`SATURATED` chunks, going by the peak at 8."""
        if not self._limit:
            doublings = math.log2(SATURATED * self._chunk / self._step(SMALLEST_LIMIT).peak_bytes)
            self._limit = SMALLEST_LIMIT * 2 ** max(0, math.ceil(doublings))
        return self._limit

    def _line(self) -> tuple[int, float]:
        """The peak at the limit, and its slope from half the limit, in bytes per sample."""
        limit = self._find_limit()
        half, full = self._step(limit // 2).peak_bytes, self._step(limit).peak_bytes
        return full, (full - half) / (limit - limit // 2)

    def _as_estimate(self, activations: int, batch: int) -> MemoryEstimate:
        known = next(iter(self._steps.values()))
        return MemoryEstimate(
            activations=activations,
            images=known.input_bytes // known.batch * batch,
            parameters=known.parameter_bytes + known.buffer_bytes,
            gradients=known.gradient_bytes,
            optimizer=self._state_bytes,
        )


def estimate_memory(
    model: nn.Module,
    batch: int,
    resolution: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    optimizer_states: int = 0,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """The memory of one training step (forward, loss, backward), without running it.

    ``total = activations + images + parameters + gradients + optimizer``, where the activations are the peak of a
    simulated step: equal to what :func:`revbifpn.memory.measure_step` meters up to a batch of 8 at least, a few per
    cent off beyond. Takes seconds. For several batches use one :class:`StepEstimator`.

    Not counted: what the allocator rounds up and keeps, the context of CUDA, workspaces inside kernels.

    Args:
        model: on any device, meta included; left as it is.
        batch: images in the step.
        resolution: side of the images in pixels, or ``(height, width)``.
        dtype: float32, or bfloat16 / float16 for the forward under autocast of that dtype.
        optimizer_states: tensors that the optimizer keeps per parameter: 0 for SGD, 1 with momentum, 2 for Adam.
        device: type of device to train on; by default that of the model's parameters.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> estimate_memory(revbifpn_s3(), 64, 288, optimizer_states=1, device="cuda").total / 2**30
    """
    return StepEstimator(model, resolution, dtype, optimizer_states=optimizer_states, device=device).estimate(batch)


def largest_batch(
    model: nn.Module,
    resolution: int | Sequence[int],
    dtype: torch.dtype,
    memory_bytes: float,
    *,
    optimizer_states: int = 0,
    device: torch.device | str | None = None,
) -> int:
    """The largest batch whose :func:`estimate_memory` has a ``total`` of at most ``memory_bytes``; 0: none fits."""
    estimator = StepEstimator(model, resolution, dtype, optimizer_states=optimizer_states, device=device)
    return estimator.largest_batch(memory_bytes)


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters and buffers are allocated but never written, so that they take no memory."""
    shells = {}
    for t in chain(model.parameters(), model.buffers()):
        shell = torch.empty_like(t, device="cpu")
        shells[id(t)] = nn.Parameter(shell, t.requires_grad) if isinstance(t, nn.Parameter) else shell
    return copy.deepcopy(model, shells)
