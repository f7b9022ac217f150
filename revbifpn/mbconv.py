"""MBConv, the transform of every branch, with the published submodule names (see :mod:`revbifpn.model`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.engine.anomaly import check_finite
from revbifpn.engine.branch import indifferent_to_gradients
from revbifpn.streams import HALVES

BATCH_NORM = {"eps": 1e-3, "momentum": 0.1, "affine": True, "track_running_stats": True}


@dataclass(frozen=True)
class Layers:
    """Which layers convolutions are combined with, the same in the whole network.

    Attributes:
        norm: normalise after every convolution; otherwise convolutions have a bias.
        norm_fn: ``norm_fn(channels, **norm_kwargs)`` makes a normalisation layer.
        act_fn: ``act_fn()`` makes an activation.
        se_sig_act: ``se_sig_act()`` makes the gate's activation in squeeze-excite.
    """

    norm: bool = True
    norm_fn: Callable[..., nn.Module] = nn.BatchNorm2d
    norm_kwargs: Mapping[str, Any] = field(default_factory=lambda: dict(BATCH_NORM))
    act_fn: Callable[[], nn.Module] = nn.Hardswish
    se_sig_act: Callable[[], nn.Module] = nn.Hardsigmoid


@indifferent_to_gradients
class ConvNormAct(nn.Module):
    """Convolution with padding ``(k - 1) // 2``, normalisation, activation; the last two may be absent."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        layers: Layers,
        *,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=not layers.norm
        )
        self.norm = layers.norm_fn(out_channels, **layers.norm_kwargs) if layers.norm else None
        self.act = layers.act_fn() if act else None

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C', ceil(H / s), ceil(W / s)]
        x = self.conv(x)
        if self.norm is not None:
            x = _normalized(self.norm, x)
        return x if self.act is None else self.act(x)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``; with weights of 16 bits beside float32 statistics, which BatchNorm does not take, of float32 ones.

    So weights are gathered by ``fully_shard`` with ``MixedPrecisionPolicy(param_dtype=...)``, which leaves buffers.
    """
    weight, statistics = norm._parameters.get("weight"), norm._buffers.get("running_mean")
    if weight is None or statistics is None or weight.dtype not in HALVES or statistics.dtype != torch.float32:
        return norm(x)
    return torch.func.functional_call(norm, {name: q.float() for name, q in norm.named_parameters()}, (x,))


@indifferent_to_gradients
class SqueezeExcite(nn.Module):
    """``x * sigma(W2 h(W1 mean_hw(x) + b1) + b2)``."""

    def __init__(self, channels: int, hidden: int, layers: Layers) -> None:
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            layers.act_fn(),
            nn.Conv2d(hidden, channels, 1),
            layers.se_sig_act(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x)


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop a sample's whole contribution with probability p: ``x * keep / (1 - p)``, ``keep ~ Bernoulli(1 - p)``."""
    if not training or p == 0.0:
        return x
    keep = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - p)
    return x * keep.div_(1.0 - p)


@indifferent_to_gradients
class MBConv(nn.Module):
    """Inverted bottleneck without a skip: expand 1x1, depthwise k x k, squeeze-excite, project 1x1, stochastic depth.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: of the depthwise convolution, odd.
        expand_ratio: the depthwise convolution works on ``int(in_channels * expand_ratio)`` channels; 1: no expansion.
        se_ratio: hidden width of squeeze-excite over ``in_channels``; 0: none.
        stride: of the depthwise convolution.
        stochastic_depth: probability in [0, 1) of dropping the result, per sample, in training.
        layers: see :class:`Layers`.

    Source: arXiv 1801.04381 (inverted residual), 1905.02244 (squeeze-excite in it), 1603.09382 (stochastic depth).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        expand_ratio: float = 1,
        se_ratio: float = 0.0,
        stride: int = 1,
        stochastic_depth: float = 0.0,
        layers: Layers | None = None,
    ) -> None:
        super().__init__()
        layers = layers or Layers()
        if not 0.0 <= stochastic_depth < 1.0:
            raise ValueError(f"stochastic_depth: expected a probability in [0, 1), got {stochastic_depth}")
        expanded = int(in_channels * expand_ratio)
        self.exp_conv = ConvNormAct(in_channels, expanded, 1, layers) if expand_ratio != 1 else None
        self.dw_conv = ConvNormAct(expanded, expanded, kernel_size, layers, stride=stride, groups=expanded)
        hidden = max(1, int(in_channels * se_ratio))
        self.se = SqueezeExcite(expanded, hidden, layers) if 0 < se_ratio <= 1 else None
        self.project_conv = ConvNormAct(expanded, out_channels, 1, layers, act=False)
        self.stochastic_depth = stochastic_depth

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C', ceil(H / s), ceil(W / s)]
        if self.exp_conv is not None:
            x = self.exp_conv(x)
        x = self.dw_conv(x)
        if self.se is not None:
            x = self.se(x)
        x = self.project_conv(x)
        check_finite(self, x)
        return stochastic_depth(x, self.stochastic_depth, self.training)
