"""The transforms of RevBiFPN: which channels, kernel, ratios and stride each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from revbifpn.mbconv import Layers, MBConv
from revbifpn.reversible import PerLevel, RevBlock, Reversible, RevSilo, Upsampled

T = TypeVar("T")


@dataclass(frozen=True)
class Builder:
    """Makes the parts of a network from its lists, which have one entry per level, from high to low resolution.

    Attributes:
        channels, dwk, dwkp, expand_ratios, se_ratios, upscale_mode: as :class:`revbifpn.RevBiFPN` takes them.
        layers: which layers convolutions are combined with.

    Raises:
        ValueError: a list does not have one entry per level, or ``upscale_mode`` is unknown.
    """

    channels: Sequence[int]
    dwk: Sequence[int]
    dwkp: Sequence[int]
    expand_ratios: Sequence[float]
    se_ratios: Sequence[float]
    upscale_mode: str
    layers: Layers

    def __post_init__(self) -> None:
        for name in ("dwk", "dwkp", "expand_ratios", "se_ratios"):
            given = len(getattr(self, name))
            if given != self.levels:
                raise ValueError(f"{name}: expected one entry per level, {self.levels} as channels has, got {given}")
        if self.upscale_mode not in ("bilinear", "nearest"):
            raise ValueError(f"upscale_mode: expected 'bilinear' or 'nearest', got {self.upscale_mode!r}")

    @property
    def levels(self) -> int:
        return len(self.channels)

    def stack(self, inv_blk_rep: int, num_ext_layers: int, stochastic_depth: float) -> list[Reversible]:
        """Layers of RevBlocks and a silo: those that create a level each, then ``num_ext_layers`` of all levels."""
        layers = self.levels - 1 + num_ext_layers
        blocks: list[Reversible] = []
        for layer in range(1, layers + 1):
            entering, leaving = min(layer, self.levels), min(layer + 1, self.levels)
            drop = stochastic_depth * layer / layers
            blocks += [self.rev_blocks(entering, drop) for _ in range(inv_blk_rep)]
            blocks += [self.rev_silo(entering, leaving, drop)]
        return blocks

    def rev_blocks(self, levels: int, drop: float) -> PerLevel:
        """A RevBlock on every level; F maps the first half of the channels to the second, G back."""
        blocks = []
        for i, c in enumerate(self.channels[:levels]):
            transform = partial(
                MBConv,
                kernel_size=self.dwk[i] + self.dwkp[i],
                expand_ratio=self.expand_ratios[i],
                se_ratio=self.se_ratios[i],
                stochastic_depth=drop,
                layers=self.layers,
            )
            first, second = c - c // 2, c // 2
            blocks.append(RevBlock(transform(first, second), transform(second, first)))
        return PerLevel(blocks)

    def rev_silo(self, entering: int, leaving: int, drop: float) -> RevSilo:
        """Every pair of levels, down by a strided convolution, up by a convolution and upsampling."""
        down = {
            (i, j): self._down(i, j, 0.0 if j >= entering else drop)
            for i in range(entering)
            for j in range(i + 1, leaving)
        }
        up = {(i, j): self._up(i, j, drop) for i in range(leaving) for j in range(i)}
        return RevSilo(down, up, leaving, leaving - entering)

    def _down(self, i: int, j: int, drop: float) -> MBConv:  # [N, C_i, H, W] -> [N, C_j, H / s, W / s], s = 2^(j - i)
        stride = 2 ** (j - i)
        return MBConv(
            self.channels[i],
            self.channels[j],
            2 * stride - 1 + self.dwkp[i],
            expand_ratio=self.expand_ratios[i],
            se_ratio=self.se_ratios[i],
            stride=stride,
            stochastic_depth=drop,
            layers=self.layers,
        )

    def _up(self, i: int, j: int, drop: float) -> Upsampled:  # [N, C_i, H, W] -> [N, C_j, f H, f W], f = 2^(i - j)
        transform = MBConv(
            self.channels[i],
            self.channels[j],
            3 + self.dwkp[i],
            expand_ratio=self.expand_ratios[j],
            se_ratio=self.se_ratios[j],
            stochastic_depth=drop,
            layers=self.layers,
        )
        return Upsampled(transform, 2 ** (i - j), self.upscale_mode)

    def pyramid(
        self,
        channels: Sequence[int],
        dwk: Sequence[int],
        dwkp: Sequence[int],
        expand_ratios: Sequence[float],
        se_ratios: Sequence[float],
    ) -> Builder:
        """The same levels with the lists of neck and head."""
        lists = (channels, dwk, dwkp, expand_ratios, se_ratios)
        if any(len(given) != self.levels for given in lists):
            raise ValueError(f"head_*: expected one entry per level, {self.levels} as channels has, in every list")
        return replace(self, channels=channels, dwk=dwk, dwkp=dwkp, expand_ratios=expand_ratios, se_ratios=se_ratios)

    def without_neck(
        self,
        dwkp: Sequence[int] | None,
        expand_ratios: Sequence[float] | None,
        se_ratios: Sequence[float] | None,
    ) -> Builder:
        """As published, a head without neck takes the levels' own lists where the head's are missing or do not fit."""
        return replace(
            self,
            dwkp=_fitting(dwkp, self.dwkp),
            expand_ratios=_fitting(expand_ratios, self.expand_ratios),
            se_ratios=_fitting(se_ratios, self.se_ratios),
        )

    def neck(self, channels: Sequence[int]) -> list[MBConv]:
        """Per level, from ``channels`` of the streams to the pyramid's."""
        return [
            MBConv(
                c,
                self.channels[i],
                self.dwk[i] + self.dwkp[i],
                expand_ratio=self.expand_ratios[i],
                se_ratio=self.se_ratios[i],
                layers=self.layers,
            )
            for i, c in enumerate(channels)
        ]

    def merges(self) -> list[MBConv]:
        """From every level of the pyramid to the next lower resolution."""
        return [
            MBConv(
                self.channels[h],
                self.channels[h + 1],
                3 + self.dwkp[h + 1],
                expand_ratio=self.expand_ratios[h],
                se_ratio=self.se_ratios[h],
                stride=2,
                layers=self.layers,
            )
            for h in range(self.levels - 1)
        ]


def _fitting(given: Sequence[T] | None, own: Sequence[T]) -> Sequence[T]:
    return given if given and len(given) == len(own) else own
