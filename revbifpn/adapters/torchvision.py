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
from collections.abc import Callable, Sequence
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
from revbifpn.engine.branch import is_sharded
from revbifpn.engine.nodes import repetition
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
        recompute: recompute what the FPN computes on the way to its maps in backward, of the largest one in strips of
            rows, instead of storing it; see :class:`FeaturePyramid`.

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
        named = OrderedDict((str(i), maps[level]) for i, level in enumerate(self.returned_levels))
        if not isinstance(self.fpn, FeaturePyramid):
            return self.fpn(named)
        return self.fpn(named, repeat=not is_sharded(self.body))  # whose parameters are not there in the FPN's backward


class FeaturePyramid(FeaturePyramidNetwork):
    """torchvision's FPN, with the same parameters, which keeps little of what it computes.

    ``m_l = L_l n_l + up(m_{l+1})``, ``p_l = O_l m_l`` for 1x1 convolutions L and 3x3 convolutions O. The largest level
    has three quarters of all pixels: its ``m_0`` exists a strip of rows at a time, in forward and in backward, and its
    ``n_0`` is computed once more where a reversible body can. The smaller m are recomputed.
    """

    def forward(self, x: dict[str, Tensor], repeat: bool = True) -> dict[str, Tensor]:
        """The maps by name; ``repeat``: have the body compute its largest map again instead of saving it."""
        names, maps = list(x), list(x.values())
        halves = len(maps) > 1 and all(2 * s == t for s, t in zip(maps[1].shape[-2:], maps[0].shape[-2:], strict=True))
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if not halves:
            return checkpoint(super().forward, x, use_reentrant=False)
        merged, *found = checkpoint(self._smaller, *maps[1:], use_reentrant=False, preserve_rng_state=False)
        (lateral, *others), output = [block[0] for block in self.inner_blocks], self.layer_blocks[0][0]
        weights = lateral.weight, lateral.bias, output.weight, output.bias
        below = [*maps[1:], *(w for block in others for w in (block.weight, block.bias))]  # that `merged` comes from
        again = repetition(maps[0]) if repeat else None
        largest, twin = _Largest.apply(maps[0], merged, again, *weights, *(t.detach() for t in below))
        found.insert(0, largest)
        if self.extra_blocks is not None:
            found, names = self.extra_blocks(found, maps, names)
        return Pyramid(zip(names, found, strict=True), twin=twin)

    def _smaller(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """``m_1, p_1, p_2, ...`` from ``n_1, n_2, ...``."""
        merged = self.inner_blocks[-1](maps[-1])
        found = [self.layer_blocks[-1](merged)]
        for level in range(len(maps) - 1, 0, -1):
            lateral = self.inner_blocks[level](maps[level - 1])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            found.insert(0, self.layer_blocks[level](merged))
        return merged, *found


def _merge_again(maps: Sequence[Tensor], laterals: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """``m_1`` from ``n_1, n_2, ...`` and the laterals' weights and biases, under autocast to ``dtype`` or none."""
    merged: Tensor | None = None
    pairs = zip(laterals[::2], laterals[1::2], strict=True)
    with torch.autocast(maps[0].device.type, dtype, enabled=dtype is not None):
        for n, (weight, bias) in reversed(list(zip(maps, pairs, strict=True))):
            lateral = F.conv2d(n, weight, bias)
            if merged is not None:
                _add_upsampled_(lateral, merged)
            merged = lateral
    assert merged is not None, "there is a smaller level"
    return merged


def _add_upsampled_(y: Tensor, x: Tensor) -> None:
    """``y <- y + up(x)``, to the nearest."""
    (height, width), (h, w) = y.shape[-2:], x.shape[-2:]
    if (height, width) == (2 * h, 2 * w):  # without a map for up(x)
        y.view(*y.shape[:2], h, 2, w, 2).add_(x[:, :, :, None, :, None])
    else:
        y += F.interpolate(x, size=(height, width), mode="nearest")


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
    """``(first, end)`` of strips of rows, first even; they take about twice :func:`revbifpn.fused.chunk_bytes` each.

    Each is computed with a row more above and below.
    """
    rows = max(2, 2 * chunk_bytes(device) // max(1, row_bytes) // 2 * 2)
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
    """``p = O (L n + up(above))`` in strips; backward computes ``m = L n + up(above)`` again, strip by strip.

    ``above`` is computed again, and n by ``again``, if given: their gradients are written over them, row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        n: Tensor,
        above: Tensor,
        again: Callable[[], Tensor] | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.again, ctx.autocast = again, autocast_dtype(n.device)
        ctx.save_for_backward(n if again is None else None, *tensors)
        ctx.dtype = ctx.autocast or n.dtype
        lateral, bias, output, output_bias = (w.to(ctx.dtype) for w in tensors[:4])
        height, width = n.shape[-2:]
        p = n.new_empty(len(n), len(output), height, width, dtype=ctx.dtype)
        for first, end in strips(height, p[:, :, 0].nbytes, p.device):
            merged = _merged(n, above, lateral, bias, first - 1, end + 1)
            p[:, :, first:end] = F.conv2d(merged, output, output_bias, padding=(0, 1))
        return p, p.detach().permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor | None, dtwin: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        if dp is None and dtwin is None:
            return (None,) * (3 + len(tensors))
        if dtwin is not None and not dtwin.is_sparse:
            dense = dtwin.permute(0, 3, 1, 2)
            dp, dtwin = dense if dp is None else dp + dense, None
        pixels = None if dtwin is None else dtwin.coalesce()
        weights, below = tensors[:4], tensors[4:]
        lateral, bias, output, _ = (w.to(ctx.dtype) for w in weights)
        n = ctx.again() if saved is None else saved
        dn = n if saved is None else torch.empty_like(n, memory_format=torch.contiguous_format)
        levels = len(below) // 3  # a map, a weight and a bias each
        above = dabove = _merge_again(below[:levels], below[levels:], ctx.autocast)
        dlateral, dbias, doutput, doutput_bias = sums = [torch.zeros_like(w) for w in weights]
        height, width = n.shape[-2:]
        row = n.new_zeros(len(n), len(output), 1, width, dtype=ctx.dtype)
        before = n.new_zeros(len(n), len(lateral), 1, width, dtype=ctx.dtype)  # m[first - 1]
        for first, end in strips(height, row.nbytes, n.device):
            dstrip = row.expand(-1, -1, end - first + 2, -1) if dp is None else _rows(dp, first - 1, end + 1)
            if pixels is not None:
                dstrip = _with_pixels(dstrip, pixels, first - 1)
            dstrip = dstrip.to(ctx.dtype)
            own = dstrip[:, :, 1:-1]  # without the neighbours
            merged = torch.cat([before, _merged(n, above, lateral, bias, first, end + 1)], 2)
            before = merged[:, :, -2:-1].clone()
            doutput += conv2d_weight(merged, output.shape, own, padding=(0, 1))
            doutput_bias += own.sum((0, 2, 3))
            dmerged = conv2d_input(merged.shape, output, dstrip, padding=1)[:, :, 1:-1]
            rows = n[:, :, first:end].to(ctx.dtype)
            dlateral += conv2d_weight(rows, lateral.shape, dmerged)
            dbias += dmerged.sum((0, 2, 3))
            dn[:, :, first:end] = conv2d_input(rows.shape, lateral, dmerged)
            dabove[:, :, first // 2 : end // 2] = F.avg_pool2d(dmerged, 2, divisor_override=1)
        return dn, dabove, None, *sums, *[None] * len(below)


def _rows(x: Tensor, first: int, end: int) -> Tensor:
    """``x[first:end]`` of the rows, with rows of zeros where there is no map."""
    low, high = max(first, 0), min(end, x.shape[-2])
    return F.pad(x[:, :, low:high], (0, 0, low - first, end - high))


def _with_pixels(dstrip: Tensor, pixels: Tensor, first: int) -> Tensor:
    """The gradient of a strip of rows, plus that of pixels in it."""
    (image, y, x), values = pixels.indices(), pixels.values()
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
