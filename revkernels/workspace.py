"""How much memory the ops of an MBConv take besides their arguments: one uint8 tensor, made by their caller.

So every byte that grows with the batch is a tensor of PyTorch's, seen by its allocators, meters and fake tensors. The
ops take pieces of it one after another, each from a multiple of :data:`ALIGNMENT` bytes on (``csrc/mbconv.h``), and
refuse a workspace that is too small; the reference needs none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

ALIGNMENT = 64
SAMPLES_PER_PARTIAL = 8  # summed into one partial gradient of the depthwise weight


class MBConvShape(NamedTuple):
    """The sizes that the memory of an MBConv depends on, in elements; ``item`` and ``sums`` in bytes."""

    n: int
    c: int
    h: int
    w: int
    expanded: int  # E
    channels: int  # C'
    hidden: int  # R, 0 without squeeze-excite
    kernel: int
    stride: int
    chunk: int  # samples that are computed at a time
    expands: bool
    item: int  # size of an element of a plane
    sums: int  # of a sum
    scaled: bool = False  # the first convolution reads integers, through a copy of its weight
    converted: bool = False  # it reads a copy of x in the planes' dtype

    @property
    def inner(self) -> int:
        """Elements of one sample's e."""
        return self.expanded * self.h * self.w

    @property
    def area(self) -> int:
        """Pixels of p and d."""
        return -(-self.h // self.stride) * -(-self.w // self.stride)


def _total(*pieces: int) -> int:
    return sum(-(-piece // ALIGNMENT) * ALIGNMENT for piece in pieces)


def _squeezed(m: MBConvShape) -> int:
    return _total(m.n * m.expanded * m.sums, m.n * m.hidden * m.sums, m.n * m.expanded * m.sums) if m.hidden else 0


def _planes(m: MBConvShape, *, e: bool, d: bool) -> int:
    """What the planes of a chunk take; e, d: kept elsewhere."""
    samples = min(m.chunk, m.n)
    weight = m.expanded * (m.c if m.expands else m.kernel**2)
    return _total(
        weight * m.sums if m.scaled else 0,
        samples * m.c * m.h * m.w * m.item if m.converted else 0,
        samples * m.inner * m.item if m.expands and not e else 0,
        0 if d else samples * m.expanded * m.area * m.item,
        samples * m.hidden * m.sums,
    )


@lru_cache(maxsize=4096)
def mbconv_bytes(m: MBConvShape, *, batch: bool, d: bool) -> int:
    """Of ``mbconv``. ``batch``: a norm takes the batch's statistics; ``d``: is given."""
    planes = 0
    if batch:
        planes = _total(
            m.n * m.inner * m.item if m.expands else 0,
            0 if d else m.n * m.expanded * m.area * m.item,
            2 * m.n * max(m.expanded, m.channels) * 8,
        )
    return planes + _squeezed(m) + _planes(m, e=batch, d=batch or d)


@lru_cache(maxsize=4096)
def mbconv_recompute_bytes(m: MBConvShape, *, d: bool, e: bool) -> int:
    """Of ``mbconv_recompute``; d, e: are given."""
    return _planes(m, e=e, d=d)


@lru_cache(maxsize=4096)
def mbconv_backward_bytes(
    m: MBConvShape, *, sums: bool, p: bool, d: bool, e: bool, squeezed: bool, dz: bool, dx: bool, add: bool
) -> int:
    """Of ``mbconv_backward``; flags: the tensors are given; ``add`` as there."""
    samples, vector = min(m.chunk, m.n), m.n * m.expanded * m.sums
    out, inner = m.channels * m.area, m.expanded * m.area
    over_p = p and m.channels == m.expanded
    dz_again = not (dz or over_p or d or (m.expands and m.stride == 1))
    whole = _total(
        vector if m.hidden else 0,
        0 if sums else 2 * m.n * m.channels * m.sums,
        5 * vector,
        5 * vector if m.expands else 0,
        m.channels * m.sums,
        m.channels * m.sums,
        m.expanded * m.sums,
        m.expanded * m.sums,
        -(-samples // SAMPLES_PER_PARTIAL) * m.expanded * m.kernel**2 * m.sums,
        m.n * (m.expanded + 2 * m.hidden) * m.sums if m.hidden else 0,
        0 if dz or over_p else (samples if dz_again else m.n) * inner * m.item,
        samples * out * m.item if dz_again else 0,
        m.n * m.inner * m.item if m.expands and m.stride != 1 else 0,
    )
    sourced = not m.expands and dx and add and m.stride != 1
    passes = (
        _total(0 if dz_again else samples * out * m.item, 0 if p else samples * out * m.item),
        _total(samples * inner * m.item, samples * m.inner * m.item if sourced else 0),
        _total(samples * m.inner * m.item if m.expands else 0),
    )
    return (0 if squeezed else _squeezed(m)) + _planes(m, e=e, d=d) + whole + max(passes)
