"""Couplings on kernels: upsampling and adding are one operation, in place.

``y <- y + sum_k up_{f_k}(a_k p_k + b_k)`` forward, the same with minus to invert it, and one gather of ``dy`` for its
adjoint: :func:`revkernels.couple_`, :func:`revkernels.couple_adjoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

import revkernels
from revbifpn.engine.branch import Branch, Contribution, Gradient, ModuleBranch
from revbifpn.engine.coupling import Coupling, Part, Upsampled
from revbifpn.engine.lowered import Coupler, Grid, Lowered
from revbifpn.engine.nodes import forbid_second_derivative
from revbifpn.fused.eligible import compute_dtype, has_hooks, why_not_fused
from revbifpn.fused.mbconv import FusedMBConv
from revbifpn.fused.segment import FusedSegment, Segment
from revbifpn.streams import Values, as_map

_couple_ = torch.ops.revkernels.couple_.default
_couple_adjoint = torch.ops.revkernels.couple_adjoint.default


@dataclass(frozen=True)
class FusedLowered(Lowered):
    """A coupling whose contributions :func:`revkernels.couple_` upsamples by ``factors`` while it adds them."""

    factors: tuple[int, ...]  # one per branch
    mode: str

    def add_(self, y: Tensor, contributions: Sequence[Contribution], *, subtract: bool, grid: Grid | None) -> None:
        factors = [*self.factors, *[1] * (len(contributions) - len(self.factors))]  # linear sources: as they are
        for contribution, f in zip(contributions, factors, strict=True):
            want = y.shape if f == 1 else (*y.shape[:2], *(size // f for size in y.shape[2:]))
            if contribution.p.shape != want:
                raise ValueError(
                    f"transform: expected a result of shape {tuple(want)} for a target of shape {tuple(y.shape)}, "
                    f"got {tuple(contribution.p.shape)}"
                )
        fraction_bits, overflow = (None, None) if grid is None else (grid.fraction_bits, grid.overflow)
        _couple_(
            as_map(y),
            [as_map(contribution.p) for contribution in contributions],
            [contribution.scale for contribution in contributions],
            [contribution.shift for contribution in contributions],
            factors,
            self.mode,
            subtract,
            fraction_bits,
            overflow,
        )

    def adjoint(self, dy: Tensor, contributions: Sequence[Contribution]) -> list[tuple[Tensor, Tensor | None]]:
        if set(self.factors) <= {1}:
            return super().adjoint(dy, contributions)  # pullbacks sum for themselves
        p = [None if contribution.center is None else contribution.p for contribution in contributions]
        center = [contribution.center for contribution in contributions]
        pulled = _couple_adjoint(dy, p, center, self.factors, self.mode)
        return [
            (dy if f == 1 else du, None if p_k is None else sums)
            for f, p_k, du, sums in zip(self.factors, p, *pulled, strict=True)
        ]


class FusedCoupler(Coupler):
    """Couplings by :mod:`revkernels`: Triton on CUDA, C++ on the CPU."""

    def lower(self, coupling: Coupling, inputs: Sequence[Values]) -> Lowered:
        if not coupling.terms:
            return FusedLowered(coupling, (), (), "nearest")
        transforms, factors, modes = zip(*map(taken_apart, coupling.transforms), strict=True)
        if len({mode for mode, factor in zip(modes, factors, strict=True) if factor > 1}) > 1:
            return super().lower(coupling, inputs)
        branches: tuple[Branch, ...]
        if any(map(why_not_fused, transforms, inputs)):
            branches = tuple(map(ModuleBranch, transforms))
        else:
            lean = coupling.target.level == 0  # memory peaks there
            branches = tuple(
                FusedMBConv(transform, compute_dtype(transform, x), lean=lean)
                for transform, x in zip(transforms, inputs, strict=True)
            )
        return FusedLowered(coupling, branches, factors, modes[factors.index(max(factors))])

    def stored_sum(self, coupling: Coupling, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        lowered = self.lower(coupling, inputs)
        if lowered.branches and all(isinstance(branch, FusedMBConv) for branch in lowered.branches):
            return _StoredSum.apply(lowered, y, *inputs, *lowered.parameters())
        if y is None or not isinstance(lowered, FusedLowered) or set(lowered.factors) <= {1}:
            return super().stored_sum(coupling, y, inputs)
        p = [branch.module(x) for branch, x in zip(lowered.branches, inputs, strict=True)]
        return revkernels.couple(y, p, lowered.factors, mode=lowered.mode)

    def branch(self, transform: nn.Module, *inputs: Values) -> Branch:
        if _fits(transform, inputs[0]):
            return FusedSegment(transform, compute_dtype(transform.neck, inputs[0]))
        return ModuleBranch(transform)

    def apply(self, transform: nn.Module, *inputs: Tensor) -> Tensor:
        if not _fits(transform, inputs[0]):
            return transform(*inputs)
        y, *merged = inputs
        out = _alone(transform.neck, y)
        if merged:
            out = merged[0] + out
        return out if transform.merge is None else _alone(transform.merge, out)


def taken_apart(transform: nn.Module) -> tuple[nn.Module, int, str]:
    """``(transform, factor, mode)`` of what kernels can upsample while they add; factor 1 leaves it in the branch."""
    if isinstance(transform, Upsampled) and transform.factor in revkernels.functional.FACTORS:
        if not has_hooks([transform, transform[1]]):
            return transform[0], transform.factor, transform.mode
    return transform, 1, "bilinear"


def _fits(transform: nn.Module, y: Values) -> TypeGuard[Segment]:
    """Whether ``transform`` is a segment of MBConvs that can be fused; merges read maps of y's dtype and device."""
    if not isinstance(transform, Segment):
        return False
    return not any(why_not_fused(m, y) for m in (transform.neck, transform.merge) if m is not None)


