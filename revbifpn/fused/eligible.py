"""Which transforms run on fused kernels, and why another does not."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, contains
from typing import Any
from weakref import WeakKeyDictionary

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
    return any(any(_hooks(m)) or "forward" in m.__dict__ for m in modules)


def _hooks(m: nn.Module) -> tuple[dict, ...]:
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


class Inspected:
    """What was looked at of a module that can be fused: a later look is a comparison, as every step takes one.

    It refers to the parts of the module and never to itself, and so can be kept for as long as that lives.

    Args:
        itself: calling the module must do no more than its class's ``forward``, as calling its parts.
    """

    def __init__(self, module: nn.Module, *, itself: bool = True) -> None:
        modules = _submodules(module)
        self.parts = modules[1:]
        called = modules if itself else self.parts
        self.types = [type(m) for m in self.parts]
        # Layers without parts are left out: their classes' forward, which is looked at, would call none.
        self.children = [m._modules for m in modules if m._modules]
        self.order = self._order()
        self.attributes = [m.__dict__ for m in called]
        self.hooks = [hooks for m in called for hooks in _hooks(m)]
        self.layers = [(get, [m for m in self.parts if type(m) is kind]) for kind, get in _SETTINGS.items()]
        self.layers.append((attrgetter("eps"), [m for m in self.parts if is_constant_norm(m)]))
        self.settings = self._settings()
        self.tensors: list[dict[str, Any]] = []
        for m in modules:
            self.tensors += [tensors for tensors in (m._parameters, m._buffers) if tensors]
        self.dtypes = self._dtypes()
        self.stream = torch.float64 if torch.float64 in self.dtypes else torch.float32  # that its kernels take
        self.reduced = not set(HALVES).isdisjoint(self.dtypes)  # some are to be read as float32
        self.kept: dict[Any, Any] = {}  # what was worked out of all this

    def _order(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self.children)))

    def _dtypes(self) -> list[torch.dtype | None]:
        tensors = chain.from_iterable(map(dict.values, self.tensors))
        return list(map(getattr, tensors, repeat("dtype"), repeat(None)))

    def _settings(self) -> list[list[Any]]:
        return [list(map(get, layers)) for get, layers in self.layers]

    def is_current(self) -> bool:
        """Whether everything is as it was."""
        return self.is_bare() and self.is_same() and self._dtypes() == self.dtypes

    def is_bare(self) -> bool:
        """Whether calling the modules does no more than their classes' ``forward``."""
        return not any(self.hooks) and not any(map(contains, self.attributes, repeat("forward")))

    def is_same(self) -> bool:
        """Whether they are made of the same modules, with the same settings."""
        return (
            self._order() == self.order
            and list(map(type, self.parts)) == self.types
            and self._settings() == self.settings
        )


# What the kernels take for granted of a layer, besides its tensors.
_SETTINGS = {
    nn.Conv2d: attrgetter(
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    ),
    nn.BatchNorm2d: attrgetter("affine", "momentum", "eps", "track_running_stats"),
}
_inspected: WeakKeyDictionary[nn.Module, Inspected] = WeakKeyDictionary()


def why_not_fused(transform: nn.Module, x: Tensor | Encoded) -> str:
    """Why :class:`revbifpn.fused.mbconv.FusedMBConv` cannot stand for ``transform`` on input x; empty when it can.

    What does not fit (other norms or activations, hooks, parametrisations, empty batches, user modules) runs
    through :class:`revbifpn.engine.branch.ModuleBranch`.
    """
    known = _inspected.get(transform)
    if known is None or not known.is_current():
        reason = why_not_built_so(transform) or _why_not_dtypes(transform)
        if reason:
            return reason
        known = _inspected[transform] = Inspected(transform)
    if known.stream != x.dtype:
        return f"its parameters and statistics go with a stream of {known.stream}, and this one is {x.dtype}"
    if 0 in x.shape:
        return "the batch is empty"
    return ""


def inspected(transform: nn.Module) -> Inspected:
    """What :func:`why_not_fused` found of a transform that it let pass."""
    return _inspected[transform]


def why_not_built_so(mbconv: nn.Module) -> str:
    """The same of the module alone."""
    if type(mbconv) is not MBConv:
        return f"it is a {type(mbconv).__name__}, not an MBConv"
    parts = mbconv._modules
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
    modules = _submodules(mbconv)
    if has_hooks(modules):
        return "a module in it has hooks or a forward of its own"
    return ""


def _why_not_dtypes(mbconv: nn.Module) -> str:
    """The same of its parameters and statistics."""
    modules = _submodules(mbconv)
    counts = [m._buffers.get("num_batches_tracked") for m in modules]
    if any(count is not None and count.dtype != torch.int64 for count in counts):
        return "a norm counts its batches in another dtype than int64"
    tensors = chain.from_iterable([*m._parameters.values(), *m._buffers.values()] for m in modules)
    dtypes = {t.dtype for t in tensors if t is not None and t.dtype != torch.int64}
    reduced = dtypes.difference((torch.float32,))
    if dtypes != {torch.float64} and (len(reduced) > 1 or not reduced.issubset(HALVES)):
        names = " and ".join(sorted(map(str, dtypes)))
        return f"its parameters and statistics are {names}, not float64 alone, nor float32 and 16 bits of one kind"
    return ""
