"""The memory behind an op's tensors, for the implementations in Python; ``csrc/storage.h`` is the same in C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from math import gcd
from typing import Any

from torch import FunctionSchema, Tensor

MOST_VISITS = 1 << 12


@lru_cache(4096)
def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one, counted in memory; 0 of an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _bytes(t: Tensor) -> int:
    """From the first to the last byte."""
    return _extent(t.shape, t.stride()) * t.itemsize


def check_storage(name: str, t: Tensor) -> None:
    """Refuse a view that reaches beyond its storage.

    Sharded training frees the storage of a parameter that is not in use and leaves its shape.
    """
    size = _bytes(t)
    needed = t.storage_offset() * t.itemsize + size
    if size and t.untyped_storage().nbytes() < needed:
        raise RuntimeError(
            f"{name}: expected a storage of at least {needed} bytes for a tensor of shape {list(t.shape)}, got "
            f"{t.untyped_storage().nbytes()}; its memory was freed or made smaller (untyped_storage().resize_(), or a "
            "parameter that FSDP has not gathered)"
        )


def _reaches(terms: list[tuple[int, int, int]], target: int) -> bool:
    """Whether ``sum_k step_k i_k = target`` with ``low_k <= i_k <= high_k``, for terms ``(step, low, high)``.

    True also where more than MOST_VISITS partial sums would have to be looked at, which they need not be where the
    steps are those of one tensor's dimensions.
    """
    terms = sorted(terms, reverse=True)
    visits = 0

    def search(k: int, target: int) -> bool:
        nonlocal visits
        visits += 1
        if k == len(terms):
            return target == 0
        if target % gcd(*(step for step, _, _ in terms[k:])):
            return False
        if visits > MOST_VISITS:
            return True
        step, low, high = terms[k]
        least = sum(step * low for step, low, _ in terms[k + 1 :])
        most = sum(step * high for step, _, high in terms[k + 1 :])
        first, last = max(low, -((most - target) // step)), min(high, (target - least) // step)
        return any(search(k + 1, target - step * i) for i in range(first, last + 1))

    return target == 0 or search(0, target)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common. Halves of one map's channels, which interleave in memory, do not."""
    if a.is_meta or b.is_meta:  # no memory, and all at address 0
        return False
    if a.data_ptr() >= b.data_ptr() + _bytes(b) or b.data_ptr() >= a.data_ptr() + _bytes(a):
        return False
    # Byte i of a's element u is byte j of b's element v where strides_a u + i - strides_b v - j = begin_b - begin_a.
    bounds: dict[int, tuple[int, int]] = {}
    for t, sign in ((a, 1), (b, -1)):
        dimensions = [(size, stride * t.itemsize) for size, stride in zip(t.shape, t.stride(), strict=True)]
        for size, step in [*dimensions, (t.itemsize, 1)]:
            if size > 1 and step > 0:
                low, high = bounds.get(step, (0, 0))
                bounds[step] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    return _reaches([(step, *bound) for step, bound in bounds.items()], b.data_ptr() - a.data_ptr())


class Extents:
    """How far an op's tensors reach: a quick answer for later calls on tensors of the same shapes and strides.

    Args:
        tensors: of the call.
        written: how many of them, the first ones, the op writes.
    """

    def __init__(self, tensors: Sequence[Tensor | None], written: int) -> None:
        self.sizes, self.written = [0 if t is None else _bytes(t) for t in tensors], written

    def are_apart(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether all lie in their storages, and what is written beside the others; False may also mean "perhaps"."""
        spans = []
        for t, size in zip(tensors, self.sizes, strict=True):
            if size and t is not None:
                if t.storage_offset() * t.itemsize + size > t.untyped_storage().nbytes():
                    return False
                begin = t.data_ptr()
                spans.append((begin, begin + size))
        for i, (begin, end) in enumerate(spans[: self.written]):
            for other_begin, other_end in spans[i + 1 :]:
                if begin < other_end and other_begin < end:
                    return False
        return True


def check_apart(written: Sequence[str], tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse that an op writes what another argument holds."""
    spans = [(name, t, t.data_ptr(), t.data_ptr() + _bytes(t)) for name, t in tensors]
    for name, t, begin, end in spans:
        if name not in written:
            continue
        for other, held, other_begin, other_end in spans:
            if begin < other_end and other_begin < end and other != name and share_memory(t, held):
                raise RuntimeError(
                    f"{name}: expected memory of its own, as the op writes it, but it shares some with {other}"
                )


def checked(schema: FunctionSchema, call: Callable, *, apart: bool = True) -> Callable:
    """``call``, an implementation of ``schema``, after the checks of its tensors; ``apart``: of both kinds."""
    names = [argument.name for argument in schema.arguments]
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    @wraps(call)
    def run(*arguments: Any, **keywords: Any) -> Any:
        tensors = []
        for name, value in [*zip(names, arguments, strict=False), *keywords.items()]:
            if isinstance(value, Tensor):
                tensors.append((name, value))
            elif isinstance(value, (list, tuple)):
                tensors += [(f"{name}[{k}]", v) for k, v in enumerate(value) if isinstance(v, Tensor)]
        for name, tensor in tensors:
            check_storage(name, tensor)
        if apart and written:
            check_apart(written, tensors)
        return call(*arguments, **keywords)

    return run
