"""Detectron2: RevBiFPN in its registry of backbones, alone and under its FPN.

    >>> from detectron2.config import get_cfg
    >>> from revbifpn.adapters.detectron2 import add_revbifpn_config
    >>> cfg = get_cfg()
    >>> add_revbifpn_config(cfg)
    >>> cfg.MODEL.BACKBONE.NAME = "build_revbifpn_fpn_backbone"
    >>> cfg.MODEL.REVBIFPN.ARCH = "revbifpn_s3"
    >>> cfg.MODEL.FPN.IN_FEATURES = ["rev2", "rev3", "rev4", "rev5"]

``cfg.MODEL.BACKBONE.FREEZE_AT`` layers of the stack, from the first, do not train, as its ResNet's stages do not.
Written to Detectron2's documented interface; it publishes no wheels, and the tests run against that interface alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from detectron2.config import CfgNode
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.adapters.detectron2 needs detectron2 ({error}): "
        "pip install 'git+https://github.com/facebookresearch/detectron2.git'"
    ) from error

from revbifpn import fast
from revbifpn.adapters.levels import freeze_unused
from revbifpn.configs import get_config

FEATURES = ("rev2", "rev3", "rev4", "rev5")  # of strides 2^2 to 2^5, as Detectron2 counts


class RevBiFPN(fast.RevBiFPN, Backbone):
    """A published scale as a backbone, :class:`revbifpn.fast.RevBiFPN` without head.

    Args:
        arch: ``"revbifpn_s0"`` to ``"revbifpn_s6"``.
        out_features: names out of :data:`FEATURES`. What only other levels depend on is frozen.
        freeze_at: how many layers of the stack, from the first, do not train.
        frozen_norms: norms keep their statistics and affine parameters.
        overrides: constructor arguments of :class:`revbifpn.RevBiFPN` that replace the scale's, such as ``stream``.

    Shapes:
        image ``[N, 3, H, W]``, H and W multiples of 32, to which Detectron2 pads by ``size_divisibility``. Returns a
        dict of maps ``[N, C_i, H / 2^i, W / 2^i]`` for names ``rev{i}``.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        arch: str = "revbifpn_s0",
        *,
        out_features: Sequence[str] = FEATURES,
        freeze_at: int = 0,
        frozen_norms: bool = True,
        **overrides: Any,
    ) -> None:
        super().__init__(**(get_config(arch).arguments() | {"classes": None} | overrides))
        names = FEATURES[: self.levels]
        if not out_features or not set(out_features) <= set(names):
            raise ValueError(f"out_features: expected names out of {names}, got {tuple(out_features)}")
        self.out_features = tuple(name for name in names if name in out_features)
        if frozen_norms:
            self.freeze_norms()
        if not 0 <= freeze_at <= len(self.layers):
            raise ValueError(f"freeze_at: expected 0 to {len(self.layers)}, got {freeze_at}")
        self.freeze_layers(freeze_at)
        freeze_unused(self, [names.index(name) for name in self.out_features])

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        maps = dict(zip(FEATURES, super().forward(x), strict=False))
        return {name: maps[name] for name in self.out_features}

    def output_shape(self) -> dict[str, Any]:
        """Channels and stride of every map."""
        info = dict(zip(FEATURES, self.feature_info, strict=False))
        return {
            name: ShapeSpec(channels=info[name]["num_chs"], stride=info[name]["reduction"])
            for name in self.out_features
        }

    @property
    def size_divisibility(self) -> int:
        return self.stride


def add_revbifpn_config(cfg: Any) -> None:
    """``cfg.MODEL.REVBIFPN``, with defaults."""
    cfg.MODEL.REVBIFPN = CfgNode(
        {"ARCH": "revbifpn_s0", "OUT_FEATURES": list(FEATURES), "FROZEN_NORMS": True, "STREAM": ""}
    )


@BACKBONE_REGISTRY.register()
def build_revbifpn_backbone(cfg: Any, input_shape: Any) -> RevBiFPN:
    """The backbone that a config asks for."""
    own = cfg.MODEL.REVBIFPN
    return RevBiFPN(
        own.ARCH,
        out_features=own.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        frozen_norms=own.FROZEN_NORMS,
        stream=own.STREAM or None,
        in_chans=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_revbifpn_fpn_backbone(cfg: Any, input_shape: Any) -> Any:
    """The same under Detectron2's FPN, whose maps are "p2" to "p6"."""
    return FPN(
        bottom_up=build_revbifpn_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
