"""The truth: one plain-PyTorch function per op, written for reading.

Every other implementation (C++, CUDA, Triton) is tested against these. They accept any strides, any
floating dtype and any device, accumulate 16-bit inputs in float32 and never call another registered op.

Shape letters: N samples, C channels, H, W rows and columns of a map, f an upsampling factor, b a
space-to-depth block, k a kernel size, s a stride, R the hidden width of squeeze-excite.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

HARDSIGMOID_SLOPE = 0.1666666716337204  # float32(1 / 6)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(v: Tensor) -> Tensor:
    """``[C]`` or ``[N, C]`` to a shape that broadcasts against ``[N, C, H, W]``."""
    return v[..., None, None]


# --- resampling ---------------------------------------------------------------------------------


def upsample(x: Tensor, factor: int, mode: str) -> Tensor:
    """``up_f(x)``: bilinear with ``align_corners=False``, or nearest.  ``[N, C, H, W] -> [N, C, fH, fW]``."""
    if factor == 1:
        return x.clone(memory_format=torch.contiguous_format)
    n, c, h, w = x.shape
    size = (h * factor, w * factor)
    if x.numel() == 0:
        return x.new_empty((n, c, *size))
    wide = x.to(accumulate_dtype(x.dtype)).contiguous()
    up = F.interpolate(wide, size=size, mode=mode, align_corners=None if mode == "nearest" else False)
    return up.to(x.dtype)


def upsample_adjoint(dy: Tensor, factor: int, mode: str) -> Tensor:
    """``up_f^T(dy)``, the exact transpose of :func:`upsample`.  ``[N, C, fH, fW] -> [N, C, H, W]``."""
    if factor == 1:
        return dy.clone(memory_format=torch.contiguous_format)
    n, c, h, w = dy.shape
    size = [n, c, h // factor, w // factor]
    if dy.numel() == 0:
        return dy.new_empty(size)
    wide = dy.to(accumulate_dtype(dy.dtype)).contiguous()
    if mode == "nearest":
        dx = torch.ops.aten.upsample_nearest2d_backward(wide, [h, w], size, None, None)
    else:
        dx = torch.ops.aten.upsample_bilinear2d_backward(wide, [h, w], size, False, None, None)
    return dx.to(dy.dtype)


def space_to_depth(x: Tensor, planes: int, block: int) -> Tensor:
    """Repeat the channels of ``x`` cyclically to ``planes``, then move ``block x block`` pixels into channels.

    ``y[n, (r * block + q) * planes + p, i, j] = x[n, p mod C, i * block + r, j * block + q]``
    ``[N, C, H, W] -> [N, planes * block^2, H / block, W / block]``
    """
    n, c, h, w = x.shape
    repeats = -(-planes // c)
    x = x.repeat(1, repeats, 1, 1)[:, :planes]
    x = x.reshape(n, planes, h // block, block, w // block, block)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, planes * block * block, h // block, w // block).contiguous()


def _unblock(y: Tensor, block: int) -> Tensor:
    """Undo the pixel shuffle of :func:`space_to_depth`, keeping all planes: ``[N, planes, H, W]``."""
    n, c, h, w = y.shape
    planes = c // (block * block)
    y = y.reshape(n, block, block, planes, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, planes, h * block, w * block).contiguous()


def depth_to_space(y: Tensor, channels: int, block: int) -> Tensor:
    """Inverse of :func:`space_to_depth`: the first copy of each of the ``channels`` image planes."""
    return _unblock(y, block)[:, :channels].contiguous()


def space_to_depth_adjoint(dy: Tensor, channels: int, block: int) -> Tensor:
    """Transpose of :func:`space_to_depth`: gradients of the repeated planes are summed."""
    planes = _unblock(dy, block).to(accumulate_dtype(dy.dtype))
    return torch.stack([planes[:, c::channels].sum(1) for c in range(channels)], dim=1).to(dy.dtype)


# --- coupling -----------------------------------------------------------------------------------


def couple_(
    y: Tensor,  # [N, C, H, W], updated in place
    p: list[Tensor],  # p_k [N, C, H / f_k, W / f_k]
    scale: list[Tensor | None],  # a_k [C] or [N, C], or None for 1
    shift: list[Tensor | None],  # b_k [C] or [N, C], or None for 0
    factors: list[int],
    mode: str,
    subtract: bool,
    fraction_bits: int | None = None,
    overflow: Tensor | None = None,  # int64, one element, updated in place
) -> None:
    """``y <- y +/- t, t = sum_k up_{f_k}(a_k p_k + b_k)``, summed in ``accumulate_dtype`` and rounded to y once.

    With ``fraction_bits = g``, t is first rounded to ``q 2^-g, q = rint(t 2^g)``, half to even; y lies on that grid.
    A float y becomes ``y +/- q 2^-g``. An int16 y holds ``y 2^g`` and becomes ``wrap16(y +/- q)``; q saturates at
    ``2^31``, which is 0 modulo ``2^16``, and NaN counts as 0 too. ``overflow`` grows by the number of elements whose
    result is not below ``2^(24 - g)`` (``2^(53 - g)`` in float64), or no int16, or whose t is not finite.
    """
    if not p:
        return
    acc = accumulate_dtype(y.dtype)
    total = y.new_zeros(y.shape, dtype=acc)
    for p_k, a_k, b_k, f_k in zip(p, scale, shift, factors, strict=True):
        term = p_k.to(acc)
        if a_k is not None:
            term = term * _per_channel(a_k).to(acc)
        if b_k is not None:
            term = term + _per_channel(b_k).to(acc)
        total += upsample(term, f_k, mode)
    if fraction_bits is None:
        y.copy_(y.to(acc) - total if subtract else y.to(acc) + total)
        return
    q = torch.round(total * 2.0**fraction_bits)
    if y.dtype == torch.int16:
        q = q.nan_to_num(0.0).clamp(-(2.0**31), 2.0**31).to(torch.int64)
        exact = y - q if subtract else y + q
        outside = (exact < -(2**15)) | (exact >= 2**15) | total.isnan()
        y.copy_((exact + 2**15) % 2**16 - 2**15)
    else:
        step, digits = 2.0**-fraction_bits, 53 if acc == torch.float64 else 24
        y.copy_(y - q * step if subtract else y + q * step)
        outside = ~(y.abs() < 2.0**digits * step)
    if overflow is not None:
        overflow += outside.sum()


def couple_adjoint(
    dy: Tensor,  # [N, C, H, W]
    p: list[Tensor | None],  # p_k [N, C, H / f_k, W / f_k]
    center: list[Tensor | None],  # m_k [C], or None for 0
    factors: list[int],
    mode: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Transpose of the coupling, and the sums BatchNorm's backward needs, from one read of ``dy``.

    ``du_k = up_{f_k}^T(dy)`` in dy's dtype; for ``f_k = 1`` it is dy itself, and an empty tensor is returned.
    ``sums_k [2, N, C] = (sum_hw du_k, sum_hw du_k (p_k - m_k))`` in ``accumulate_dtype``; empty where p_k is None.
    """
    acc = accumulate_dtype(dy.dtype)
    dus, sums = [], []
    for p_k, m_k, f_k in zip(p, center, factors, strict=True):
        du = upsample_adjoint(dy.to(acc), f_k, mode)
        dus.append(dy.new_empty(0) if f_k == 1 else du.to(dy.dtype))
        if p_k is None:
            sums.append(dy.new_empty(0, dtype=acc))
            continue
        centered = p_k.to(acc) if m_k is None else p_k.to(acc) - _per_channel(m_k).to(acc)
        sums.append(torch.stack([du.sum((2, 3)), (du * centered).sum((2, 3))]))
    return dus, sums


