"""The 1x1 convolution and its weight gradient: the prologue in Triton, the products in cuBLAS."""

from __future__ import annotations

import torch
from torch import Tensor

from revkernels.reference import accumulate_dtype
from revkernels.triton.bn_act import bn_act


def _gated(x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None) -> Tensor:
    return x if scale is None else bn_act(x, scale, shift, gate, "hardswish")


def pointwise_conv_(
    y: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None
) -> None:
    """A launch for z, a batched product ``[O, C] [N, C, H W]``; see :func:`revkernels.reference.pointwise_conv_`."""
    z = _gated(x, scale, shift, gate).to(y.dtype).flatten(2)
    matrices = weight.flatten(1).to(y.dtype).expand(z.shape[0], -1, -1)
    if y.stride(2) == y.shape[3] and y.stride(3) == 1:  # flatten is a view
        torch.bmm(matrices, z, out=y.flatten(2))
    else:
        y.copy_(torch.bmm(matrices, z).view(y.shape))


def pointwise_conv_grad_weight(
    x: Tensor, dy: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None
) -> Tensor:
    """A launch for z, a product per sample, their sum; see :func:`revkernels.reference.pointwise_conv_grad_weight`."""
    z = _gated(x, scale, shift, gate).to(dy.dtype)
    products = torch.bmm(dy.flatten(2), z.flatten(2).transpose(1, 2))
    return products.sum(0, dtype=accumulate_dtype(x.dtype))[..., None, None]
