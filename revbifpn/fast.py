"""The drop-in: the same network, constructor, parameters and state dict as :mod:`revbifpn.model`, on fused kernels.

    >>> from revbifpn.fast import RevBiFPN, revbifpn_s3
    >>> model = revbifpn_s3(classes=10)

Upsampling and adding become one operation, in place: ``y += sum_k up_{f_k}(p_k)`` forward, the same with minus to
invert it, and one gather of ``dy`` for its adjoint (:func:`revkernels.couple_`). Neck and head are recomputed together,
level by level from the highest resolution, so that the end of the forward pass keeps one small map per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import revkernels
from revbifpn import model
from revbifpn.branch import Branch, Gradient, Term
from revbifpn.fused import FusedMBConv, compute_dtype, has_hooks, why_not_fused
from revbifpn.model import ByArch, factory
from revbifpn.segment import FusedSegment, Segment
from revbifpn.tape import Coupler, Coupling, Lowered, Part, Upsampled, forbid_double_backward


def _taken_apart(transform: nn.Module) -> tuple[nn.Module, int, str]:
    """``(transform, factor, mode)`` of what kernels can upsample while they add; factor 1 leaves it in the branch."""
    if isinstance(transform, Upsampled) and transform.factor in revkernels.functional.FACTORS:
        if not has_hooks([transform, transform[1]]):
            return transform[0], transform.factor, transform.mode
    return transform, 1, "bilinear"


def _fits(transform: nn.Module, y: Tensor) -> bool:
    """Whether ``transform`` is a segment of MBConvs that can be fused; merges read maps of y's dtype and device."""
    if not isinstance(transform, Segment):
        return False
    return not any(why_not_fused(m, y) for m in (transform.neck, transform.merge) if m is not None)


