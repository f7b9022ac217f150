"""The additive coupling and its adjoint: every contribution to a stream in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.reference import accumulate_dtype
from revkernels.registry import memory_check
from revkernels.triton.plan import Guard, Plan, Planned, on_device_of, seen
from revkernels.triton.tiles import (
    MAX_VEC,
    PIXELS_PER_PROGRAM,
    SIZES,
    Planes,
    accumulator,
    ceil_div,
    contiguous,
    coordinates,
    decoded,
    fold,
    load_vector,
    offset,
    planes_of,
    prepare_fold,
    specialised_on_nothing,
    split_buffer,
    strides_in,
    strides_of,
    tile,
    vector_row,
)

# Tiles depend on nothing but the dtype, so that another image size compiles nothing.
IDENTITY_TILE = (32, 64)  # rows, pixels; half the rows where elements are loaded one by one
UPSAMPLED_TILE = (16, 32)  # pixels of a plane: with all factors, two warps of 8 pixels a thread
ADJOINT_IDENTITY_TILE = (4, 256)  # half the rows likewise
ADJOINT_UPSAMPLED_TILE = (16, 64)  # two warps; wider maps in blocks that overlap, by at least two source pixels
ADJOINT_HALO = 8  # pixels on either side: the largest factor, and 16 bytes of the narrowest dtype


@triton.jit
def _lerp(a, b, w):
    return tl.fma(b - a, w, a)


@triton.jit
def _phase(left, mid, right, R: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr):
    """Output column ``F q + R`` out of the columns ``q - 1, q, q + 1``: ``s = q + (R + 1/2) / F - 1/2``."""
    if 2 * R + 1 < F:
        out = _lerp(left, mid, tl.full([], (2 * R + 1 + F) / (2 * F), ACC))
    else:
        out = _lerp(mid, right, tl.full([], (2 * R + 1 - F) / (2 * F), ACC))
    return out


@triton.jit
def _phases(left, mid, right, F: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr):
    """Phases START and START + STEP, interleaved."""
    a = _phase(left, mid, right, START, F, ACC)
    return tl.interleave(a, _phase(left, mid, right, START + STEP, F, ACC))


@triton.jit
def _upsampled(
    p, strides, h, i_w, height, width, F: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, BLOCK_W: tl.constexpr
):
    """``up_F`` of the plane at p on rows h ``[BLOCK_H, 1]`` and columns ``i_w BLOCK_W + [0, BLOCK_W)``.

    Rows ``h_0, h_1`` are gathered for each output row; columns are loaded once per source pixel, with both neighbours,
    and spread to F phases in registers. All weights are multiples of ``1 / 2F``: exact.
    """
    if BILINEAR:
        o_q = i_w * (BLOCK_W // F) + tl.arange(0, BLOCK_W // F)[None, :]
        m = (h < height * F) & (o_q < width)
        t = 2 * h + 1 + F
        w = (t % (2 * F)).to(ACC) / (2 * F)
        p_0 = p + tl.maximum(t // (2 * F) - 1, 0).to(tl.int64) * strides[2] + o_q.to(tl.int64) * strides[3]
        p_1 = p + tl.minimum(t // (2 * F), height - 1).to(tl.int64) * strides[2] + o_q.to(tl.int64) * strides[3]
        mid = _lerp(tl.load(p_0, m, 0.0).to(ACC), tl.load(p_1, m, 0.0).to(ACC), w)
        m_l, m_r = m & (o_q > 0), m & (o_q < width - 1)
        left = _lerp(tl.load(p_0 - strides[3], m_l, 0.0).to(ACC), tl.load(p_1 - strides[3], m_l, 0.0).to(ACC), w)
        right = _lerp(tl.load(p_0 + strides[3], m_r, 0.0).to(ACC), tl.load(p_1 + strides[3], m_r, 0.0).to(ACC), w)
        left = tl.where(o_q > 0, left, mid)
        right = tl.where(o_q < width - 1, right, mid)
        if F == 2:
            out = _phases(left, mid, right, F, 0, 1, ACC)
        elif F == 4:
            even = _phases(left, mid, right, F, 0, 2, ACC)
            out = tl.interleave(even, _phases(left, mid, right, F, 1, 2, ACC))
        else:
            even = tl.interleave(_phases(left, mid, right, F, 0, 4, ACC), _phases(left, mid, right, F, 2, 4, ACC))
            odd = tl.interleave(_phases(left, mid, right, F, 1, 4, ACC), _phases(left, mid, right, F, 3, 4, ACC))
            out = tl.interleave(even, odd)
    else:
        o_q = (i_w * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]) // F
        p_q = p + (h // F).to(tl.int64) * strides[2] + o_q.to(tl.int64) * strides[3]
        out = tl.load(p_q, (h < height * F) & (o_q < width), 0.0).to(ACC)
    return out


@triton.jit
def _given(m, k: tl.constexpr, parts):
    """m, where part k of a kernel for several is one of the ``parts`` of this launch; what is not is loaded as 0."""
    return m if k == 0 else tl.where(m, parts, 0) > k


@triton.jit
def _shifts(
    shift, shift_row, n, c, m, parts, PARTS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``sum_k b_k`` over ``parts``, where the total of a tile starts from; with a single plane m is None.

    ``PARTS`` is the length of shift, which Triton 3.6 does not know where one of them is None.
    """
    b_total = tl.zeros([ROWS, COLUMNS], ACC)
    for k in tl.static_range(PARTS):
        if shift[k] is not None:
            m_k = None if m is None else _given(m, k, parts)
            b_total += load_vector(shift[k], decoded(shift_row[k]), n, c, m_k, ACC)
    return b_total


