"""The seven published scales, their checkpoints and what was reported for them.

Source: arXiv 2206.14098 and the published code; parameters, MACs and checksums are those of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_CHANNELS = (48, 64, 80, 160)
_HEAD_CHANNELS = (48, 64, 128, 320)
_FC_FEATURES = 1280
CLASSES = 1000  # of ImageNet-1k
# The recipe was not published in code, save that it ran in timm's train.py: these are timm's defaults.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of values in [0, 1]
CROP, INTERPOLATION = 0.875, "bicubic"  # in validation: resized to resolution / CROP, then cropped
_URL = "https://cerebras-public.s3.us-west-2.amazonaws.com/revbifpn/{arch}.pth.tar"


@dataclass(frozen=True)
class Config:
    """One published scale.

    Attributes:
        arch: its name, such as ``"revbifpn_s0"``.
        width: exact width multiplier of the channels of S0.
        num_ext_layers: layers after the growing ones.
        head_dropout, stochastic_depth: probabilities in training.
        resolution: side of the square training image in pixels.
        top1: published ImageNet-1k top-1 accuracy in per cent, at ``resolution``.
        parameters: number of parameters with the head of 1000 classes.
        macs: multiply-accumulates of convolutions and linear layers for one image at ``resolution``.
        sha256: of the published checkpoint file.
    """

    arch: str
    width: Fraction
    num_ext_layers: int
    head_dropout: float
    stochastic_depth: float
    resolution: int
    top1: float
    parameters: int
    macs: int
    sha256: str

    def _scaled(self, base: int) -> int:
        return int(self.width * base) // 16 * 16

    @property
    def channels(self) -> list[int]:
        """Channels of the streams, from stride 4 to stride 32."""
        return [self._scaled(c) for c in _CHANNELS]

    @property
    def head_channels(self) -> list[int]:
        """Channels of the pyramid after the neck."""
        return [self._scaled(c) for c in _HEAD_CHANNELS]

    @property
    def fc_features(self) -> int:
        """Width before the classifier."""
        return self._scaled(_FC_FEATURES)

    @property
    def url(self) -> str:
        """Where the checkpoint was published."""
        return _URL.format(arch=self.arch)

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of :class:`revbifpn.RevBiFPN`."""
        return {
            "channels": self.channels,
            "num_ext_layers": self.num_ext_layers,
            "stochastic_depth": self.stochastic_depth,
            "head_channels": self.head_channels,
            "fc_features": self.fc_features,
            "head_dropout": self.head_dropout,
        }


def _config(scale: int, width: Fraction, *rest: Any) -> Config:
    return Config(f"revbifpn_s{scale}", width, *rest)


_F = Fraction
# fmt: off
_SCALES = (
    #        width   ext  dropout  depth  res  top-1  parameters          MACs
    _config(0, _F(1),      2, .25, 0.,  224, 72.8,   3_419_196,    269_409_648,
            "a9ee012a2670003ea18deca1afaed7c1323ffaafc83b0a30874d262bf2403cfa"),
    _config(1, _F(4, 3),   2, .25, 0.,  256, 75.9,   5_112_300,    550_806_528,
            "584b0c3ea677ac5eff6c0f54b4b683973e7533bfde334155cd770aef041673c4"),
    _config(2, _F(2),      2, .3,  0.,  256, 79.0,  10_576_528,  1_269_423_104,
            "62ff9387b498550d31e248742a002be22cb29e800cd387ec9c93b6da7418dcc8"),
    _config(3, _F(8, 3),   3, .3,  .05, 288, 81.1,  19_574_184,  3_123_379_040,
            "1695576b09ee9fc584df616abaf0762188122468825cc92b5abfeec63b609d25"),
    _config(4, _F(4),      4, .4,  .1,  320, 83.0,  48_687_336, 10_167_773_440,
            "61d7b65524000bb147aac26ad559906a2380e55a499d9d420063cc2b9e2ef42a"),
    _config(5, _F(16, 3),  4, .4,  .1,  352, 83.7,  81_998_976, 21_103_385_712,
            "d7713a25c7f62bf4b9ebaa2693a7b6896e7965c6647cbd1d98eddeae8b74cdc3"),
    _config(6, _F(20, 3),  5, .6,  .3,  352, 84.2, 142_307_972, 37_003_772_256,
            "31f355d5fb54610ad9051d08d0ec10bb0d33f40c0936352cb863b9f9a3d4fa09"),
)
# fmt: on
CONFIGS: dict[str, Config] = {config.arch: config for config in _SCALES}


def get_config(arch: str) -> Config:
    """The configuration called ``arch``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    try:
        return CONFIGS[arch]
    except KeyError:
        raise ValueError(f"arch: expected one of {sorted(CONFIGS)}, got {arch!r}") from None