class FusedCoupler(Coupler):
    """Couplings by :mod:`revkernels`: Triton on CUDA, C++ on the CPU."""

    def lower(self, coupling: Coupling, inputs: Sequence[Tensor]) -> Lowered:
        sources, transforms = zip(*coupling.terms, strict=True)
        transforms, factors, modes = zip(*map(_taken_apart, transforms), strict=True)
        if len({mode for mode, factor in zip(modes, factors, strict=True) if factor > 1}) > 1:
            return super().lower(coupling, inputs)
        fits = not any(map(why_not_fused, transforms, inputs))
        if fits:
            lean = coupling.target.level == 0  # memory peaks there
            branches = tuple(
                FusedMBConv(transform, compute_dtype(x), lean=lean)
                for transform, x in zip(transforms, inputs, strict=True)
            )
        else:
            branches = tuple(map(Branch, transforms))
        return Lowered(
            coupling.target, coupling.creates, sources, branches, factors, modes[factors.index(max(factors))]
        )

    def update_(
        self,
        lowered: Lowered,
        y: Tensor,
        terms: Sequence[Term],
        *,
        subtract: bool,
        fraction_bits: int | None = None,
        overflow: Tensor | None = None,
    ) -> None:
        n, c, h, w = y.shape
        for term, f in zip(terms, lowered.factors, strict=True):
            if term.p.shape != (n, c, h // f, w // f):
                raise ValueError(
                    f"transform: expected a result of shape {(n, c, h // f, w // f)} for a target of shape "
                    f"{tuple(y.shape)}, got {tuple(term.p.shape)}"
                )
        torch.ops.revkernels.couple_(
            y,
            [term.p for term in terms],
            [term.scale for term in terms],
            [term.shift for term in terms],
            lowered.factors,
            lowered.mode,
            subtract,
            fraction_bits,
            overflow,
        )

    def adjoint(self, lowered: Lowered, dy: Tensor, terms: Sequence[Term]) -> list[tuple[Tensor, Tensor | None]]:
        p = [None if term.center is None else term.p for term in terms]
        center = [term.center for term in terms]
        du, sums = revkernels.couple_adjoint(dy, lowered.factors, p=p, center=center, mode=lowered.mode)
        return list(zip(du, sums, strict=True))

    def branch(self, transform: nn.Module, *inputs: Tensor) -> Branch | FusedSegment:
        return FusedSegment(transform, compute_dtype(inputs[0])) if _fits(transform, inputs[0]) else Branch(transform)

    def apply(self, transform: nn.Module, *inputs: Tensor) -> Tensor:
        if not _fits(transform, inputs[0]):
            return transform(*inputs)
        y, *merged = inputs
        out = self._alone(transform.neck, y)
        if merged:
            out = merged[0] + out
        return out if transform.merge is None else self._alone(transform.merge, out)

    def _alone(self, mbconv: nn.Module, x: Tensor) -> Tensor:
        """``mbconv(x)`` as a coupling that makes a new tensor."""
        lowered = Lowered(Part(0), True, (Part(0),), (FusedMBConv(mbconv, compute_dtype(x)),), (1,))
        return self.stored(lowered, None, [x])

    def stored(self, lowered: Lowered, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        if all(isinstance(branch, FusedMBConv) for branch in lowered.branches):
            return _StoredCoupling.apply(self, lowered, y, *inputs, *lowered.parameters())
        if y is None:
            return super().stored(lowered, y, inputs)
        p = [branch.module(x) for branch, x in zip(lowered.branches, inputs, strict=True)]
        return revkernels.couple(y, p, lowered.factors, mode=lowered.mode)


class _StoredCoupling(torch.autograd.Function):
    """``y + sum_k up(F_k(x_k))`` of fused branches as an ordinary function that keeps their raw d and p."""

    @staticmethod
    def forward(ctx: Any, coupler: FusedCoupler, lowered: Lowered, y: Tensor | None, *tensors: Tensor) -> Tensor:
        inputs = tensors[: len(lowered.branches)]
        ctx.coupler, ctx.lowered = coupler, lowered
        terms, ctx.records, ds = zip(*map(FusedMBConv.compute, lowered.branches, inputs), strict=True)
        z = torch.zeros_like(terms[0].p) if y is None else y.clone()
        coupler.update_(lowered, z, terms, subtract=False)
        ctx.save_for_backward(*ds, *(term.p for term in terms), *tensors)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple:
        forbid_double_backward()
        lowered, count = ctx.lowered, len(ctx.lowered.branches)
        saved = list(ctx.saved_tensors)
        ds, ps, xs, parameters = (
            saved[:count],
            saved[count : 2 * count],
            saved[2 * count : 3 * count],
            saved[3 * count :],
        )
        terms, pullbacks = [], []
        for branch, record, x, d, p in zip(lowered.branches, ctx.records, xs, ds, ps, strict=True):
            own, parameters = parameters[: len(branch.parameters())], parameters[len(branch.parameters()) :]
            term, pullback = branch.restore(record, own, x, d, p.clone())
            terms.append(term)
            pullbacks.append(pullback)
        needs = ctx.needs_input_grad[3 : 3 + count]
        dxs = [Gradient(x) if need else None for x, need in zip(xs, needs, strict=True)]
        gradients = []
        pulled = ctx.coupler.adjoint(lowered, dz, terms)
        for (du, sums), dx, pullback in zip(pulled, dxs, pullbacks, strict=True):
            gradients += pullback(du, sums, [dx])
        dy = dz if ctx.needs_input_grad[2] else None
        return None, None, dy, *(None if dx is None else dx.value for dx in dxs), *gradients


class Stem(model.Stem):
    """:class:`revbifpn.model.Stem` by the space-to-depth kernel, plane repetition built in."""

    def forward(self, x: Tensor) -> Tensor:
        return revkernels.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return revkernels.depth_to_space(y, self.IMAGE_CHANNELS, self.block)


class RevBiFPN(model.RevBiFPN):
    __doc__ = model.RevBiFPN.__doc__

    def __init__(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        super().__init__(*args, **kwargs)
        self.stem = Stem(self.stem.planes, self.stem.block)
        self.rev_stack.coupler = FusedCoupler()

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if not (_is_plain(self.neck, model.Neck) and (self.head is None or _is_plain(self.head, model.Head))):
            return super()._forward(x)
        tape = self._open(x)
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
