"""Which transforms run on fused kernels, and why another does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.mbconv import ConvNormAct, MBConv
from revbifpn.streams import HALVES, Encoded, autocast_dtype

_SQUEEZE_EXCITE = [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.Hardswish, nn.Conv2d, nn.Hardsigmoid]

_CONSTANTS = {"weight", "bias", "running_mean", "running_var"}


def compute_dtype(transform: nn.Module, x: Tensor | Encoded) -> torch.dtype:
    """What a branch computes an input's planes in: autocast's dtype, the 16 bits of its weights, or the input's."""
    if x.dtype != torch.float32:
        return x.dtype
    parts: dict[str, Any] = transform._modules
    dtype = parts["dw_conv"]._modules["conv"]._parameters["weight"].dtype
    return autocast_dtype(x.device) or (dtype if dtype in HALVES else x.dtype)


def is_constant_norm(norm: nn.Module) -> bool:
    """Whether it is a ``FrozenBatchNorm2d``, as torchvision's and detectron2's: four buffers, whatever the mode."""
    if type(norm).__name__ != "FrozenBatchNorm2d" or norm._parameters or norm._modules:
        return False
    return norm._buffers.keys() - {"num_batches_tracked"} == _CONSTANTS and isinstance(
        getattr(norm, "eps", None), float
    )


def _plain_norm(norm: nn.Module | None) -> bool:
    if type(norm) is nn.BatchNorm2d:
        return norm.affine and norm.momentum is not None
    return norm is not None and is_constant_norm(norm)


def _plain_conv_norm(layer: nn.Module | None, act: type | None, *, depthwise: bool = False) -> bool:
    if type(layer) is not ConvNormAct:
        return False
    modules = layer._modules  # attributes of modules cost ten times as much, and this runs in every step
    conv = modules.get("conv")
    if type(conv) is not nn.Conv2d:
        return False
    if depthwise:
        fits = conv.groups == conv.in_channels == conv.out_channels
    else:
        fits = conv.groups == 1 and conv.kernel_size == conv.stride == (1, 1)
    return (
        fits
        and conv._parameters.get("bias") is None
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.stride[0] == conv.stride[1]
        and _plain_norm(modules.get("norm"))
        and type(modules.get("act")) is (act or type(None))
    )


def _submodules(module: nn.Module) -> list[nn.Module]:
    """``module.modules()``, ten times as fast: this runs for every branch in every step."""
    found = [module]
    for m in found:
        found += [child for child in m._modules.values() if child is not None]
    return found


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether calling one of the modules does more than its class's ``forward``."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return True
        if "forward" in m.__dict__:
            return True
    return False


def why_not_fused(transform: nn.Module, x: Tensor | Encoded) -> str:
    """Why :class:`revbifpn.fused.mbconv.FusedMBConv` cannot stand for ``transform`` on input x; empty when it can.

    What does not fit (other norms or activations, hooks, parametrisations, empty batches, user modules) runs
    through :class:`revbifpn.engine.branch.ModuleBranch`.
    """
    if type(transform) is not MBConv:
        return f"it is a {type(transform).__name__}, not an MBConv"
    parts = transform._modules
    expand, se = parts.get("exp_conv"), parts.get("se")
    if expand is not None and not _plain_conv_norm(expand, nn.Hardswish):
        return "its expansion is not a 1x1 convolution followed by BatchNorm2d and Hardswish"
    if not _plain_conv_norm(parts["dw_conv"], nn.Hardswish, depthwise=True):
        return "its depthwise convolution is not one followed by BatchNorm2d and Hardswish"
    if not _plain_conv_norm(parts["project_conv"], None):
        return "its projection is not a 1x1 convolution followed by BatchNorm2d alone"
    if se is not None:
        layers = list(se.get_submodule("se").children())
        if [type(layer) for layer in layers] != _SQUEEZE_EXCITE or None in (layers[1].bias, layers[3].bias):
            return "its squeeze-excite is not of Hardswish and Hardsigmoid, with biases"
    modules = _submodules(transform)
    if has_hooks(modules):
        return "a module in it has hooks or a forward of its own"
    dtype, dtypes = x.dtype, {q.dtype for m in modules for q in m._parameters.values() if q is not None}
    dtypes |= {q.dtype for m in modules for q in m._buffers.values() if q is not None and q.dtype != torch.int64}
    if dtype == torch.float32 and len(dtypes.difference((dtype,))) == 1:
        dtypes -= {dtype, *HALVES}  # weights of 16 bits are read as float32
    if dtypes - {dtype} or dtype not in (torch.float32, torch.float64):
        return (
            "its parameters, statistics and the stream are neither all float32 nor all float64, nor of 16 bits with a "
            f"float32 stream (the stream is {dtype})"
        )
    if 0 in x.shape:
        return "the batch is empty"
    return ""
