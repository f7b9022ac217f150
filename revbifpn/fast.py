"""The drop-in: the same network, constructor, parameters and state dict as :mod:`revbifpn.model`, on fused kernels.

    >>> from revbifpn.fast import RevBiFPN, revbifpn_s3
    >>> model = revbifpn_s3(classes=10)

Couplings run in place on kernels that upsample while they add (:mod:`revbifpn.fused`). Neck and head are recomputed
together, level by level from the highest resolution, so that the end of the forward pass keeps one small map per level.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

import revkernels
from revbifpn import model
from revbifpn.fused import FusedCoupler
from revbifpn.fused.eligible import has_hooks
from revbifpn.fused.segment import Segment
from revbifpn.model import ByArch, factory


class Stem(model.Stem):
    """:class:`revbifpn.model.Stem` by the space-to-depth kernel, plane repetition built in."""

    def forward(self, x: Tensor) -> Tensor:
        return revkernels.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return revkernels.depth_to_space(y, self.IMAGE_CHANNELS, self.block)


class RevBiFPN(model.RevBiFPN):
    __doc__ = model.RevBiFPN.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stem = Stem(self.stem.planes, self.stem.block)
        self.rev_stack.coupler = FusedCoupler()

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not (_is_plain(self.neck, model.Neck) and (self.head is None or _is_plain(self.head, model.Head))):
            return super()._forward(x)
        tape = self.open(x)
        read = partial(tape.read, stored=self.disable_recomp)
        necks = list(self.neck.children())
        if self.head is None:
            return [read(level, Segment(neck)) for level, neck in enumerate(necks)]
        merged: tuple[Tensor, ...] = ()
        for level, (neck, merge) in enumerate(zip(necks, [*self.head.pyramid_heads, None], strict=True)):
            merged = (read(level, Segment(neck, merge), *merged),)
        return self.head.classify(*merged)


def _is_plain(module: nn.Module | None, cls: type) -> bool:
    """Whether the parts of ``module`` may be called instead of it."""
    return type(module) is cls and not has_hooks([module])


class RevBiFPN_S(ByArch, RevBiFPN):  # noqa: N801 (published name)
    """A published scale of :class:`RevBiFPN`, by name; see :class:`revbifpn.model.ByArch`."""


revbifpn_s0 = factory(RevBiFPN_S, "revbifpn_s0", __name__)
revbifpn_s1 = factory(RevBiFPN_S, "revbifpn_s1", __name__)
revbifpn_s2 = factory(RevBiFPN_S, "revbifpn_s2", __name__)
revbifpn_s3 = factory(RevBiFPN_S, "revbifpn_s3", __name__)
revbifpn_s4 = factory(RevBiFPN_S, "revbifpn_s4", __name__)
revbifpn_s5 = factory(RevBiFPN_S, "revbifpn_s5", __name__)
revbifpn_s6 = factory(RevBiFPN_S, "revbifpn_s6", __name__)