@triton.jit
def _add_scaled(b_total, b_p, scale, scale_row, n, c, m, ACC: tl.constexpr):
    """``total + a p``."""
    if scale is not None:
        b_total = tl.fma(b_p, load_vector(scale, decoded(scale_row), n, c, m, ACC), b_total)
    else:
        b_total += b_p
    return b_total


@triton.jit
def _rint(x, ACC: tl.constexpr):
    """To the nearest integer, ties to even: a sum from ``2^23`` (``2^52``) on has no bits for a fraction."""
    WHOLE: tl.constexpr = 2.0**52 if ACC == tl.float64 else 2.0**23
    size = tl.abs(x)
    size = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def _coupled(b_y, b_total, m, overflow, counts, sign, units, GRID: tl.constexpr, ACC: tl.constexpr):
    """``y +/- total``; on a grid ``y +/- q 2^-g`` or ``wrap16(y +/- q)``, ``q = rint(2^g total)``; counts overflows."""
    if not GRID:
        out = b_y.to(ACC) + sign * b_total
    else:
        b_q = _rint(b_total * (sign * units), ACC)
        if b_y.dtype == tl.int16:
            m_fits = tl.abs(b_q) < 2.0**31
            b_q = tl.where(m_fits, b_q, 0.0).to(tl.int32)  # saturated at 2^31, that is at 0 modulo 2^16
            b_y = b_y.to(tl.int32)
            out = b_y + (b_q & 0xFFFF)  # its low half is stored
            m_outside = (b_q > 32767 - b_y) | (b_q < -32768 - b_y) | (m_fits == 0)
        else:
            LIMIT: tl.constexpr = 2.0**53 if ACC == tl.float64 else 2.0**24
            out = b_y + b_q * (1.0 / units)
            m_outside = (tl.abs(out) < LIMIT / units) == 0
        if counts:
            count = tl.sum((m_outside & m).to(tl.int32))
            tl.atomic_add(overflow, count.to(tl.int64), mask=count > 0, sem="relaxed")
    return out


