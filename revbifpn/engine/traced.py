"""Tools that record a call as a graph of operations, to run it, to save it or to transform it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ordinary: ContextVar[bool] = ContextVar("ordinary", default=False)


def is_traced() -> bool:
    """Whether such a tool records this call, which then consists of PyTorch's ordinary operations alone.

    The tools are torch.compile, torch.export, torch.jit.trace and the transforms of torch.func. What they record keeps
    what its backward needs: nothing is recomputed, and streams are not rounded. The exception is a model that
    torch.compile trains, see :mod:`revbifpn.engine.region`.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or _ordinary.get()
    )


@contextmanager
def ordinary_operations() -> Iterator[None]:
    """Let :func:`is_traced` say so."""
    token = _ordinary.set(True)
    try:
        yield
    finally:
        _ordinary.reset(token)
