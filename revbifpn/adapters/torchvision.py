"""torchvision: a backbone for its detectors, Faster, Mask and Keypoint R-CNN, RetinaNet and FCOS.

    >>> from torchvision.models.detection import FasterRCNN
    >>> from revbifpn.adapters.torchvision import revbifpn_fpn_backbone
    >>> backbone = revbifpn_fpn_backbone("revbifpn_s0", trainable_layers=3, frozen_norms=True)
    >>> detector = FasterRCNN(backbone, num_classes=91)

``IntermediateLayerGetter``, and torchvision's ``BackboneWithFPN`` over it, call the children of a network one after
another and take a map from each. RevBiFPN has no such children, since all its levels run together:
:class:`BackboneWithFPN` here takes the place of theirs. To ``create_feature_extractor`` and :mod:`torch.fx` a RevBiFPN
is one operation that returns its maps.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.checkpoint import checkpoint

try:
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.adapters.torchvision needs torchvision ({error}): pip install 'revbifpn-fast[torchvision]'"
    ) from error

from revbifpn import fast, model
from revbifpn.adapters.levels import freeze_unused
from revbifpn.checkpoints import load_published
from revbifpn.configs import get_config
from revbifpn.fused import chunk_bytes
from revbifpn.streams import autocast_dtype


class BackboneWithFPN(nn.Module):
    """A RevBiFPN without head, and an FPN that brings its maps to one width: what torchvision's detectors take.

    Args:
        body: made with ``classes=None``; any :class:`revbifpn.RevBiFPN`, on kernels or plain.
        out_channels: of every map.
        returned_levels: of the body, from high to low resolution. What only the others depend on is frozen.
        extra_blocks: further maps of lower resolution, as torchvision's FPN takes them; by default
            :class:`LastLevelMaxPool`, one map called "pool".
        fpn: False leaves out the FPN, since RevBiFPN fuses its levels itself: the body's own maps are returned. It has
            to be made with ``head_channels=[out_channels] * levels`` then.
        recompute: recompute what the FPN computes on the way to its largest map in backward, in strips of rows, instead
            of storing it; see :class:`FeaturePyramid`.

    Attributes:
        out_channels: as above.

    Shapes:
        image ``[N, 3, H, W]`` of a size that the body takes (multiples of 32; the detectors pad to that).
        Returns an OrderedDict from "0", "1", ... and the extra maps' names to maps ``[N, out_channels, H_i, W_i]``.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        body: model.RevBiFPN,
        out_channels: int = 256,
        *,
        returned_levels: Sequence[int] = (0, 1, 2, 3),
        extra_blocks: ExtraFPNBlock | None = None,
        fpn: bool = True,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        levels = list(returned_levels)
        if body.head is not None:
            raise ValueError(
                "body: expected a RevBiFPN without head, got one that classifies; make it with classes=None"
            )
        if not levels or levels != sorted(set(levels) & set(range(body.levels))):
            raise ValueError(
                f"returned_levels: expected ascending levels from 0 to {body.levels - 1}, got {tuple(returned_levels)}"
            )
        channels = [body.neck_channels[level] for level in levels]
        if not fpn and set(channels) != {out_channels}:
            raise ValueError(
                f"fpn: without it expected a body of maps of {out_channels} channels, got {channels}; make it with "
                f"head_channels={[out_channels] * body.levels}"
            )
        self.body = body
        self.returned_levels = levels
        self.out_channels = out_channels
        extra_blocks = LastLevelMaxPool() if extra_blocks is None else extra_blocks
        pyramid = FeaturePyramid if recompute else FeaturePyramidNetwork
        self.fpn = pyramid(channels, out_channels, extra_blocks) if fpn else _Extended(extra_blocks)
        freeze_unused(body, levels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return self.fpn(OrderedDict((str(i), maps[level]) for i, level in enumerate(self.returned_levels)))


class FeaturePyramid(FeaturePyramidNetwork):
    """torchvision's FPN, with the same parameters, of whose largest level nothing but the input is stored.

    ``m_l = L_l n_l + up(m_{l+1})``, ``p_l = O_l m_l`` for 1x1 convolutions L and 3x3 convolutions O. The largest level
    has three quarters of all pixels: its ``m_0`` exists a strip of rows at a time, in forward and in backward.
    """

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        names, maps = list(x), list(x.values())
        halves = len(maps) > 1 and all(2 * s == t for s, t in zip(maps[1].shape[-2:], maps[0].shape[-2:], strict=True))
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if not halves:
            return checkpoint(super().forward, x, use_reentrant=False)
        merged = self.inner_blocks[-1](maps[-1])
        found = [self.layer_blocks[-1](merged)]
        for level in range(len(maps) - 2, 0, -1):
            lateral = self.inner_blocks[level](maps[level])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            found.insert(0, self.layer_blocks[level](merged))
        lateral, output = self.inner_blocks[0][0], self.layer_blocks[0][0]
        weights = lateral.weight, lateral.bias, output.weight, output.bias
        largest, twin = _Largest.apply(maps[0], merged, *weights)
        found.insert(0, largest)
        if self.extra_blocks is not None:
            found, names = self.extra_blocks(found, maps, names)
        return Pyramid(zip(names, found, strict=True), twin=twin)


class Pyramid(OrderedDict[str, Tensor]):
    """The maps of a pyramid by name, from high to low resolution.

    Args:
        maps: by name.
        twin: the largest map once more, [N, H, W, C], whose gradient may be sparse.
    """

    def __init__(self, maps: Any = (), twin: Tensor | None = None) -> None:
        super().__init__(maps)
        self.twin = twin

    def pixels(self, name: str, image: Tensor, y: Tensor, x: Tensor) -> Tensor:  # [..., C]
        """Some pixels of a map; of the largest without a gradient as large as the map, where it has a twin."""
        if self.twin is not None and name == next(iter(self)):
            return _Pixels.apply(self.twin, image, y, x)
        return self[name].permute(0, 2, 3, 1)[image, y, x]


def strips(height: int, row_bytes: int, device: torch.device) -> list[tuple[int, int]]:
    """``(first, end)`` of strips of rows that take about :func:`revbifpn.fused.chunk_bytes` each."""
    rows = max(2, chunk_bytes(device) // max(1, row_bytes))
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


class _Pixels(torch.autograd.Function):
    """``p[image, y, x]`` of maps [N, H, W, C]; the gradient of p is sparse."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(image, y, x)
        ctx.shape = p.shape
        return p[image, y, x]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
        indices = torch.stack([index.flatten() for index in ctx.saved_tensors])
        values = dvalues.flatten(0, -2)
        return torch.sparse_coo_tensor(indices, values, ctx.shape, check_invariants=False), None, None, None


class _Largest(torch.autograd.Function):
    """``p = O (L n + up(above))`` in strips; backward computes ``m = L n + up(above)`` again, strip by strip."""

    @staticmethod
    def forward(ctx: Any, n: Tensor, above: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(n, above, *weights)
        ctx.dtype = autocast_dtype(n.device) or n.dtype
        lateral, bias, output, output_bias = (w.to(ctx.dtype) for w in weights)
        height, width = n.shape[-2:]
        p = n.new_empty(len(n), len(output), height, width, dtype=ctx.dtype)
        for first, end in strips(height, p[:, :, 0].nbytes, p.device):
            merged = _merged(n, above, lateral, bias, first - 1, end + 1)
            p[:, :, first:end] = F.conv2d(merged, output, output_bias, padding=(0, 1))
        return p, p.detach().permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor | None, dtwin: Tensor | None) -> tuple[Tensor | None, ...]:
        n, above, *weights = ctx.saved_tensors
        if dp is None and dtwin is None:
            return (None,) * (2 + len(weights))
        if dtwin is not None and not dtwin.is_sparse:
            dense = dtwin.permute(0, 3, 1, 2)
            dp, dtwin = dense if dp is None else dp + dense, None
        lateral, bias, output, _ = (w.to(ctx.dtype) for w in weights)
        dn, dabove = torch.zeros_like(n), torch.zeros_like(above)
        dlateral, dbias, doutput, doutput_bias = sums = [torch.zeros_like(w) for w in weights]
        height, width = n.shape[-2:]
        row = n.new_zeros(len(n), len(output), 1, width, dtype=ctx.dtype)
        for first, end in strips(height, row.nbytes, n.device):
            dstrip = row.expand(-1, -1, end - first, -1) if dp is None else dp[:, :, first:end].to(ctx.dtype)
            if dtwin is not None:
                dstrip = _with_pixels(dstrip, dtwin.coalesce(), first)
            merged = _merged(n, above, lateral, bias, first - 1, end + 1)
            doutput += conv2d_weight(merged, output.shape, dstrip, padding=(0, 1))
            doutput_bias += dstrip.sum((0, 2, 3))
            dmerged = conv2d_input(merged.shape, output, dstrip, padding=(0, 1))
            low, high = max(first - 1, 0), min(end + 1, height)  # the rows of it that exist
            dmerged = dmerged[:, :, low - first + 1 : high - first + 1]
            rows = n[:, :, low:high].to(ctx.dtype)
            dlateral += conv2d_weight(rows, lateral.shape, dmerged)
            dbias += dmerged.sum((0, 2, 3))
            dn[:, :, low:high] += conv2d_input(rows.shape, lateral, dmerged)
            whole = F.pad(dmerged, (0, 0, low % 2, high % 2))  # pixels of `above`
            dabove[:, :, low // 2 : (high + 1) // 2] += F.avg_pool2d(whole, 2, divisor_override=1)
        return dn, dabove, *sums


def _with_pixels(dstrip: Tensor, dtwin: Tensor, first: int) -> Tensor:
    """The gradient of a strip of rows, plus that of pixels in it."""
    (image, y, x), values = dtwin.indices(), dtwin.values()
    here = (y >= first) & (y < first + dstrip.shape[2])
    dstrip = dstrip.clone()
    dstrip.permute(0, 2, 3, 1)[image[here], y[here] - first, x[here]] += values[here].to(dstrip.dtype)
    return dstrip


def _merged(n: Tensor, above: Tensor, lateral: Tensor, bias: Tensor, first: int, end: int) -> Tensor:
    """``m[first:end]``, with rows of zeros where there is no map: [N, C, end - first, W]."""
    low, high = max(first, 0), min(end, n.shape[-2])
    merged = F.conv2d(n[:, :, low:high].to(lateral.dtype), lateral, bias)
    source = above[:, :, low // 2 : (high + 1) // 2].to(lateral.dtype)
    merged += F.interpolate(source, scale_factor=2.0, mode="nearest")[:, :, low % 2 : low % 2 + high - low]
    return F.pad(merged, (0, 0, low - first, end - high)) if (low, high) != (first, end) else merged


class _Extended(nn.Module):
    """Maps as they are, and the extra ones."""

    def __init__(self, extra_blocks: ExtraFPNBlock) -> None:
        super().__init__()
        self.extra_blocks = extra_blocks

    def forward(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        maps, names = list(named.values()), list(named)
        maps, names = self.extra_blocks(list(maps), maps, names)
        return OrderedDict(zip(names, maps, strict=True))


def revbifpn_fpn_backbone(
    arch: str,
    pretrained: bool = False,
    *,
    progress: bool = False,
    trainable_layers: int | None = None,
    frozen_norms: bool | None = None,
    out_channels: int = 256,
    returned_levels: Sequence[int] = (0, 1, 2, 3),
    extra_blocks: ExtraFPNBlock | None = None,
    fpn: bool = True,
    recompute: bool = True,
    **overrides: Any,
) -> BackboneWithFPN:
    """A published scale on fused kernels as a detector's backbone.

    Args:
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        pretrained: load the published ImageNet weights; with ``fpn=False`` those of the neck as far as they fit.
        progress: show the download's progress.
        trainable_layers: how many layers of the stack train, counted from the last; None: all.
        frozen_norms: norms keep the statistics and affine parameters that they have; None: if ``pretrained``.
        out_channels, returned_levels, extra_blocks, fpn, recompute: see :class:`BackboneWithFPN`. RetinaNet and FCOS
            usually take ``returned_levels=(1, 2, 3)`` and torchvision's ``LastLevelP6P7(256, 256)``.
        overrides: constructor arguments of the body that replace the scale's, such as ``stream``.
    """
    config = get_config(arch)
    arguments = config.arguments() | {"classes": None} | overrides
    if not fpn:
        arguments["head_channels"] = [out_channels] * len(arguments["channels"])
    body = fast.RevBiFPN(**arguments)
    if pretrained:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no head to load
            load_published(body, config, progress=progress, strict=False)
    if pretrained if frozen_norms is None else frozen_norms:
        body.freeze_norms()
    if trainable_layers is not None:
        body.freeze_layers(_checked(trainable_layers, body))
    return BackboneWithFPN(
        body, out_channels, returned_levels=returned_levels, extra_blocks=extra_blocks, fpn=fpn, recompute=recompute
    )


def _checked(trainable_layers: int, body: model.RevBiFPN) -> int:
    """How many layers are frozen."""
    layers = len(body.layers)
    if not 0 <= trainable_layers <= layers:
        raise ValueError(f"trainable_layers: expected 0 to {layers}, as the stack has, got {trainable_layers}")
    return layers - trainable_layers