@triton.jit(do_not_specialize=SIZES)
def _couple_identity_kernel(
    y, p, scale, shift, overflow, y_strides, p_strides, scale_row, shift_row, rows, C, H, W, parts, counts, sign, units,
    GRID: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``y <- y +/- sum_k (a_k p_k + b_k)`` of ``parts``, rounded to ACC, and to the grid, before it meets y.

    Per element: read y, write y, read each p_k; ``1 + 2 K`` FLOPs. Bound: memory bandwidth.
    """
    o_r, o_w = tile(W, BLOCK_R, BLOCK_W)
    n, c, h = coordinates(o_r, C, H)
    m_r = o_r < rows
    m = m_r & (o_w < W // VEC * VEC)
    o_x = o_w.to(tl.int64)
    y_strides = strides_in(y_strides, VEC)
    p_y = y + offset(n, c, h, y_strides, VEC) + o_x * y_strides[3]
    b_y = tl.load(p_y, m, 0)
    b_total = _shifts(shift, shift_row, n, c, m_r, parts, len(p), ACC, BLOCK_R, BLOCK_W)
    for k in tl.static_range(len(p)):
        strides = strides_in(p_strides[k], VEC)
        b_p = tl.load(p[k] + offset(n, c, h, strides, VEC) + o_x * strides[3], _given(m, k, parts), 0.0).to(ACC)
        b_total = _add_scaled(b_total, b_p, scale[k], scale_row[k], n, c, _given(m_r, k, parts), ACC)
    b_y = _coupled(b_y, b_total, m, overflow, counts, sign, units, GRID, ACC)
    tl.store(p_y, b_y.to(y.dtype.element_ty), m)


@triton.jit(do_not_specialize=SIZES)
def _couple_upsampled_kernel(
    y, p, scale, shift, overflow, y_strides, p_strides, scale_row, shift_row, C, H, W, counts, sign, units,
    FACTORS: tl.constexpr, BILINEAR: tl.constexpr, GRID: tl.constexpr, ACC: tl.constexpr,
    VEC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``y <- y +/- sum_k (a_k up_{f_k}(p_k) + b_k)``, equal to ``up(a p + b)`` as the weights of a pixel sum to 1.

    Per element: read y, write y, ``sum_k 1 / f_k^2`` reads of p; ``1 + 2 K`` FLOPs and ``1 + 7 / f_k`` per upsampling.
    Bound: memory bandwidth. One program takes ``BLOCK_H x BLOCK_W`` pixels of one plane.
    """
    blocks_w = tl.cdiv(W, BLOCK_W)
    blocks = tl.cdiv(H, BLOCK_H) * blocks_w
    plane = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks
    i_w = i % blocks_w
    n, c = plane // C, plane % C
    h = (i // blocks_w) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    m = (h < H) & (o_w < W // VEC * VEC)
    o_x = o_w.to(tl.int64)
    y_strides = strides_in(y_strides, VEC)
    p_y = y + offset(n, c, h, y_strides, VEC) + o_x * y_strides[3]
    b_y = tl.load(p_y, m, 0)
    b_total = _shifts(shift, shift_row, n, c, None, len(FACTORS), len(FACTORS), ACC, BLOCK_H, BLOCK_W)
    for k in tl.static_range(len(FACTORS)):
        if FACTORS[k] == 1:
            strides = strides_in(p_strides[k], VEC)
            b_p = tl.load(p[k] + offset(n, c, h, strides, VEC) + o_x * strides[3], m, 0.0).to(ACC)
        else:
            strides = strides_in(p_strides[k], 1)
            p_k = p[k] + offset(n, c, n * 0, strides, 1)
            b_p = _upsampled(
                p_k, strides, h, i_w, H // FACTORS[k], W // FACTORS[k], FACTORS[k], BILINEAR, ACC, BLOCK_W
            )  # fmt: skip
        b_total = _add_scaled(b_total, b_p, scale[k], scale_row[k], n, c, None, ACC)
    b_y = _coupled(b_y, b_total, m, overflow, counts, sign, units, GRID, ACC)
    tl.store(p_y, b_y.to(y.dtype.element_ty), m)


def couple_(
    y: Tensor,
    p: Sequence[Tensor],
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    factors: Sequence[int],
    mode: str,
    subtract: bool,
    fraction_bits: int | None = None,
    overflow: Tensor | None = None,
) -> None:
    """One launch, any number of contributions; see :func:`revkernels.reference.couple_`."""
    _launch(y, p, scale, shift, factors, mode, subtract, fraction_bits, overflow)


def couple_for_native_(*arguments: Any) -> tuple[str, str]:
    """:func:`couple_` with one more argument: whether the recipe of its launch is wanted, for ``csrc/cuda/couple.cpp``.

    Returns it, or nothing; and an error, which C++ would get without its message.
    """
    try:
        return _launch(*arguments), ""
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"


def _launch(
    y: Tensor,
    p: Sequence[Tensor],
    scale: Sequence[Tensor | None],
    shift: Sequence[Tensor | None],
    factors: Sequence[int],
    mode: str,
    subtract: bool,
    fraction_bits: int | None = None,
    overflow: Tensor | None = None,
    wanted: bool = False,
) -> str:
    """The launch, and if wanted its recipe, whose tensors are numbered as in ``y, overflow, *p, *scale, *shift``."""
    tensors = (y, overflow, *p, *scale, *shift)
    key = (y.get_device(), tuple(map(seen, tensors)), len(p), tuple(factors), mode, subtract, fraction_bits)
    _guard(key, tensors, y, p, scale, shift, factors, mode, subtract, fraction_bits, overflow)
    if y.numel() == 0 or not p:
        return ""
    parts, identity = len(p), set(factors) == {1}
    given: tuple[Iterable, ...] = (p, map(contiguous, scale), map(contiguous, shift))
    ps, scales, shifts = (_slots(values) if identity else tuple(values) for values in given)
    same = range(len(ps)) if identity else [k for k, f in enumerate(factors) if f == 1]
    counts = overflow is not None
    overflow = overflow if counts else _nothing(y.device)

    def plan() -> Plan:
        n, c = y.shape[:2]
        walk = planes_of(y, *(ps[k] for k in same), flatten=identity)
        p_strides = [strides_of(p_k) for p_k in ps]
        for k, strides in zip(same, walk.strides[1:], strict=True):
            p_strides[k] = strides
        constants = dict(
            y_strides=specialised_on_nothing(walk.strides[0]),
            p_strides=tuple(map(specialised_on_nothing, p_strides)),
            scale_row=specialised_on_nothing(map(vector_row, scales)),
            shift_row=specialised_on_nothing(map(vector_row, shifts)),
            C=c,
            H=walk.height,
            W=walk.width,
            counts=int(counts),
            sign=-1.0 if subtract else 1.0,
            units=2.0 ** (fraction_bits or 0),
            GRID=fraction_bits is not None,
            ACC=accumulator(y),
        )
        if identity:
            rows, (used, other) = n * c * walk.height, _tiles(IDENTITY_TILE, walk, y, parts)
            programs = ceil_div(rows, used["BLOCK_R"]) * ceil_div(walk.width, used["BLOCK_W"])
            return Plan(programs, constants | dict(rows=rows, parts=parts) | used, also=other)
        block_h, block_w = UPSAMPLED_TILE
        constants |= dict(FACTORS=tuple(factors), BILINEAR=mode == "bilinear", BLOCK_H=block_h, BLOCK_W=block_w)
        constants |= dict(VEC=_vector(walk, y, max(factors)))
        programs = n * c * ceil_div(walk.height, block_h) * ceil_div(walk.width, block_w)
        return Plan(programs, constants, num_warps=2)

    with on_device_of(y):
        launch = (_couple_identity if identity else _couple_upsampled)(key, plan, y, ps, scales, shifts, overflow)
    if not wanted or launch is None or any(contiguous(v) is not v for v in (*scale, *shift)):
        return ""
    numbers = iter(range(2, len(tensors)))
    sources: Iterable[tuple] = (tuple(islice(numbers, len(values))) for values in (p, scale, shift))
    return launch.recipe(0, *(_slots(of) if identity else of for of in sources), 1 if counts else None)


def _slots(values: Iterable) -> tuple:
    """One part, or a multiple of three with the last one again: kernels are compiled for no other number."""
    values = tuple(values)
    return values if len(values) == 1 else (*values, *values[-1:] * (-len(values) % 3))


@lru_cache
def _nothing(device: torch.device) -> Tensor:
    """What stands for an ``overflow`` that is not counted."""
    return torch.empty(0, dtype=torch.int64, device=device)


def _vector(walk: Planes, x: Tensor, most: int = MAX_VEC) -> int:
    """Elements of x that make 16 bytes, at most ``most``, where every row starts and ends at a multiple, else 1."""
    vec = min(16 // x.element_size(), most)
    return vec if walk.vec % vec == 0 else 1


def _tiles(size: tuple[int, int], walk: Planes, x: Tensor, parts: int) -> tuple[dict[str, int], dict[str, int] | None]:
    """The tile of rows that fits a walk over x, and the one that another size of image may need.

    Several parts without upsampling meet on a pyramid's lowest levels, whose planes seldom have rows of 16 bytes.
    """
    vec, (block_r, block_w) = 16 // x.element_size(), size
    wide = dict(VEC=vec, BLOCK_R=block_r, BLOCK_W=block_w)
    narrow = dict(VEC=1, BLOCK_R=max(2, block_r // (2 if parts == 1 else 4)), BLOCK_W=block_w)
    if parts > 1:
        return narrow, None
    return (wide, narrow) if _vector(walk, x) > 1 else (narrow, wide)


_couple_identity, _couple_upsampled = Planned(_couple_identity_kernel), Planned(_couple_upsampled_kernel)
_guard = Guard(memory_check("couple_"), written=2)
_adjoint_guard = Guard(memory_check("couple_adjoint"), written=0)


@triton.jit(do_not_specialize=SIZES)
def _couple_adjoint_identity_kernel(
    dy, p, center, sums, dy_strides, p_strides, center_row, rows, C, H, W, steps, parts,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``sums[k, :, n, c] = (sum_hw dy, sum_hw dy (p_k - m_k))`` for the ``parts`` that are not upsampled.

    Bytes per element: read dy, read each p_k. FLOPs: ``1 + 3 K``. Bound: memory bandwidth.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    splits = tl.cdiv(H * blocks, steps)
    i_r = tl.program_id(0) // splits
    i_s = tl.program_id(0) % splits
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    n, c, h = coordinates(o_r, C, 1)
    m_r = o_r < rows
    dy_strides = strides_in(dy_strides, VEC)
    b_sum = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    b_dots = ()
    for _ in tl.static_range(len(p)):
        b_dots = b_dots + (tl.zeros([BLOCK_R, BLOCK_W], ACC),)  # type: ignore[assignment]  # unrolled: it grows
    for i in range(i_s * steps, tl.minimum((i_s + 1) * steps, H * blocks)):
        o_w = (i % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        m = m_r & (o_w < W // VEC * VEC)
        h_i = h + i // blocks
        o_x = o_w.to(tl.int64)
        b_dy = tl.load(dy + offset(n, c, h_i, dy_strides, VEC) + o_x * dy_strides[3], m, 0.0).to(ACC)
        b_sum += b_dy
        b_new = ()
        for k in tl.static_range(len(p)):
            strides = strides_in(p_strides[k], VEC)
            m_k = _given(m, k, parts)
            b_p = tl.load(p[k] + offset(n, c, h_i, strides, VEC) + o_x * strides[3], m_k, 0.0).to(ACC)
            if center[k] is not None:
                b_p = b_p - load_vector(center[k], decoded(center_row[k]), n, c, m_r, ACC)
            b_new = b_new + (tl.fma(b_dy, b_p, b_dots[k]),)  # type: ignore[assignment]  # likewise
        b_dots = b_new
    p_sums = sums + i_s.to(tl.int64) * (2 * parts * rows) + o_r
    b_sum = tl.sum(b_sum, 1, keep_dims=True)
    for k in tl.static_range(len(p)):
        m_k = _given(m_r, k, parts)
        tl.store(p_sums + 2 * k * rows, b_sum, m_k)
        tl.store(p_sums + (2 * k + 1) * rows, tl.sum(b_dots[k], 1, keep_dims=True), m_k)


def _adjoint_identity(dy: Tensor, p: Sequence[Tensor], center: Sequence[Tensor | None], sums: Tensor) -> None:
    n, c = dy.shape[:2]
    parts, p, center = len(p), _slots(p), _slots(map(contiguous, center))
    walk = planes_of(dy, *p)
    used, other = _tiles(ADJOINT_IDENTITY_TILE, walk, dy, parts)
    steps = PIXELS_PER_PROGRAM // used["BLOCK_W"]
    splits = ceil_div(walk.height * ceil_div(walk.width, used["BLOCK_W"]), steps)
    partial = split_buffer(sums, splits)

    def plan() -> Plan:
        constants = dict(
            dy_strides=specialised_on_nothing(walk.strides[0]),
            p_strides=tuple(map(specialised_on_nothing, walk.strides[1:])),
            center_row=specialised_on_nothing(map(vector_row, center)),
            rows=n * c,
            C=c,
            H=walk.height,
            W=walk.width,
            steps=steps,
            parts=parts,
            ACC=accumulator(dy),
        )
        prepare_fold(sums)
        return Plan(ceil_div(n * c, used["BLOCK_R"]) * splits, constants | used, also=other)

    key = (dy.get_device(), parts, *map(seen, (dy, *p, *center)))
    _couple_adjoint_identity(key, plan, dy, p, center, partial)
    fold(sums, partial)


_couple_adjoint_identity = Planned(_couple_adjoint_identity_kernel)


@triton.jit
def _row_weight(row, H, j, F: tl.constexpr, ACC: tl.constexpr):
    """Weight of ``row = F q - F / 2 + j`` of dy, of H, on source row q.

    ``1, 3, .., 2F - 1, 2F - 1, .., 3, 1`` over ``2F``; the rows outside the first and last source row's centre have no
    second neighbour and weigh 1.
    """
    w = tl.minimum(2 * j + 1, 4 * F - 1 - 2 * j).to(ACC) / (2 * F)
    return tl.where((row < F // 2) | (row >= H - F // 2), 1.0, w)


@triton.jit
def _adjoint_of_one(
    dy, du, p, center, p_sums, dy_strides, p_strides, center_row, plane, i_h, origin, planes, C, H, W,
    halo, F: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One contribution's ``du`` and sums on ``[BLOCK_H / F, BLOCK_W / F]`` pixels: rows first, then columns."""
    ROWS: tl.constexpr = BLOCK_H // F
    CELLS: tl.constexpr = BLOCK_W // F
    height, width = H // F, W // F
    n, c = plane // C, plane % C
    o_q = i_h * ROWS + tl.arange(0, ROWS)[:, None]
    m_q = o_q < height
    o_w = origin + tl.arange(0, BLOCK_W)[None, :]
    m_w = (o_w >= 0) & (o_w < W // VEC * VEC)
    row = (dy_strides[2] // VEC) * VEC

    b_rows = tl.zeros([ROWS, BLOCK_W], ACC)
    if BILINEAR:
        p_dy = dy + offset(n, c, F * o_q - F // 2, dy_strides, VEC) + o_w.to(tl.int64) * dy_strides[3]
        AT_A_TIME: tl.constexpr = 4 if F > 4 else 2 * F
        for i in range(0, 2 * F, AT_A_TIME):
            for r in tl.static_range(AT_A_TIME):
                o_r = F * o_q - F // 2 + i + r
                m = m_q & m_w & (o_r >= 0) & (o_r < H)
                b_rows = tl.fma(tl.load(p_dy, m, 0.0).to(ACC), _row_weight(o_r, H, i + r, F, ACC), b_rows)
                p_dy += row
    else:
        p_dy = dy + offset(n, c, F * o_q, dy_strides, VEC) + o_w.to(tl.int64) * dy_strides[3]
        for _ in tl.static_range(F):
            b_rows += tl.load(p_dy, m_q & m_w, 0.0).to(ACC)
            p_dy += row

    b_cells = tl.reshape(b_rows, [ROWS, CELLS, F])
    o_c = tl.broadcast_to(tl.arange(0, CELLS)[None, :], [ROWS, CELLS])
    o_x = origin // F + o_c
    b_du = tl.sum(b_cells, 2)
    if BILINEAR:
        r = tl.arange(0, F)[None, None, :]
        to_last = tl.sum(b_cells * (tl.maximum(F - 1 - 2 * r, 0).to(ACC) / (2 * F)), 2)
        to_next = tl.sum(b_cells * (tl.maximum(2 * r + 1 - F, 0).to(ACC) / (2 * F)), 2)
        b_du -= tl.where(o_x == 0, 0.0, to_last) + tl.where(o_x == width - 1, 0.0, to_next)
        b_du += tl.where(o_x == width - 1, 0.0, tl.gather(to_last, tl.minimum(o_c + 1, CELLS - 1), 1))
        b_du += tl.where(o_x == 0, 0.0, tl.gather(to_next, tl.maximum(o_c - 1, 0), 1))

    m = m_q & (o_x < width) & (o_c >= halo // F) & (o_c < (BLOCK_W - halo) // F)
    p_du = du + (plane.to(tl.int64) * height + o_q) * width + o_x
    tl.store(p_du, b_du.to(du.dtype.element_ty), m)
    if p is not None:
        strides = strides_in(p_strides, 1)
        b_p = tl.load(p + offset(n, c, o_q, strides, 1) + o_x.to(tl.int64) * strides[3], m, 0.0).to(ACC)
        if center is not None:
            b_p = b_p - load_vector(center, decoded(center_row), n, c, None, ACC)
        b_du = tl.where(m, b_du, 0.0)
        tl.store(p_sums, tl.sum(b_du))
        tl.store(p_sums + planes, tl.sum(b_du * b_p))


@triton.jit(do_not_specialize=SIZES)
def _couple_adjoint_upsampled_kernel(
    dy, du, p, center, sums, dy_strides, p_strides, center_row, planes, C, H, W, overlaps,
    FACTORS: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """``du_k = up_{f_k}^T(dy)`` by gathering, ``sums[k] = (sum_hw du_k, sum_hw du_k (p_k - m_k))``, for ``f_k > 1``.

    A source pixel weighs rows and columns ``f q - f / 2 .. f q + 3 f / 2`` of dy. One program takes ``BLOCK_H x
    BLOCK_W`` pixels of a plane of dy for all factors; its further reads of them, two per factor, hit the cache.
    Per element of dy: read dy, ``sum_k 1 / f_k^2`` reads of p and writes of du; ``4 + 6 / f_k`` FLOPs per factor.
    Bound: memory bandwidth, if the cache keeps up.
    """
    halo = overlaps * HALO
    blocks_w = tl.cdiv(W, BLOCK_W - 2 * halo)
    splits = tl.cdiv(H, BLOCK_H) * blocks_w
    plane = tl.program_id(0) // splits
    i_s = tl.program_id(0) % splits
    origin = (i_s % blocks_w) * (BLOCK_W - 2 * halo) - halo
    dy_strides = strides_in(dy_strides, VEC)
    p_sums = sums + i_s.to(tl.int64) * (2 * len(FACTORS) * planes) + plane
    for k in tl.static_range(len(FACTORS)):
        _adjoint_of_one(
            dy, du[k], p[k], center[k], p_sums + 2 * k * planes, dy_strides, p_strides[k], center_row[k], plane,
            i_s // blocks_w, origin, planes, C, H, W, halo, FACTORS[k], BILINEAR, ACC, VEC, BLOCK_H, BLOCK_W,
        )  # fmt: skip


def _adjoint_upsampled(
    dy: Tensor,
    p: Sequence[Tensor | None],
    center: Sequence[Tensor | None],
    factors: Sequence[int],
    mode: str,
    du: Sequence[Tensor],
    sums: Tensor,
) -> None:
    n, c, h, w = dy.shape
    block_h, block_w = ADJOINT_UPSAMPLED_TILE
    overlaps = w > block_w
    splits = ceil_div(h, block_h) * ceil_div(w, block_w - 2 * overlaps * ADJOINT_HALO)
    du, p, center = tuple(du), tuple(p), tuple(map(contiguous, center))
    partial = split_buffer(sums, splits)

    def plan() -> Plan:
        walk = planes_of(dy, flatten=False)
        constants = dict(
            dy_strides=specialised_on_nothing(walk.strides[0]),
            p_strides=tuple(None if p_k is None else specialised_on_nothing(strides_of(p_k)) for p_k in p),
            center_row=specialised_on_nothing(map(vector_row, center)),
            planes=n * c,
            C=c,
            H=h,
            W=w,
            overlaps=int(overlaps),
            FACTORS=tuple(factors),
            BILINEAR=mode == "bilinear",
            ACC=accumulator(dy),
            VEC=_vector(walk, dy, max(factors)),
            BLOCK_H=block_h,
            BLOCK_W=block_w,
            HALO=ADJOINT_HALO,
        )
        prepare_fold(sums)
        return Plan(n * c * splits, constants, num_warps=2)

    key = (dy.get_device(), tuple(map(seen, (dy, *p, *center))), tuple(factors), mode)
    _couple_adjoint_upsampled(key, plan, dy, du, p, center, partial)
    fold(sums, partial)


_couple_adjoint_upsampled = Planned(_couple_adjoint_upsampled_kernel)


def couple_adjoint(
    dy: Tensor,
    p: Sequence[Tensor | None],
    center: Sequence[Tensor | None],
    factors: Sequence[int],
    mode: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """One launch for the contributions with ``f_k > 1``, one for the others; see the reference's ``couple_adjoint``."""
    tensors = (dy, *p, *center)
    _adjoint_guard(tuple(map(seen, tensors)), tensors, dy, p, center, factors, mode)
    n, c, h, w = dy.shape
    acc = accumulate_dtype(dy.dtype)
    du = [dy.new_empty(0) if f == 1 else dy.new_empty(n, c, h // f, w // f) for f in factors]
    sums: list[Tensor] = [dy.new_empty(0, dtype=acc) if p_k is None else dy for p_k in p]
    same = [k for k, p_k in enumerate(p) if p_k is not None and factors[k] == 1]
    up = [k for k, f in enumerate(factors) if f > 1]
    with on_device_of(dy):
        for ks in (same, up):
            if not ks:
                continue
            of_ks = dy.new_empty(len(ks), 2, n, c, dtype=acc)
            for k, s in zip(ks, of_ks.unbind(), strict=True):
                sums[k] = s if p[k] is not None else sums[k]
            p_ks, centers = [p[k] for k in ks], [center[k] for k in ks]
            if dy.numel() == 0:
                of_ks.zero_()
            elif ks is same:
                _adjoint_identity(dy, cast("list[Tensor]", p_ks), centers, of_ks)
            else:
                _adjoint_upsampled(dy, p_ks, centers, [factors[k] for k in ks], mode, [du[k] for k in ks], of_ks)
    return du, sums