def dequantize_(x: Tensor, y: Tensor, fraction_bits: int) -> None:
    """``x <- 2^-fraction_bits y``: the values of an int16 stream, rounded to x's dtype once; x and y of one shape."""
    x.copy_(y.to(accumulate_dtype(x.dtype)) * 2.0**-fraction_bits)


# --- dual-residual step --------------------------------------------------------------------------


def pack_bits(low: Tensor, bits: int) -> Tensor:
    """Integers of ``bits`` bits, packed: byte ``g bits + j`` has bit j of the elements ``8 g .. 8 g + 7``; uint8."""
    groups = -(-low.numel() // 8)
    values = low.new_zeros(groups * 8, dtype=torch.int64)
    values[: low.numel()] = low.reshape(-1)
    planes = values.view(groups, 1, 8) >> torch.arange(bits, device=low.device).view(bits, 1) & 1
    return (planes << torch.arange(8, device=low.device)).sum(2).to(torch.uint8).reshape(-1)


def unpack_bits(packed: Tensor, bits: int, size: int) -> Tensor:
    """Inverse of :func:`pack_bits`: ``size`` integers, int64."""
    planes = packed.to(torch.int64).view(-1, bits, 1) >> torch.arange(8, device=packed.device) & 1
    return (planes << torch.arange(bits, device=packed.device).view(bits, 1)).sum(1).reshape(-1)[:size]


def dual_residual_(
    y: Tensor,  # updated in place; contiguous, as all others
    x: Tensor | None,  # of y's shape and dtype; None for 0
    p: Tensor,  # of y's shape
    coefficient: float,  # c
    beta: float,
    inverse: bool,
    fraction_bits: int | None = None,
    remainder: Tensor | None = None,  # uint8 [ceil(size / 8) k], updated in place by the forward step
    overflow: Tensor | None = None,  # int64, one element, updated in place
) -> None:
    """``y <- beta y + p + c x``, or its inverse ``y <- (y - p - c x) / beta``, in ``accumulate_dtype`` of y.

    With ``fraction_bits = g``, y and x are int16 or int32 and hold values times ``2^g``, and ``beta = 2^-k``. With
    ``q = rint(2^g p + c x)`` in float32, 0 where that is no int32, the step is ``y <- wrap((y >> k) + q)``, and the k
    bits shifted out go to ``remainder`` (see :func:`pack_bits`). The inverse is ``y <- (wrap(y - q) << k) | bits``.
    ``overflow`` grows by the number of elements whose sum is no int16 (int32), or whose q is 0 for that reason.
    """
    if fraction_bits is None:
        acc = accumulate_dtype(y.dtype)
        t = p.to(acc) if x is None else p.to(acc) + coefficient * x.to(acc)
        y.copy_((y.to(acc) - t) / beta if inverse else beta * y.to(acc) + t)
        return
    t = p.to(torch.float32) * 2.0**fraction_bits
    if x is not None:
        t = t + coefficient * x.to(torch.float32)
    fits = t.abs() < 2.0**31
    q = torch.where(fits, torch.round(t), 0.0).to(torch.int64)
    k = round(-math.log2(beta))
    half = 2**15 if y.dtype == torch.int16 else 2**31
    wide = y.to(torch.int64)
    if inverse:
        low = unpack_bits(remainder, k, y.numel()).view(y.shape) if k and remainder is not None else 0
        exact = ((wide - q + half) % (2 * half) - half << k) | low
    else:
        if remainder is not None:
            remainder.copy_(pack_bits(wide & 2**k - 1, k).view_as(remainder))
        exact = (wide >> k) + q
        if overflow is not None:
            overflow += (~fits | (exact < -half) | (exact >= half)).sum()
    y.copy_((exact + half) % (2 * half) - half)


def dual_residual_adjoint_(
    dx: Tensor,  # updated in place; contiguous, as all others
    dy: Tensor,  # updated in place; of dx's shape and dtype
    g: Tensor | None,  # of dx's shape; None for 0
    coefficient: float,
    beta: float,
) -> None:
    """Transpose of :func:`dual_residual_`: ``dx <- dx + g + c dy``, then ``dy <- beta dy``, with ``g = J_p^T dy``."""
    acc = accumulate_dtype(dy.dtype)
    total = coefficient * dy.to(acc)
    if g is not None:
        total = total + g.to(acc)
    dx.copy_(dx.to(acc) + total)
    dy.copy_(beta * dy.to(acc))


# --- depthwise convolution ----------------------------------------------------------------------


def _prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``v = x`` or ``v = hardswish(scale x + shift)``, per channel, in ``accumulate_dtype``."""
    x = x.to(accumulate_dtype(x.dtype))
    if scale is None or shift is None:
        return x
    return F.hardswish(x * _per_channel(scale).to(x.dtype) + _per_channel(shift).to(x.dtype))


def depthwise_conv(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int) -> Tensor:
    """``y[n, c, i, j] = sum_{u, v} w[c, 0, u, v] v[n, c, s i + u - P, s j + v - P]``, ``P = (k - 1) / 2``, zero padded.

    ``v = x``, or ``hardswish(scale x + shift)`` when ``scale`` and ``shift`` (``[C]``) are given. On the CPU x may be
    int16, which counts as float32.
    ``[N, C, H, W], [C, 1, k, k] -> [N, C, ceil(H / s), ceil(W / s)]``
    """
    v = _prologue(x, scale, shift)
    pad = (weight.shape[-1] - 1) // 2
    y = F.conv2d(v, weight.to(v.dtype), None, stride, pad, 1, weight.shape[0])
    return y.to(x.dtype) if x.is_floating_point() else y


def depthwise_conv_grad_input(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Transpose of :func:`depthwise_conv` in its input: ``dv [N, C, height, width]``."""
    acc = accumulate_dtype(dy.dtype)
    shape = (dy.shape[0], dy.shape[1], height, width)
    pad = (weight.shape[-1] - 1) // 2
    dv = conv2d_input(shape, weight.to(acc), dy.to(acc), stride, pad, 1, weight.shape[0])
    return dv.to(dy.dtype)


def depthwise_conv_grad_weight(
    x: Tensor, dy: Tensor, scale: Tensor | None, shift: Tensor | None, kernel: int, stride: int
) -> Tensor:
    """``dw[c, 0, u, v] = sum_{n, i, j} dy[n, c, i, j] v[n, c, s i + u - P, s j + v - P]``, in ``accumulate_dtype``.

    Returns ``[C, 1, k, k]`` in ``accumulate_dtype`` of x: weights are kept in full precision.
    """
    v = _prologue(x, scale, shift)
    c = x.shape[1]
    pad = (kernel - 1) // 2
    return conv2d_weight(v, (c, 1, kernel, kernel), dy.to(v.dtype), stride, pad, 1, c)


# --- 1x1 convolution ------------------------------------------------------------------------------


def _gated(x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None) -> Tensor:
    """``z = x`` or ``z = gate hardswish(scale x + shift)``, in ``accumulate_dtype``; gate ``[N, C]``, None for 1."""
    z = _prologue(x, scale, shift)
    return z if gate is None else z * _per_channel(gate).to(z.dtype)


def pointwise_conv_(
    y: Tensor,  # [N, O, H, W], overwritten
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C, 1, 1]
    scale: Tensor | None,  # [C]
    shift: Tensor | None,  # [C]
    gate: Tensor | None,  # [N, C]; only with scale and shift
) -> None:
    """``y[n, o] <- sum_c w[o, c] z[n, c]``, ``z = x``, or ``z = gate hardswish(scale x + shift)``.

    On the CPU x may be int16, which counts as float32. y has a float dtype, float64 if and only if x has.
    """
    z = _gated(x, scale, shift, gate)
    y.copy_(torch.einsum("oc,nchw->nohw", weight.flatten(1).to(z.dtype), z))