def _alone(mbconv: nn.Module, x: Tensor) -> Tensor:
    """``mbconv(x)`` as a coupling that makes a new tensor."""
    coupling = Coupling(Part(1), ((Part(0), mbconv),), creates=True)
    branch = FusedMBConv(mbconv, compute_dtype(mbconv, x))
    lowered = FusedLowered(coupling, (branch,), (1,), "nearest")
    return _StoredSum.apply(lowered, None, x, *lowered.parameters())


class _StoredSum(torch.autograd.Function):
    """``y + sum_k up(F_k(x_k))`` of fused branches as an ordinary function that keeps their raw d and p."""

    @staticmethod
    def forward(ctx: Any, lowered: FusedLowered, y: Tensor | None, *tensors: Tensor) -> Tensor:
        branches = cast(tuple[FusedMBConv, ...], lowered.branches)
        ctx.lowered = lowered
        contributions, ctx.records, ds = zip(
            *(branch.compute(x, keep_d=True) for branch, x in zip(branches, tensors, strict=False)), strict=True
        )
        z = torch.zeros_like(contributions[0].p) if y is None else y.clone()
        lowered.add_(z, contributions, subtract=False, grid=None)
        ctx.save_for_backward(*ds, *(contribution.p for contribution in contributions), *tensors)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple:
        forbid_second_derivative()
        lowered, count = ctx.lowered, len(ctx.lowered.branches)
        saved = ctx.saved_tensors
        ds, ps, xs = (saved[k * count : (k + 1) * count] for k in range(3))
        contributions, pullbacks = [], []
        calls = zip(lowered.branches, ctx.records, lowered.split(saved[3 * count :]), xs, ds, ps, strict=True)
        for branch, record, parameters, x, d, p in calls:
            contribution, pullback = branch.restore(record, parameters, x, d, p.clone())
            contributions.append(contribution)
            pullbacks.append(pullback)
        needs = ctx.needs_input_grad[2 : 2 + count]
        dxs = [Gradient(x) if need else None for x, need in zip(xs, needs, strict=True)]
        gradients: list[Tensor | None] = []
        pulled = lowered.adjoint(dz, contributions)
        for (du, sums), dx, pullback in zip(pulled, dxs, pullbacks, strict=True):
            gradients += pullback(du, sums, [dx])
        dy = dz if ctx.needs_input_grad[1] else None
        return None, dy, *(None if dx is None else dx.value for dx in dxs), *gradients
