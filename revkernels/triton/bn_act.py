"""BatchNorm, activation and squeeze-excite's products, fused over a map; the sums that their gradients need."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.triton.tiles import (
    PIXELS_PER_PROGRAM,
    accumulator,
    coordinates,
    flat_tile,
    fold,
    load_vector,
    offset,
    planes_of,
    split_buffers,
    tile,
)


@triton.jit
def hardsigmoid(u):
    """``min(max(u / 6 + 1 / 2, 0), 1)``."""
    return tl.minimum(tl.maximum(tl.fma(u, tl.full([], 1 / 6, u.dtype), 0.5), 0.0), 1.0)


@triton.jit
def activate(u, HARDSWISH: tl.constexpr):
    """``h(u) = u min(max(u / 6 + 1 / 2, 0), 1)``, or u."""
    return u * hardsigmoid(u) if HARDSWISH else u


@triton.jit
def activation_slope(u, HARDSWISH: tl.constexpr):
    """``h'(u)``: 0 up to -3, ``(2 u + 3) / 6`` within, 1 from 3 on."""
    if HARDSWISH:
        inner = tl.fma(u, tl.full([], 1 / 3, u.dtype), 0.5)
        slope = tl.where(u <= -3.0, 0.0, tl.where(u >= 3.0, 1.0, inner))
    else:
        slope = tl.full(u.shape, 1.0, u.dtype)
    return slope


