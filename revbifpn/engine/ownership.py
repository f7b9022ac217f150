"""Whether a gradient belongs to the node that autograd hands it to alone, which may write over it then."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def _references(g: Tensor) -> tuple[int, int, int]:
    """How many refer to it: to the tensor, in C++ and in Python, and to its memory."""
    uses = torch._C._storage_Use_Count(g.untyped_storage()._cdata)
    return g._use_count(), sys.getrefcount(g), uses  # type: ignore[attr-defined]


class _Probe(torch.autograd.Function):
    """Counts the references to a gradient that nobody else has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[tuple[int, int, int]]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_from_backward(g))
        return g, None


def _from_backward(g: Tensor) -> tuple[int, int, int]:
    """Called as :func:`is_own` is, whose argument is a reference too."""
    return _references(g)


@cache
def _alone() -> tuple[int, int, int] | None:
    """The references to such a gradient in ``backward(ctx, g)``; None where they cannot be counted."""
    found: list[tuple[int, int, int]] = []
    try:
        with _disable_current_modes(), torch.enable_grad():  # ordinary tensors, that nobody watches
            y = _Probe.apply(torch.ones(1, requires_grad=True), found)
            (2 * y).backward()
    except AttributeError:
        return None
    return found[0]


def prepare() -> None:
    """Count what :func:`is_own` compares with; to be called in ``forward``."""
    _alone()


def is_own(g: Tensor) -> bool:
    """Whether ``backward(ctx, g)``, which calls this, may write over g: no hook, no other node, no caller has it."""
    alone = _alone()
    return alone is not None and type(g) is Tensor and g.is_contiguous() and _references(g) == alone
