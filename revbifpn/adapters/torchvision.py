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

from torch import Tensor, nn
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
        recompute: recompute the FPN's lateral maps in backward instead of storing them.

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
        self.recompute = recompute
        extra_blocks = LastLevelMaxPool() if extra_blocks is None else extra_blocks
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks) if fpn else _Extended(extra_blocks)
        freeze_unused(body, levels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        named = OrderedDict((str(i), maps[level]) for i, level in enumerate(self.returned_levels))
        if self.recompute and self.training:
            return checkpoint(self.fpn, named, use_reentrant=False)
        return self.fpn(named)


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
