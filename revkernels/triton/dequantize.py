"""Values of an int16 stream: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.triton.tiles import accumulator, coordinates, flat_tile, offset, planes_of, tile


@triton.jit
def _dequantize_kernel(
    x, y, x_strides, y_strides, rows, C, H, W,
    FRACTION_BITS: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``x <- 2^-g y``.

    Per element: read y, write x; 1 FLOP. Bound: memory bandwidth.
    """
    STEP: tl.constexpr = 2.0**-FRACTION_BITS
    o_r, o_w = tile(W, BLOCK_R, BLOCK_W)
    n, c, h = coordinates(o_r, C, H)
    m = (o_r < rows) & (o_w < W // VEC * VEC)
    o_x = o_w.to(tl.int64)
    b_y = tl.load(y + offset(n, c, h, y_strides, VEC) + o_x * y_strides[3], m, 0)
    b_x = b_y.to(ACC) * STEP
    tl.store(x + offset(n, c, h, x_strides, VEC) + o_x * x_strides[3], b_x.to(x.dtype.element_ty), m)


def _is_dense(x: Tensor) -> bool:
    """Whether every sample is one contiguous row."""
    _, _, h, w = x.shape
    return x.stride()[1:] == (h * w, w, 1)


def dequantize_(x: Tensor, y: Tensor, fraction_bits: int) -> None:
    """See :func:`revkernels.reference.dequantize_`."""
    if x.numel() == 0:
        return
    n, c = x.shape[:2]
    if _is_dense(x) and _is_dense(y):
        x, y, c = x.view(n, 1, 1, -1), y.view(n, 1, 1, -1), 1
    walk = planes_of(x, y)
    block_r, block_w = flat_tile(walk, y)
    rows = n * c * walk.height
    with torch.cuda.device_of(x):
        _dequantize_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(walk.width, block_w),)](
            x,
            y,
            *walk.strides,
            rows,
            c,
            walk.height,
            walk.width,
            FRACTION_BITS=fraction_bits,
            ACC=accumulator(x),
            VEC=walk.vec,
            BLOCK_R=block_r,
            BLOCK_W=block_w,
            num_warps=4,
            enable_fp_fusion=False,
        )
