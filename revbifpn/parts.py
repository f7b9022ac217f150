"""What is around the stack: the stem before it, neck and head behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from revbifpn.engine.tape import Stored, Tape
from revkernels import reference


class Stem(nn.Module):
    """Repeat the image's channels to ``planes``, then space-to-depth: invertible, no parameters.

    ``y[n, (r b + q) P + p, i, j] = x[n, p mod C, b i + r, b j + q]`` for a block b, P planes and C <= P channels.

    So no channel is lost, whatever C is, and the first ``P mod C`` are there once more than the others. An image whose
    channels are equal fills all planes with the same values for every C: for grey images a network computes the same
    with 1, 3 or C channels, and weights are taken over from one C to another as they are.
    """

    def __init__(self, planes: int, block: int, in_chans: int = 3) -> None:
        super().__init__()
        self.planes, self.block, self.in_chans = planes, block, in_chans

    def extra_repr(self) -> str:
        return f"planes={self.planes}, block={self.block}, in_chans={self.in_chans}"

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, P b^2, H / b, W / b]
        return reference.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return reference.depth_to_space(y, self.in_chans, self.block)


class Neck(nn.Module):
    """One MBConv per level, from the streams' channels to the pyramid's."""

    def __init__(self, transforms: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, transform in enumerate(transforms):
            self.add_module(f"recomp_transform_{i}", transform)

    @property
    def transforms(self) -> dict[int, nn.Module]:
        """By level; all of them, unless :meth:`RevBiFPN.prune_intermediate_layers` left some out."""
        return {int(name.rpartition("_")[2]): transform for name, transform in self.named_children()}

    def keep(self, levels: Collection[int]) -> None:
        """Leave out the other levels."""
        for level in self.transforms.keys() - set(levels):
            delattr(self, f"recomp_transform_{level}")

    def forward(self, streams: Sequence[Tensor] | Tape | Stored, levels: Sequence[int] | None = None) -> list[Tensor]:
        """The pyramid, or its maps at ``levels``; a level read from its tape is recomputed in backward."""
        transforms = self.transforms
        levels = list(transforms) if levels is None else levels
        if isinstance(streams, (Tape, Stored)):
            maps = {level: streams.read(level, transforms[level]) for level in sorted(levels)}
        else:
            maps = {level: transforms[level](streams[level]) for level in sorted(levels)}
        return [maps[level] for level in levels]


class GlobalPool(nn.Module):
    """``[N, C, H, W] -> [N, C]``: the mean (``"avg"``), or the map as it is (``""``)."""

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        if pool_type not in ("avg", ""):
            raise ValueError(
                f"global_pool: expected 'avg', or '' for none, got {pool_type!r}; models of revbifpn.adapters.timm "
                "take timm's others"
            )
        self.pool_type = pool_type

    def feat_mult(self) -> int:
        """Features per channel, as timm calls them."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.pool_type else x


class Head(nn.Module):
    """Merge the pyramid from high to low resolution, then classify.

    ``o_0 = n_0``, ``o_{h+1} = n_{h+1} + merge_h(o_h)``; 1x1 convolution, global mean, dropout, linear.
    """

    def __init__(
        self, merges: Sequence[nn.Module], final_conv: nn.Module | None, features: int, dropout: float, classes: int
    ) -> None:
        super().__init__()
        self.num_features = features
        self.pyramid_heads = nn.ModuleList(merges)
        self.final_conv = final_conv
        self.global_pool = GlobalPool()
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.fc: nn.Module = nn.Linear(features, classes)

    @property
    def hidden_size(self) -> int:
        """Width before the classifier."""
        return self.num_features * self.global_pool.feat_mult()

    def reset(self, classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new classifier, none for 0 classes; and another pooling, if given."""
        pool = self.global_pool if global_pool is None else global_pool
        if classes and not pool.pool_type:
            raise ValueError(f"global_pool: expected a pooling before a classifier of {classes} classes, got ''")
        like = next(self.parameters(), torch.empty(0))
        self.global_pool = pool.train(self.training)
        fc = nn.Linear(self.hidden_size, classes, device=like.device, dtype=like.dtype) if classes else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        return self.classify(self.features(self.merge(pyramid)))

    def merge(self, pyramid: Sequence[Tensor]) -> Tensor:
        out = pyramid[0]
        for merge, n in zip(self.pyramid_heads, pyramid[1:], strict=True):
            out = n + merge(out)
        return out

    def features(self, out: Tensor) -> Tensor:  # [N, C, H / 32, W / 32] -> [N, features, H / 32, W / 32]
        return out if self.final_conv is None else self.final_conv(out)

    def classify(self, features: Tensor, pre_logits: bool = False) -> Tensor:  # -> [N, classes]
        out = self.global_pool(features)
        out = out if self.dropout is None else self.dropout(out)
        return out if pre_logits else self.fc(out)
