"""Steps whose maps are allocated but not computed: the bytes of a step that would take minutes.

Fake tensors have no values, and a detector's step asks for some: which anchors match, which boxes remain. Here boxes
and the like are computed, and maps are zeros in memory that nobody touches, which costs neither time nor pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Never computed.
PRODUCTS = (
    *(aten.convolution, aten.convolution_backward, aten.addmm, aten.mm, aten.bmm),
    *(aten.native_batch_norm, aten.native_batch_norm_backward, aten.native_group_norm, aten.native_group_norm_backward),
)
KERNELS = ("revkernels", "torchvision::roi_align", "torchvision::_roi_align_backward")
MAP = 2**14  # elements, from which on a tensor [N, C, H, W] is a map
_MMAP_THRESHOLD = -3  # of glibc's mallopt


class WithoutArithmetic(TorchDispatchMode):
    """Context manager: products, kernels and operations on maps give zeros, or leave what they write to as it is."""

    def __enter__(self) -> WithoutArithmetic:
        with suppress(OSError, AttributeError):  # another libc: the same bytes, in pages that are touched
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)  # larger zeros are fresh pages of the system
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS or func.name().startswith(KERNELS) or _is_of_maps(func, args):
            return _allocated(func, args, kwargs)
        return func(*args, **kwargs)


def _is_of_maps(func: Any, args: tuple[Any, ...]) -> bool:
    given = (t for t in tree_leaves(args) if isinstance(t, Tensor))
    return (
        func.namespace == "aten"
        and not func.is_view
        and any(t.dim() == 4 and t.numel() >= MAP and t.is_floating_point() and not t.is_sparse for t in given)
    )


def _allocated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``func`` would return: arguments that it writes to as they are, other tensors new."""
    shapes = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
    if not isinstance(shapes, (tuple, list)):
        shapes = (shapes,)
    if func.overloadpacket is aten.native_batch_norm and not args[5]:  # on a CPU, running statistics are not returned
        shapes = shapes[0], *(statistics.new_empty(0) for statistics in shapes[1:])
    returns, found = func._schema.returns, []
    for declared, shape in zip(returns, shapes, strict=False):
        alias = declared.alias_info
        if alias is not None and alias.is_write:
            found.append(_written(func, alias.before_set, args, kwargs))
        else:
            found.append(tree_map(_new, shape))
    return None if not returns else found[0] if len(returns) == 1 else tuple(found)


def _written(func: Any, alias: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == alias:
            return args[i] if i < len(args) else kwargs[argument.name]
    raise AssertionError(f"{func}: no argument for its result {alias}")


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _new(shape: Any) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    if not shape.numel():
        return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
    buffer = torch.from_numpy(numpy.zeros(shape.untyped_storage().nbytes(), numpy.uint8))
    return buffer.view(shape.dtype).as_strided(shape.shape, shape.stride())
