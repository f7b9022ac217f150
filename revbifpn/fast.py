"""The drop-in: the same network, constructor, parameters and state dict as :mod:`revbifpn.model`, on fused kernels.

    >>> from revbifpn.fast import RevBiFPN, revbifpn_s3
    >>> model = revbifpn_s3(classes=10)

Upsampling and adding become one operation, in place: ``y += sum_k up_{f_k}(p_k)`` forward, the same with minus to
invert it, and one gather of ``dy`` for its adjoint (:func:`revkernels.couple_`). Neck and head are recomputed together,
level by level from the highest resolution, so that the end of the forward pass keeps one small map per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import revkernels
from torch import Tensor, nn

from revbifpn import model
from revbifpn.branch import Branch, Term
from revbifpn.model import ByArch, factory
from revbifpn.tape import Coupler, Stored, Upsampled


class FusedCoupler(Coupler):
    """Couplings by :mod:`revkernels`: Triton on CUDA, C++ on the CPU."""

    def split(self, transform: nn.Module) -> tuple[Branch, int, str]:
        if isinstance(transform, Upsampled) and transform.factor in revkernels.functional.FACTORS:
            if not any(m._forward_hooks or m._forward_pre_hooks for m in (transform, transform[1])):
                return Branch(transform[0]), transform.factor, transform.mode
        return super().split(transform)

    def update_(self, y: Tensor, terms: Sequence[Term], factors: Sequence[int], mode: str, subtract: bool) -> None:
        revkernels.couple_(
            y,
            [term.p for term in terms],
            factors,
            scale=[term.scale for term in terms],
            shift=[term.shift for term in terms],
            mode=mode,
            subtract=subtract,
        )

    def adjoint(
        self, dy: Tensor, terms: Sequence[Term], factors: Sequence[int], mode: str
    ) -> list[tuple[Tensor, Tensor | None]]:
        p = [None if term.center is None else term.p for term in terms]
        du, sums = revkernels.couple_adjoint(dy, factors, p=p, center=[term.center for term in terms], mode=mode)
        return list(zip(du, sums, strict=True))

    def sum(self, y: Tensor | None, p: Sequence[Tensor], factors: Sequence[int], mode: str) -> Tensor:
        if y is None:
            return super().sum(y, p, factors, mode)
        return revkernels.couple(y, p, factors, mode=mode)


class Stem(model.Stem):
    """:class:`revbifpn.model.Stem` by the space-to-depth kernel, plane repetition built in."""

    def forward(self, x: Tensor) -> Tensor:
        return revkernels.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return revkernels.depth_to_space(y, self.IMAGE_CHANNELS, self.block)


class _Segment(nn.Module):
    """One level of neck and head: ``o_h = neck_h(y_h) + o_{h-1}``, then ``merge_h(o_h)``, or the last convolution."""

    def __init__(self, neck: nn.Module, after: nn.Module | None) -> None:
        super().__init__()
        self.neck, self.after = neck, after

    def forward(self, y: Tensor, *merged: Tensor) -> Tensor:
        out = self.neck(y)
        if merged:
            out = out + merged[0]
        return out if self.after is None else self.after(out)


class RevBiFPN(model.RevBiFPN):
    __doc__ = model.RevBiFPN.__doc__

    def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        super().__init__(*args, **kwargs)
        self.stem = Stem(self.stem.planes, self.stem.block)
        self.rev_stack.coupler = FusedCoupler()

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        tape = self._open(x)
        if self.head is None or self.neck is None or self.disable_recomp or isinstance(tape, Stored):
            pyramid = self._pyramid(tape)
            return pyramid if self.head is None else self.head(pyramid)
        merged: tuple[Tensor, ...] = ()
        for level, (neck, merge) in enumerate(zip(self.neck.children(), [*self.head.pyramid_heads, None], strict=True)):
            merged = (tape.read(level, _Segment(neck, merge), *merged),)
        return self.head.classify(*merged)


class RevBiFPN_S(ByArch, RevBiFPN):  # noqa: N801 (published name)
    """A published scale of :class:`RevBiFPN`, by name; see :class:`revbifpn.model.ByArch`."""


revbifpn_s0 = factory(RevBiFPN_S, "revbifpn_s0", __name__)
revbifpn_s1 = factory(RevBiFPN_S, "revbifpn_s1", __name__)
revbifpn_s2 = factory(RevBiFPN_S, "revbifpn_s2", __name__)
revbifpn_s3 = factory(RevBiFPN_S, "revbifpn_s3", __name__)
revbifpn_s4 = factory(RevBiFPN_S, "revbifpn_s4", __name__)
revbifpn_s5 = factory(RevBiFPN_S, "revbifpn_s5", __name__)
revbifpn_s6 = factory(RevBiFPN_S, "revbifpn_s6", __name__)
