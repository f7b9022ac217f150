"""Helpers for the tests: which implementations of an op can run here, and errors as the field measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from revkernels import dispatch


def implementations(op: str, device: str = "cpu") -> Iterator[tuple[str, Callable]]:
    """Yield ``(name, callable)`` for every implementation of ``op`` that can run on ``device``."""
    where = torch.device(device)
    for name in dispatch.IMPLEMENTATIONS:
        if dispatch.can_run(op, name, where):
            yield name, dispatch.implementation(op, name, where)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``RMS(out - ref) / RMS(ref)`` in float64; NaN in ``out`` gives NaN, which passes no comparison."""
    out, ref = out.double(), ref.double()
    if ref.numel() == 0:
        return 0.0
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt().clamp_min(1e-30)).item()


def poison(bytes_: int = 1 << 22) -> None:
    """Fill a block of memory with NaN and free it, so that an output that a kernel leaves unwritten shows."""
    for size in (bytes_, bytes_ >> 4, bytes_ >> 8, bytes_ >> 12):
        torch.full((size // 4,), float("nan"))


# The same map in other memory layouts.


def contiguous(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def channel_half(t: Tensor) -> Tensor:
    """The second half of twice as many channels."""
    return torch.cat([t * 0, t], 1)[:, t.shape[1] :]


def channels_last(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last)


def every_second_column(t: Tensor) -> Tensor:
    return torch.stack([t, t * 0], -1).flatten(-2)[..., ::2]


def left_columns(t: Tensor) -> Tensor:
    """Rows with as many elements again between them."""
    return torch.cat([t, t * 0], -1)[..., : t.shape[-1]]


def transposed(t: Tensor) -> Tensor:
    """Columns outermost in memory, samples innermost."""
    return t.transpose(0, 3).contiguous().transpose(0, 3)


LAYOUTS = (contiguous, channel_half, channels_last, every_second_column, left_columns, transposed)
