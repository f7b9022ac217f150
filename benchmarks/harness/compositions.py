"""Every op in PyTorch's own, the shortest way to say it there: what the kernels are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.cases import hashable, map_nested, passes_by, tensors
from benchmarks.harness.timing import seconds
from revkernels import reference
from revkernels.registry import OPS


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift`` per channel, as the BatchNorm that it comes from."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zeros, ones, scale, shift, False, 0.0, 0.0)


def _activated(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str = "hardswish") -> Tensor:
    if scale is None:
        return x
    u = _affine(x, scale, shift)
    return F.hardswish(u) if act == "hardswish" else u


def _interpolate(x: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))


def _interpolate_backward(dy: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return dy
    n, c, h, w = dy.shape
    size = [n, c, h // factor, w // factor]
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest2d_backward(dy, [h, w], size, None, None)
    return torch.ops.aten.upsample_bilinear2d_backward(dy, [h, w], size, False, None, None)


def _couple_(y, p, scale, shift, factors, mode, subtract, fraction_bits=None, overflow=None):
    total = y if fraction_bits is None else torch.zeros_like(y, dtype=reference.accumulate_dtype(y.dtype))
    for p_k, a_k, b_k, f_k in zip(p, scale, shift, factors, strict=True):
        if a_k is not None and b_k is not None:
            p_k = torch.addcmul(b_k[..., None, None].to(p_k.dtype), p_k, a_k[..., None, None].to(p_k.dtype))
        elif a_k is not None or b_k is not None:
            p_k = p_k * a_k[..., None, None] if b_k is None else p_k + b_k[..., None, None]
        term = _interpolate(p_k, f_k, mode)
        total.sub_(term) if subtract else total.add_(term)
    if fraction_bits is None:
        return
    q = torch.round(total.mul_(2.0**fraction_bits))
    if y.dtype == torch.int16:
        exact = y + q.to(torch.int32)
        outside = y.copy_(exact) != exact
    else:
        digits = 53 if y.dtype == torch.float64 else 24
        outside = y.add_(q, alpha=2.0**-fraction_bits).abs() >= 2.0 ** (digits - fraction_bits)
    if overflow is not None:
        overflow += outside.sum()


def _couple_adjoint(dy, p, center, factors, mode):
    dus, sums = [], []
    acc = reference.accumulate_dtype(dy.dtype)
    for p_k, m_k, f_k in zip(p, center, factors, strict=True):
        du = _interpolate_backward(dy, f_k, mode)
        dus.append(dy.new_empty(0) if f_k == 1 else du)
        if p_k is None:
            sums.append(dy.new_empty(0, dtype=acc))
            continue
        centered = p_k if m_k is None else p_k - m_k[:, None, None].to(p_k.dtype)
        sums.append(torch.stack([du.sum((2, 3), dtype=acc), (du * centered).sum((2, 3), dtype=acc)]))
    return dus, sums


def _convolution_backward(x: Tensor, dy: Tensor, weight: Tensor, stride: int, mask: list[bool]) -> tuple[Tensor, ...]:
    pad, c = (weight.shape[-1] - 1) // 2, weight.shape[0]
    backward = torch.ops.aten.convolution_backward
    return backward(dy, x, weight.to(x.dtype), None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], c, mask)


def _depthwise_conv(x, weight, scale, shift, stride):
    weight = weight.to(x.dtype)
    return F.conv2d(_activated(x, scale, shift), weight, None, stride, (weight.shape[-1] - 1) // 2, 1, x.shape[1])


def _depthwise_conv_grad_input(dy, weight, height, width, stride):
    x = dy.new_empty((1,)).expand(*dy.shape[:2], height, width)  # only its shape is read
    return _convolution_backward(x, dy, weight, stride, [True, False, False])[0]


def _depthwise_conv_grad_weight(x, dy, scale, shift, kernel, stride):
    weight = x.new_empty((x.shape[1], 1, kernel, kernel))
    dw = _convolution_backward(_activated(x, scale, shift), dy, weight, stride, [False, True, False])[1]
    return dw.to(reference.accumulate_dtype(x.dtype))


def _bn_act(x, scale, shift, gate, act="hardswish"):
    z = _activated(x, scale, shift, act)
    return z if gate is None else z * gate[..., None, None].to(z.dtype)


def _convolve_(y, x, weight, *prologue):
    y.copy_(F.conv2d(_bn_act(x, *prologue).to(y.dtype), weight.to(y.dtype)))


def _multiply_(y, x, weight, *prologue):
    weight = weight.flatten(1).to(y.dtype).expand(len(x), -1, -1)
    torch.bmm(weight, _bn_act(x, *prologue).to(y.dtype).flatten(2), out=y.flatten(2))


def _convolution_grad_weight(x, dy, *prologue):
    weight, mask = dy.new_empty(dy.shape[1], x.shape[1], 1, 1), [False, True, False]
    backward, z = torch.ops.aten.convolution_backward, _bn_act(x, *prologue).to(dy.dtype)
    dw = backward(dy, z, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)[1]
    return dw.to(reference.accumulate_dtype(x.dtype))


def _product_grad_weight(x, dy, *prologue):
    z, acc = _bn_act(x, *prologue).to(dy.dtype).flatten(2).transpose(1, 2), reference.accumulate_dtype(x.dtype)
    if acc == dy.dtype and dy.is_cpu:
        return dy.new_zeros(dy.shape[1], x.shape[1]).addbmm_(dy.flatten(2), z)[..., None, None]
    return torch.bmm(dy.flatten(2), z).sum(0, dtype=acc)[..., None, None]


def _faster(*runs: Callable) -> Callable:
    """Whichever of several ways to compute one thing was the fastest on the first call with arguments of a shape."""
    chosen: dict[Any, Callable] = {}

    def fastest(run: Callable, arguments: Sequence[Any]) -> float:
        run(*arguments)
        device = tensors(arguments)[0].device
        return min(seconds(lambda: run(*arguments), device, 3) for _ in range(3))

    def call(*arguments: Any) -> Any:
        key = hashable(map_nested(arguments, Tensor, lambda t: (t.device, t.dtype, t.shape, t.stride())))
        if key not in chosen:
            spare = map_nested(arguments, Tensor, torch.clone)
            chosen[key] = min(runs, key=lambda run: fastest(run, spare))
        return chosen[key](*arguments)

    return call


def _bn_stats(x):
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # five times faster than var_mean there
        zeros = x.new_zeros(x.shape[1])
        return torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.1)
    if x.is_cuda:
        mean, rstd = torch.batch_norm_stats(x, 0.0)
        return mean, rstd.square().reciprocal()
    var, mean = torch.var_mean(x.to(reference.accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, var


def _bn_act_squeeze(x, scale, shift, act):
    return _activated(x, scale, shift, act).mean((2, 3), dtype=reference.accumulate_dtype(x.dtype))


def _slope(g: Tensor, u: Tensor, act: str) -> Tensor:
    return torch.ops.aten.hardswish_backward(g, u) if act == "hardswish" else g


def _bn_act_grad_sums(dz, x, scale, shift, mean, act):
    u = _affine(x, scale, shift)
    g, slope, centered = _slope(dz, u, act), _slope(torch.ones_like(u), u, act), x - mean[:, None, None].to(x.dtype)
    z = F.hardswish(u) if act == "hardswish" else u
    acc = reference.accumulate_dtype(x.dtype)
    return torch.stack([t.sum((2, 3), dtype=acc) for t in (dz * z, g, g * centered, slope, slope * centered)])


def _bn_act_grad(dz, x, scale, shift, gate, dpool, slope, offset, act):
    def vector(v: Tensor) -> Tensor:
        return v[..., None, None].to(x.dtype)

    g = dz if gate is None else dz * vector(gate)
    g = g if dpool is None else g + vector(dpool)
    dx = _slope(g, _affine(x, scale, shift), act) * vector(scale)
    if slope is not None and offset is not None:
        return dx + torch.addcmul(vector(offset), x, vector(slope))
    dx = dx if slope is None else torch.addcmul(dx, x, vector(slope))
    return dx if offset is None else dx + vector(offset)


def _mbconv(op: str) -> Callable:
    """An MBConv's op as its reference says it, of the compositions here."""

    def run(*arguments: Any) -> Any:
        with passes_by(SimpleNamespace(**COMPOSITIONS)):
            return OPS[op].reference(*arguments)

    return run


# Where the reference already is the shortest way to say it in PyTorch, it is the rival too.
COMPOSITIONS: dict[str, Callable] = {
    **{op: _mbconv(op) if op.startswith("mbconv") else getattr(reference, op) for op in OPS},
    "upsample": _interpolate,
    "upsample_adjoint": _interpolate_backward,
    "couple_": _couple_,
    "couple_adjoint": _couple_adjoint,
    "depthwise_conv": _depthwise_conv,
    "depthwise_conv_grad_input": _depthwise_conv_grad_input,
    "depthwise_conv_grad_weight": _depthwise_conv_grad_weight,
    "pointwise_conv_": _faster(_multiply_, _convolve_),
    "pointwise_conv_grad_weight": _faster(_product_grad_weight, _convolution_grad_weight),
    "bn_stats": _bn_stats,
    "bn_act": _bn_act,
    "bn_act_squeeze": _bn_act_squeeze,
    "bn_act_grad_sums": _bn_act_grad_sums,
    "bn_act_grad": _bn_act_grad,
}
