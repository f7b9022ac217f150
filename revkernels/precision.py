"""Products of float32 on CUDA, in the precision that PyTorch's own 1x1 convolutions have.

The 1x1 convolutions are products of cuBLAS here, and PyTorch has one setting for products
(``torch.backends.cuda.matmul.fp32_precision``) and another for convolutions
(``torch.backends.cudnn.conv.fp32_precision``, what ``torch.backends.cudnn.allow_tf32`` sets; TF32 by default).
"""

from __future__ import annotations

import threading

import torch

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


def convolution_precision(device: torch.device, dtype: torch.dtype) -> str | None:
    """What convolutions of such maps compute in: ``"tf32"``, ``"ieee"`` or ``"none"``; None: it does not matter."""
    return _get("cuda", "conv") if device.type == "cuda" and dtype == torch.float32 else None


class products_in:  # noqa: N801  a context manager
    """Within, products of cuBLAS have this precision, in all threads, as the setting is the process's; None: as it is.

    Threads that are within at the same time (a backward on several devices) share the precision of the first one, and
    the last one to leave restores what was before.
    """

    _lock = threading.Lock()
    _users = 0
    _before = ""

    def __init__(self, precision: str | None) -> None:
        self.precision = precision

    def __enter__(self) -> None:
        if self.precision is None:
            return
        cls = products_in
        with cls._lock:
            if cls._users == 0:
                cls._before = _get("cuda", "matmul")
                if cls._before != self.precision:
                    _set("cuda", "matmul", self.precision)
            cls._users += 1

    def __exit__(self, *_: object) -> None:
        if self.precision is None:
            return
        cls = products_in
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and _get("cuda", "matmul") != cls._before:
                _set("cuda", "matmul", cls._before)
