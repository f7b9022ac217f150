"""What the kernels share: how maps are walked in tiles, their heights and widths, and the folding of partial sums.

Grammar: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointers, ``b_`` block in registers, CAPITALS for
sizes and compile-time constants. A tile is ``[BLOCK_R rows, BLOCK_W pixels]``; a row is one ``(n, c, h)``. A plane
without gaps counts as one long row (``H = 1``), so that most kernels see whole planes and load 16 bytes at a time.

Sums are split over programs by the size of a plane alone, never by N: a sample's result does not depend on its batch.
Kernels are compiled without contraction of ``a * b + c``; where one rounding is meant, ``tl.fma`` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.triton.plan import Plan, Planned

MAX_VEC = 8  # elements: 16 bytes of the narrowest dtype
# Arguments that no kernel is specialised on: another batch or image size compiles nothing.
SIZES = ("rows", "C", "H", "W", "planes", "steps", "overlaps", "size", "splits", "parts", "counts")
PIXELS_PER_PROGRAM = 16384  # of one row of tiles, beyond which a sum is split
Strides = tuple[int, int, int, int]


class Planes(NamedTuple):
    """Maps of one shape as kernels walk them: ``height`` rows of ``width`` pixels per plane."""

    height: int
    width: int
    strides: tuple[Strides, ...]
    vec: int  # elements that every row of every map starts and ends at a multiple of


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def _strides(shape: Sequence[int], stride: Sequence[int]) -> Strides:
    n, c, h, w = (s if size > 1 else 0 for s, size in zip(stride, shape, strict=True))
    return n, c, h, w


def strides_of(x: Tensor) -> Strides:
    """Strides in elements, 0 where the size is 1: such a stride is arbitrary and would spoil alignment."""
    return _strides(x.shape, x.stride())


def _pixel_stride(h: int, w: int, stride: Sequence[int]) -> int | None:
    """Distance of neighbouring pixels of a plane without gaps between its rows, else None."""
    if w == 1:
        return stride[2]
    return stride[3] if h == 1 or stride[2] == w * stride[3] else None


def planes_of(*maps: Tensor, flatten: bool = True) -> Planes:
    """The common walk over maps ``[N, C, H, W]`` of one shape, as long rows where all of them allow it."""
    return _planes(maps[0].shape, tuple(x.stride() for x in maps), flatten)


@lru_cache(4096)
def _planes(shape: torch.Size, stride: tuple[Strides, ...], flatten: bool) -> Planes:
    height, width = shape[2:]
    strides = [_strides(shape, s) for s in stride]
    steps = [step for step in (_pixel_stride(height, width, s) for s in stride) if step is not None]
    if flatten and len(steps) == len(stride):
        height, width = 1, height * width
        strides = [(s[0], s[1], 0, step) for s, step in zip(strides, steps, strict=True)]
    if width == 1:
        strides = [(*s[:3], 1) for s in strides]
    if any(s[3] != 1 for s in strides):
        return Planes(height, width, tuple(strides), 1)
    return Planes(height, width, tuple(strides), gcd(MAX_VEC, width, *(step for s in strides for step in s[:3])))


def vector_row(v: Tensor | None) -> int:
    """Elements from one sample to the next of a contiguous ``[N, C]``; 0 for ``[C]``, shared by all samples."""
    return v.shape[1] if v is not None and v.dim() == 2 else 0


def contiguous(v: Tensor | None) -> Tensor | None:
    """A per-channel vector without gaps."""
    return None if v is None else v.contiguous()


def accumulator(x: Tensor) -> tl.dtype:
    """Triton's name of ``accumulate_dtype(x.dtype)``."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def specialised_on_nothing(strides: Iterable[int]) -> tuple[int, ...]:
    """Strides as a kernel takes them in a tuple; :func:`decoded` there.

    Triton makes an integer of a tuple a constant where it is 1, and compiles anew where 16 begins or ends to divide
    it, whatever ``do_not_specialize`` says. ``-1 - 2 s`` is neither.
    """
    return tuple(-1 - 2 * s for s in strides)


@triton.jit
def decoded(code):
    """The number that :func:`specialised_on_nothing` made ``code`` of."""
    return (-1 - code) // 2


@triton.jit
def strides_in(code, VEC: tl.constexpr):
    """The strides of a map from their codes; with ``VEC > 1`` its pixels are neighbours."""
    if VEC > 1:
        out = (decoded(code[0]), decoded(code[1]), decoded(code[2]), 1)
    else:
        out = (decoded(code[0]), decoded(code[1]), decoded(code[2]), decoded(code[3]))
    return out


@triton.jit
def tile(W, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows ``[BLOCK_R, 1]`` and pixels ``[1, BLOCK_W]`` of this program's tile; programs walk along rows first."""
    i = tl.program_id(0)
    blocks = tl.cdiv(W, BLOCK_W)
    o_r = (i // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_w = (i % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    return o_r, o_w


@triton.jit
def coordinates(o_r, C, H):
    """``(n, c, h)`` of a row."""
    return o_r // H // C, o_r // H % C, o_r % H


@triton.jit
def offset(n, c, h, strides, VEC: tl.constexpr):
    """Element offset of a row. VEC divides the strides: said by the multiplication, as the compiler cannot see it."""
    at_n = n.to(tl.int64) * (strides[0] // VEC)
    at_c = c.to(tl.int64) * (strides[1] // VEC)
    at_h = h.to(tl.int64) * (strides[2] // VEC)
    return (at_n + at_c + at_h) * VEC


@triton.jit
def load_vector(v, v_row, n, c, m, ACC: tl.constexpr):
    """``v[c]`` or ``v[n, c]`` for each row of the tile, in the accumulation dtype; 0 where masked."""
    p_v = v + n.to(tl.int64) * v_row + c
    return (tl.load(p_v) if m is None else tl.load(p_v, m, 0.0)).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def _fold_kernel(out, partial, size, splits, ACC: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = sum_s partial[s, i]``, always in the same order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    o_s = tl.arange(0, SPLITS)[:, None]
    b_sum = tl.zeros([SPLITS, BLOCK], ACC)
    for s in range(0, splits, SPLITS):
        m = (s + o_s < splits) & (o < size)
        b_sum += tl.load(partial + (s + o_s).to(tl.int64) * size + o, mask=m, other=0.0)
    tl.store(out + o, tl.sum(b_sum, 0, keep_dims=True), mask=o < size)


_fold = Planned(_fold_kernel)


def _fold_plan(out: Tensor, splits: int) -> Plan:
    size, block = out.numel(), 64
    return Plan(ceil_div(size, block), dict(size=size, splits=splits, ACC=accumulator(out), SPLITS=8, BLOCK=block))


def prepare_fold(out: Tensor) -> None:
    """Compile :func:`fold`: a sum of this size may need no folding, and that of another image may."""
    _fold.prepare(_fold_plan(out, 2), out, out)


def split_buffer(out: Tensor, splits: int) -> Tensor:
    """Where ``splits`` programs leave their share of the sums: the output itself when there is one."""
    return out if splits == 1 else out.new_empty(splits, *out.shape)


def fold(out: Tensor, partial: Tensor) -> None:
    """Add up what :func:`split_buffer` gave out."""
    if partial is not out:
        splits = partial.shape[0]
        _fold((out.get_device(), out.numel(), splits, out.dtype), lambda: _fold_plan(out, splits), out, partial)
