"""BatchNorm as an affine map, and the gradient of that: one launch each, for a few numbers per channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.triton.tiles import accumulator, contiguous

BLOCK = 64


@triton.jit
def _move(running, target, MOMENTUM: tl.constexpr, o, m, ACC: tl.constexpr):
    """``r <- r + momentum (v - r)``."""
    b = tl.load(running + o, m, 0.0).to(ACC)
    tl.store(running + o, tl.fma(target - b, tl.full([], MOMENTUM, ACC), b).to(running.dtype.element_ty), m)


@triton.jit
def _bn_fold_kernel(
    mean, var, weight, bias, running_mean, running_var, batches, rstd, scale, shift, count, C,
    MOMENTUM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rstd = (var + eps)^-1/2``, ``scale = weight rstd``, ``shift = bias - mean scale``, and running statistics.

    Per channel: read 4 numbers and write 3, or 6 and 5; 6 or 12 FLOPs. Bound by latency.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < C
    b_mean, b_var = tl.load(mean + o, m, 0.0).to(ACC), tl.load(var + o, m, 0.0).to(ACC)
    b_rstd = 1.0 / tl.sqrt(b_var + tl.full([], EPS, ACC))
    b_scale = tl.load(weight + o, m, 0.0).to(ACC) * b_rstd
    tl.store(rstd + o, b_rstd, m)
    tl.store(scale + o, b_scale, m)
    tl.store(shift + o, tl.load(bias + o, m, 0.0).to(ACC) - b_mean * b_scale, m)
    if running_mean is not None:
        _move(running_mean, b_mean, MOMENTUM, o, m, ACC)
    if running_var is not None:
        _move(running_var, b_var * (count.to(ACC) / (count - 1).to(ACC)), MOMENTUM, o, m, ACC)
    if batches is not None:
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


def bn_fold(
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    count: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch; see :func:`revkernels.reference.bn_fold`."""
    out = tuple(torch.empty_like(mean, memory_format=torch.contiguous_format) for _ in range(3))
    c = mean.numel()
    if c == 0:
        return out
    with torch.cuda.device_of(mean):
        _bn_fold_kernel[(triton.cdiv(c, BLOCK),)](
            *map(contiguous, (mean, var, weight, bias)),
            running_mean,
            running_var,
            batches,
            *out,
            count,
            c,
            MOMENTUM=momentum,
            EPS=eps,
            ACC=accumulator(mean),
            BLOCK=BLOCK,
            num_warps=2,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _bn_fold_grad_kernel(
    sums, gate, dpool, mean, rstd, scale, dweight, dbias, slope, offset, sums_row, gate_row, dpool_row, count, N, C,
    BATCH: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``dbias = sum_n gate g + dpool s``, ``dweight = rstd sum_n gate g' + dpool s'``, and the slope and offset of dx.

    ``sums`` starts with g; ``*_row`` are the strides over sums, samples and channels. Reads 2 to 6 numbers per sample
    and channel, as many FLOPs. Bound by latency.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    o_n = tl.arange(0, BLOCK_N)[:, None]
    b_sum = tl.zeros([BLOCK_N, BLOCK], ACC)
    b_centred = tl.zeros([BLOCK_N, BLOCK], ACC)
    for n in range(0, N, BLOCK_N):
        m = (n + o_n < N) & (o < C)
        p = sums + (n + o_n).to(tl.int64) * sums_row[1] + o * sums_row[2]
        b_g, b_gx = tl.load(p, m, 0.0).to(ACC), tl.load(p + sums_row[0], m, 0.0).to(ACC)
        if gate is not None:
            b_gate = tl.load(gate + (n + o_n).to(tl.int64) * gate_row[0] + o * gate_row[1], m, 0.0).to(ACC)
            b_g, b_gx = b_g * b_gate, b_gx * b_gate
        if dpool is not None:
            b_dpool = tl.load(dpool + (n + o_n).to(tl.int64) * dpool_row[0] + o * dpool_row[1], m, 0.0).to(ACC)
            b_g += b_dpool * tl.load(p + 2 * sums_row[0], m, 0.0).to(ACC)
            b_gx += b_dpool * tl.load(p + 3 * sums_row[0], m, 0.0).to(ACC)
        b_sum += b_g
        b_centred += b_gx
    b_total = tl.sum(b_sum, 0, keep_dims=True)
    m = o < C
    b_rstd = tl.load(rstd + o, m, 0.0).to(ACC)
    b_dweight = b_rstd * tl.sum(b_centred, 0, keep_dims=True)
    tl.store(dweight + o, b_dweight, m)
    tl.store(dbias + o, b_total, m)
    b_slope = tl.zeros([1, BLOCK], ACC)
    b_offset = tl.zeros([1, BLOCK], ACC)
    if BATCH:
        b_share = tl.load(scale + o, m, 0.0).to(ACC) / count.to(ACC)
        b_slope = -b_share * b_rstd * b_dweight
        b_offset = -b_share * b_total - b_slope * tl.load(mean + o, m, 0.0).to(ACC)
    tl.store(slope + o, b_slope, m)
    tl.store(offset + o, b_offset, m)


def bn_fold_grad(
    sums: Tensor,
    gate: Tensor | None,
    dpool: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    count: int,
    batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch; see :func:`revkernels.reference.bn_fold_grad`."""
    out = tuple(torch.empty_like(mean, memory_format=torch.contiguous_format) for _ in range(4))
    n, c = sums.shape[1:]
    if c == 0:
        return out
    with torch.cuda.device_of(sums):
        _bn_fold_grad_kernel[(triton.cdiv(c, 16),)](
            sums[-4:] if len(sums) == 5 else sums,
            gate,
            dpool,
            *map(contiguous, (mean, rstd, scale)),
            *out,
            sums.stride(),
            (0, 0) if gate is None else gate.stride(),
            (0, 0) if dpool is None else dpool.stride(),
            count,
            n,
            c,
            BATCH=batch,
            ACC=accumulator(mean),
            BLOCK_N=16,
            BLOCK=16,
            num_warps=2,
            enable_fp_fusion=False,
        )
    return out
