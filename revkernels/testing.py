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
