"""Products of float32 on CUDA, in the precision that PyTorch's own 1x1 convolutions have.

The 1x1 convolutions are products of cuBLAS here, and PyTorch has one setting for products
(``torch.backends.cuda.matmul.fp32_precision``) and another for convolutions
(``torch.backends.cudnn.conv.fp32_precision``, what ``torch.backends.cudnn.allow_tf32`` sets; TF32 by default).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

R = TypeVar("R")

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter

_lock = threading.Lock()
_users = 0  # threads that are in with_products_in
_before = ""  # what the first of them found


def convolution_precision(device: torch.device, dtype: torch.dtype) -> str | None:
    """What convolutions of such maps compute in: ``"tf32"``, ``"ieee"`` or ``"none"``; None: it does not matter."""
    return _get("cuda", "conv") if device.type == "cuda" and dtype == torch.float32 else None


def with_products_in(precision: str | None, call: Callable[..., R], *arguments: Any) -> R:
    """``call(*arguments)``, with products of cuBLAS in this precision; None: as it is set.

    The setting is the process's, and so holds in all threads. Threads that are in here at the same time (a backward on
    several devices) share the precision of the first one, and the last one to leave restores what was before.
    """
    if precision is None:
        return call(*arguments)
    _enter(precision)
    try:
        return call(*arguments)
    finally:
        _leave()


def _enter(precision: str) -> None:
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _get("cuda", "matmul")
            if _before != precision:
                _set("cuda", "matmul", precision)
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and _get("cuda", "matmul") != _before:
            _set("cuda", "matmul", _before)