def pointwise_conv_grad_weight(
    x: Tensor,  # [N, C, H, W]
    dy: Tensor,  # [N, O, H, W]
    scale: Tensor | None,  # [C]
    shift: Tensor | None,  # [C]
    gate: Tensor | None,  # [N, C]
) -> Tensor:
    """``dw[o, c, 0, 0] = sum_{n, h, w} dy[n, o, h, w] z[n, c, h, w]`` in ``accumulate_dtype`` of x, z as above."""
    z = _gated(x, scale, shift, gate)
    return torch.einsum("nohw,nchw->oc", dy.to(z.dtype), z)[..., None, None]


# --- batch normalisation, activation, squeeze-excite ----------------------------------------------


def _act(u: Tensor, act: str) -> Tensor:
    return F.hardswish(u) if act == "hardswish" else u


def _act_slope(u: Tensor, act: str) -> Tensor:
    """``h'(u)``: hardswish has slope 0 below -3, ``(2 u + 3) / 6`` within, 1 above 3 (and at +-3 the inner formula
    does not apply: -3 gives 0, 3 gives 1, as in PyTorch)."""
    if act != "hardswish":
        return torch.ones_like(u)
    return torch.where(u <= -3, 0.0, torch.where(u >= 3, 1.0, (2 * u + 3) / 6)).to(u.dtype)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and biased variance over N, H, W, both ``[C]`` in ``accumulate_dtype``."""
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
    return mean, var


def bn_fold(
    mean: Tensor,  # [C]
    var: Tensor,  # [C], biased
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    running_mean: Tensor | None,  # [C], updated in place
    running_var: Tensor | None,  # [C], updated in place
    batches: Tensor | None,  # [], integer, counted up
    momentum: float,
    count: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm as an affine map: ``rstd = (var + eps)^-1/2``, ``scale = weight rstd``, ``shift = bias - mean scale``.

    Running statistics, where given, move to the batch's: ``r <- r + momentum (v - r)``, v the mean and the unbiased
    variance ``var count / (count - 1)`` of ``count`` values.
    """
    rstd = torch.rsqrt(var + eps)
    scale = weight.to(mean.dtype) * rstd
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    if batches is not None:
        batches.add_(1)
    return rstd, scale, bias.to(mean.dtype) - mean * scale