@triton.jit
def _bn_act_kernel(
    z, x, scale, shift, gate, z_strides, x_strides, rows, C, H, W,
    HARDSWISH: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``z = gate h(scale x + shift)``.

    Per element: read x, write z; 8 FLOPs. Bound: memory bandwidth.
    """
    o_r, o_w = tile(W, BLOCK_R, BLOCK_W)
    n, c, h = coordinates(o_r, C, H)
    m_r = o_r < rows
    m = m_r & (o_w < W // VEC * VEC)
    o_x = o_w.to(tl.int64)
    b_x = tl.load(x + offset(n, c, h, x_strides, VEC) + o_x * x_strides[3], m, 0.0).to(ACC)
    b_z = tl.fma(b_x, load_vector(scale, 0, n, c, m_r, ACC), load_vector(shift, 0, n, c, m_r, ACC))
    b_z = activate(b_z, HARDSWISH)
    if gate is not None:
        b_z = b_z * load_vector(gate, C, n, c, m_r, ACC)
    tl.store(z + offset(n, c, h, z_strides, VEC) + o_x * z_strides[3], b_z.to(z.dtype.element_ty), m)


def bn_act(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, act: str) -> Tensor:
    """See :func:`revkernels.reference.bn_act`."""
    z = x.new_empty(x.shape)
    if z.numel() == 0:
        return z
    n, c = x.shape[:2]
    walk = planes_of(z, x)
    block_r, block_w = flat_tile(walk, x)
    rows = n * c * walk.height
    with torch.cuda.device_of(x):
        _bn_act_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(walk.width, block_w),)](
            z,
            x,
            scale.contiguous(),
            shift.contiguous(),
            None if gate is None else gate.contiguous(),
            *walk.strides,
            rows,
            c,
            walk.height,
            walk.width,
            HARDSWISH=act == "hardswish",
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return z


@triton.jit
def _bn_act_grad_kernel(
    dx, dz, x, scale, shift, gate, dpool, slope, const, dx_strides, dz_strides, x_strides, rows, C, H, W,
    HARDSWISH: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``dx = scale (gate dz + dpool) h'(scale x + shift) + slope x + const``.

    Per element: read dz, read x, write dx; 12 FLOPs. Bound: memory bandwidth.
    """
    o_r, o_w = tile(W, BLOCK_R, BLOCK_W)
    n, c, h = coordinates(o_r, C, H)
    m_r = o_r < rows
    m = m_r & (o_w < W // VEC * VEC)
    o_x = o_w.to(tl.int64)
    b_x = tl.load(x + offset(n, c, h, x_strides, VEC) + o_x * x_strides[3], m, 0.0).to(ACC)
    b_g = tl.load(dz + offset(n, c, h, dz_strides, VEC) + o_x * dz_strides[3], m, 0.0).to(ACC)
    b_scale = load_vector(scale, 0, n, c, m_r, ACC)
    b_u = tl.fma(b_x, b_scale, load_vector(shift, 0, n, c, m_r, ACC))
    if gate is not None:
        b_g = b_g * load_vector(gate, C, n, c, m_r, ACC)
    if dpool is not None:
        b_g = b_g + load_vector(dpool, C, n, c, m_r, ACC)
    b_dx = b_g * activation_slope(b_u, HARDSWISH) * b_scale
    if slope is not None:
        b_dx = tl.fma(b_x, load_vector(slope, 0, n, c, m_r, ACC), b_dx)
    if const is not None:
        b_dx = b_dx + load_vector(const, 0, n, c, m_r, ACC)
    tl.store(dx + offset(n, c, h, dx_strides, VEC) + o_x * dx_strides[3], b_dx.to(dx.dtype.element_ty), m)


def bn_act_grad(
    dz: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gate: Tensor | None,
    dpool: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    act: str,
) -> Tensor:
    """See :func:`revkernels.reference.bn_act_grad`."""
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx
    n, c = x.shape[:2]
    walk = planes_of(dx, dz, x)
    block_r, block_w = flat_tile(walk, x)
    rows = n * c * walk.height
    vectors = (None if v is None else v.contiguous() for v in (scale, shift, gate, dpool, slope, offset))
    with torch.cuda.device_of(x):
        _bn_act_grad_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(walk.width, block_w),)](
            dx,
            dz,
            x,
            *vectors,
            *walk.strides,
            rows,
            c,
            walk.height,
            walk.width,
            HARDSWISH=act == "hardswish",
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return dx


@triton.jit
def _bn_act_squeeze_kernel(
    pooled, x, scale, shift, x_strides, rows, C, H, W, pixels, steps,
    HARDSWISH: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``pooled[n, c] = sum_hw h(scale x + shift) / (H W)``, a share of it where a plane is split over programs.

    Per element: read x; 8 FLOPs. Bound: memory bandwidth.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    splits = tl.cdiv(H * blocks, steps)
    i_s = tl.program_id(0) % splits
    o_r = (tl.program_id(0) // splits) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    n, c, h = coordinates(o_r, C, 1)
    m_r = o_r < rows
    b_scale, b_shift = load_vector(scale, 0, n, c, m_r, ACC), load_vector(shift, 0, n, c, m_r, ACC)
    b_sum = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    for i in range(i_s * steps, tl.minimum((i_s + 1) * steps, H * blocks)):
        o_w = (i % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        m = m_r & (o_w < W // VEC * VEC)
        p_x = x + offset(n, c, h + i // blocks, x_strides, VEC) + o_w.to(tl.int64) * x_strides[3]
        b_x = tl.load(p_x, m, 0.0).to(ACC)
        b_sum += tl.where(m, activate(tl.fma(b_x, b_scale, b_shift), HARDSWISH), 0.0)
    b_mean = tl.sum(b_sum, 1, keep_dims=True) / pixels.to(ACC)
    tl.store(pooled + i_s.to(tl.int64) * rows + o_r, b_mean, m_r)


def bn_act_squeeze(x: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """See :func:`revkernels.reference.bn_act_squeeze`."""
    n, c, h, w = x.shape
    pooled = x.new_empty(n, c, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:
        return pooled.fill_(float("nan"))
    walk = planes_of(x)
    block_r, block_w = flat_tile(walk, x)
    steps = max(1, PIXELS_PER_PROGRAM // block_w)
    splits = triton.cdiv(walk.height * triton.cdiv(walk.width, block_w), steps)
    out = (pooled,)
    partial = split_buffers(out, splits)
    with torch.cuda.device_of(x):
        _bn_act_squeeze_kernel[(triton.cdiv(n * c, block_r) * splits,)](
            partial[0],
            x,
            scale.contiguous(),
            shift.contiguous(),
            walk.strides[0],
            n * c,
            c,
            walk.height,
            walk.width,
            h * w,
            steps,
            HARDSWISH=act == "hardswish",
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
        fold(out, partial)
    return pooled


@triton.jit
def _bn_act_grad_sums_kernel(
    sums, dz, x, scale, shift, mean, dz_strides, x_strides, rows, C, H, W, steps,
    HARDSWISH: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``sums[:, n, c] = sum_hw (dz h(u), dz h'(u), dz h'(u) (x - mean), h'(u), h'(u) (x - mean))``.

    ``u = scale x + shift``. Per element: read dz, read x; 21 FLOPs. Bound: memory bandwidth.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    splits = tl.cdiv(H * blocks, steps)
    i_s = tl.program_id(0) % splits
    o_r = (tl.program_id(0) // splits) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    n, c, h = coordinates(o_r, C, 1)
    m_r = o_r < rows
    b_scale, b_shift = load_vector(scale, 0, n, c, m_r, ACC), load_vector(shift, 0, n, c, m_r, ACC)
    b_mean = load_vector(mean, 0, n, c, m_r, ACC)
    b_dz_act = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    b_dz_slope = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    b_dz_slope_x = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    b_slope = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    b_slope_x = tl.zeros([BLOCK_R, BLOCK_W], ACC)
    for i in range(i_s * steps, tl.minimum((i_s + 1) * steps, H * blocks)):
        o_w = (i % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
        m = m_r & (o_w < W // VEC * VEC)
        h_i = h + i // blocks
        o_x = o_w.to(tl.int64)
        b_x = tl.load(x + offset(n, c, h_i, x_strides, VEC) + o_x * x_strides[3], m, 0.0).to(ACC)
        b_dz = tl.load(dz + offset(n, c, h_i, dz_strides, VEC) + o_x * dz_strides[3], m, 0.0).to(ACC)
        b_u = tl.fma(b_x, b_scale, b_shift)
        b_s = tl.where(m, activation_slope(b_u, HARDSWISH), 0.0)
        b_c = b_x - b_mean
        b_dz_act = tl.fma(b_dz, activate(b_u, HARDSWISH), b_dz_act)
        b_dz_slope = tl.fma(b_dz, b_s, b_dz_slope)
        b_dz_slope_x = tl.fma(b_dz * b_s, b_c, b_dz_slope_x)
        b_slope += b_s
        b_slope_x = tl.fma(b_s, b_c, b_slope_x)
    p_sums = sums + (i_s * 5).to(tl.int64) * rows + o_r
    tl.store(p_sums, tl.sum(b_dz_act, 1, keep_dims=True), m_r)
    tl.store(p_sums + rows, tl.sum(b_dz_slope, 1, keep_dims=True), m_r)
    tl.store(p_sums + rows * 2, tl.sum(b_dz_slope_x, 1, keep_dims=True), m_r)
    tl.store(p_sums + rows * 3, tl.sum(b_slope, 1, keep_dims=True), m_r)
    tl.store(p_sums + rows * 4, tl.sum(b_slope_x, 1, keep_dims=True), m_r)


def bn_act_grad_sums(dz: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, act: str) -> Tensor:
    """See :func:`revkernels.reference.bn_act_grad_sums`."""
    n, c = x.shape[:2]
    sums = x.new_empty(5, n, c, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.numel() == 0:
        return sums.zero_()
    walk = planes_of(dz, x)
    block_r, block_w = flat_tile(walk, x, 1024)
    steps = max(1, PIXELS_PER_PROGRAM // block_w)
    splits = triton.cdiv(walk.height * triton.cdiv(walk.width, block_w), steps)
    out = (sums,)
    partial = split_buffers(out, splits)
    with torch.cuda.device_of(x):
        _bn_act_grad_sums_kernel[(triton.cdiv(n * c, block_r) * splits,)](
            partial[0],
            dz,
            x,
            scale.contiguous(),
            shift.contiguous(),
            mean.contiguous(),
            *walk.strides,
            n * c,
            c,
            walk.height,
            walk.width,
            steps,
            HARDSWISH=act == "hardswish",
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
        fold(out, partial)
    return sums


@triton.jit
def _bn_stats_kernel(
    partial, x, x_strides, N, C, H, W, samples,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``(count, mean, sum (x - mean)^2)`` of BLOCK_C channels over one block of pixels of up to ``samples`` samples.

    Each lane runs Welford's recurrence over the samples; the lanes of a channel, which have seen equally many, are
    merged at the end. Per element: read x; 4 FLOPs. Bound: memory bandwidth.
    """
    blocks = tl.cdiv(W, BLOCK_W)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    i_c = tl.program_id(0) % channel_blocks
    i_part = tl.program_id(0) // channel_blocks
    i_x = i_part % (H * blocks)
    first = i_part // (H * blocks) * samples
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    m_c = c < C
    o_w = (i_x % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    m_w = o_w < W // VEC * VEC
    m = m_c & m_w
    p_x = x + offset(c * 0 + first, c, c * 0 + i_x // blocks, x_strides, VEC) + o_w.to(tl.int64) * x_strides[3]
    b_mean = tl.zeros([BLOCK_C, BLOCK_W], ACC)
    b_m2 = tl.zeros([BLOCK_C, BLOCK_W], ACC)
    last = tl.minimum(first + samples, N)
    for n in range(first, last):
        b_x = tl.load(p_x, m, 0.0).to(ACC)
        p_x += x_strides[0] // VEC * VEC
        delta = b_x - b_mean
        b_mean = tl.fma(delta, 1.0 / (n - first + 1).to(ACC), b_mean)
        b_m2 = tl.fma(delta, b_x - b_mean, b_m2)
    lanes = tl.minimum(W - (i_x % blocks) * BLOCK_W, BLOCK_W).to(ACC)
    count = lanes * (last - first).to(ACC)
    mean = tl.sum(b_mean, 1, keep_dims=True) / lanes
    spread = tl.where(m_w, b_mean - mean, 0.0)
    m2 = tl.sum(tl.fma(spread * spread, (last - first).to(ACC), b_m2), 1, keep_dims=True)
    p_partial = partial + (i_part * 3).to(tl.int64) * C + c
    tl.store(p_partial, tl.full([BLOCK_C, 1], 1.0, ACC) * count, m_c)
    tl.store(p_partial + C, mean, m_c)
    tl.store(p_partial + C * 2, m2, m_c)


@triton.jit
def _bn_stats_merge_kernel(
    mean, var, partial, parts, C, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``mean = sum k_i m_i / K``, ``var = sum (q_i + k_i (m_i - mean)^2) / K`` over the parts ``(k, m, q)_i``."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_p = tl.arange(0, BLOCK_P)[:, None]
    b_count = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(0, parts, BLOCK_P):
        m = (i + o_p < parts) & (c < C)
        p_part = partial + (i + o_p).to(tl.int64) * 3 * C + c
        k = tl.load(p_part, m, 0.0)
        b_count += k
        b_total = tl.fma(k, tl.load(p_part + C, m, 0.0), b_total)
    count = tl.where(c < C, tl.sum(b_count, 0, keep_dims=True), 1.0)
    b_mean = tl.sum(b_total, 0, keep_dims=True) / count
    b_m2 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for i in range(0, parts, BLOCK_P):
        m = (i + o_p < parts) & (c < C)
        p_part = partial + (i + o_p).to(tl.int64) * 3 * C + c
        delta = tl.load(p_part + C, m, 0.0) - b_mean
        b_m2 += tl.fma(tl.load(p_part, m, 0.0) * delta, delta, tl.load(p_part + C * 2, m, 0.0))
    tl.store(mean + c, b_mean, c < C)
    tl.store(var + c, tl.sum(b_m2, 0, keep_dims=True) / count, c < C)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two launches, no atomics; see :func:`revkernels.reference.bn_stats`."""
    n, c = x.shape[:2]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, var = x.new_empty(c, dtype=acc), x.new_empty(c, dtype=acc)
    if x.numel() == 0:
        return mean.fill_(float("nan")), var.fill_(float("nan"))
    walk = planes_of(x)
    block_c, block_w = flat_tile(walk, x)
    pixel_blocks = walk.height * triton.cdiv(walk.width, block_w)
    channel_blocks = triton.cdiv(c, block_c)
    samples = max(1, min(16, n * pixel_blocks * channel_blocks // 1024))
    parts = pixel_blocks * triton.cdiv(n, samples)
    partial = mean.new_empty(parts, 3, c)
    with torch.cuda.device_of(x):
        _bn_stats_kernel[(parts * channel_blocks,)](
            partial,
            x,
            walk.strides[0],
            n,
            c,
            walk.height,
            walk.width,
            samples,
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_C=block_c,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
        _bn_stats_merge_kernel[(triton.cdiv(c, 16),)](
            mean,
            var,
            partial,
            parts,
            c,
            ACC=accumulator(x),
            BLOCK_P=64,
            BLOCK_C=16,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return mean, var