def bn_fold_grad(
    sums: Tensor,  # [2, N, C] of couple_adjoint, or [5, N, C] of bn_act_grad_sums
    gate: Tensor | None,  # [N, C], None for 1
    dpool: Tensor | None,  # [N, C], None for 0; only with five sums
    mean: Tensor,  # [C]
    rstd: Tensor,  # [C]
    scale: Tensor,  # [C]
    count: int,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm's parameters, and what is left of its input's after ``scale g``: all ``[C]``.

    ``g`` being the gradient of its output, ``S = sum_n gate g_n + dpool s_n`` and ``T`` likewise out of the centred
    sums: ``dweight = rstd T``, ``dbias = S``, and for batch statistics of ``count`` values ``dx = scale g + slope x +
    offset`` with ``slope = -scale rstd dweight / count``, ``offset = -scale S / count - slope mean``; otherwise zeros.
    """
    g, centred = sums[-4:-2] if len(sums) == 5 else sums
    if gate is not None:
        g, centred = g * gate, centred * gate
    if dpool is not None:
        g, centred = g + dpool * sums[3], centred + dpool * sums[4]
    dbias, dweight = g.sum(0), rstd * centred.sum(0)
    if not batch:
        return dweight, dbias, torch.zeros_like(dbias), torch.zeros_like(dbias)
    slope = scale * rstd * dweight / -count
    return dweight, dbias, slope, scale * dbias / -count - slope * mean


def bn_act(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, act: str) -> Tensor:
    """``z = gate * h(scale x + shift)``; scale, shift ``[C]``, gate ``[N, C]``; h hardswish or identity."""
    acc = accumulate_dtype(x.dtype)
    z = _act(x.to(acc) * _per_channel(scale).to(acc) + _per_channel(shift).to(acc), act)
    if gate is not None:
        z = z * _per_channel(gate).to(acc)
    return z.to(x.dtype).contiguous()


def bn_act_squeeze(x: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
    """``mean_{h, w} h(scale x + shift)``, ``[N, C]`` in ``accumulate_dtype``."""
    acc = accumulate_dtype(x.dtype)
    return _act(x.to(acc) * _per_channel(scale).to(acc) + _per_channel(shift).to(acc), act).mean((2, 3))


def bn_act_grad_sums(dz: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, act: str) -> Tensor:
    """The five sums over H, W, from one read of dz and x, out of which SE's and BN's parameter gradients follow.

    With ``u = scale x + shift``: ``[5, N, C] = sum dz h(u), sum dz h'(u), sum dz h'(u) (x - mean), sum h'(u),
    sum h'(u) (x - mean)`` in ``accumulate_dtype``.
    """
    acc = accumulate_dtype(x.dtype)
    x, dz = x.to(acc), dz.to(acc)
    u = x * _per_channel(scale).to(acc) + _per_channel(shift).to(acc)
    slope, centered = _act_slope(u, act), x - _per_channel(mean).to(acc)
    terms = (dz * _act(u, act), dz * slope, dz * slope * centered, slope, slope * centered)
    return torch.stack([t.sum((2, 3)) for t in terms])


def bn_act_grad(
    dz: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    gate: Tensor | None,  # [N, C], None for 1
    dpool: Tensor | None,  # [N, C], gradient of every pixel of h(u) through the squeeze; None for 0
    slope: Tensor | None,  # [C], None for 0
    offset: Tensor | None,  # [C], None for 0
    act: str,
) -> Tensor:
    """``dx = scale (gate dz + dpool) h'(scale x + shift) + slope x + offset``.

    With batch statistics, ``slope`` and ``offset`` carry BatchNorm's two mean terms; with running ones they are None.
    """
    acc = accumulate_dtype(x.dtype)
    wide = x.to(acc)
    u = wide * _per_channel(scale).to(acc) + _per_channel(shift).to(acc)
    g = dz.to(acc)
    if gate is not None:
        g = g * _per_channel(gate).to(acc)
    if dpool is not None:
        g = g + _per_channel(dpool).to(acc)
    dx = g * _act_slope(u, act) * _per_channel(scale).to(acc)
    if slope is not None:
        dx = dx + wide * _per_channel(slope).to(acc)
    if offset is not None:
        dx = dx + _per_channel(offset).to(acc)
    return dx.to(x.dtype).contiguous()


def se_gate(pooled: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Squeeze-excite: ``hidden = w1 pooled + b1``, ``gate = hardsigmoid(w2 hardswish(hidden) + b2)``.

    pooled ``[N, C]``, w1 ``[R, C]``, b1 ``[R]``, w2 ``[C, R]``, b2 ``[C]`` -> gate ``[N, C]``, hidden ``[N, R]``.
    """
    hidden = pooled @ w1.t() + b1
    return F.hardsigmoid(F.hardswish(hidden) @ w2.t() + b2), hidden


def se_gate_grad(
    dgate: Tensor,  # [N, C]
    gate: Tensor,  # [N, C]
    hidden: Tensor,  # [N, R]
    pooled: Tensor,  # [N, C]
    w1: Tensor,  # [R, C]
    w2: Tensor,  # [C, R]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`se_gate`: ``dpooled, dw1, db1, dw2, db2``.

    hardsigmoid has slope 1/6 inside (0, 1), rounded to float32 in every dtype: PyTorch's own gradient has it so.
    """
    dv = torch.where((gate > 0) & (gate < 1), dgate * HARDSIGMOID_SLOPE, 0.0).to(dgate.dtype)
    dhidden = (dv @ w2) * _act_slope(hidden, "hardswish")
    return dhidden @ w1, dhidden.t() @ pooled, dhidden.sum(0), dv.t() @ F.hardswish(hidden), dv.sum(0)
