"""How a coupling is run: one branch per transform, the update of the target in place, and its adjoint.

This file does it in plain PyTorch, with upsampling inside the branches; :mod:`revbifpn.fused.coupling` on kernels that
upsample while they add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from revbifpn.engine.anomaly import check_finite
from revbifpn.engine.branch import Branch, Contribution, Gradient, ModuleBranch
from revbifpn.engine.coupling import Coupling, Part
from revbifpn.streams import Values, as_map, values
from revkernels import reference


@dataclass(frozen=True)
class Grid:
    """How an exact stream is updated: sums are rounded to multiples of ``2^-fraction_bits``."""

    fraction_bits: int
    overflow: Tensor | None = None  # counts values out of range, see :func:`revkernels.couple_`


def split(parameters: Sequence[Tensor], owners: Sequence[Branch] | Sequence[Lowered]) -> Iterator[Sequence[Tensor]]:
    """Values for the parameters of several, one after another."""
    start = 0
    for owner in owners:
        end = start + len(owner.parameters())
        yield parameters[start:end]
        start = end


@dataclass(frozen=True)
class Lowered:
    """A coupling with the branches that run it on given streams."""

    coupling: Coupling
    branches: tuple[Branch, ...]

    @property
    def target(self) -> Part:
        return self.coupling.target

    @property
    def creates(self) -> bool:
        return self.coupling.creates

    @property
    def sources(self) -> tuple[Part, ...]:
        return self.coupling.sources

    def parameters(self) -> list[Tensor]:
        return self._parameters

    @cached_property
    def _parameters(self) -> list[Tensor]:
        return [q for branch in self.branches for q in branch.parameters()]

    def split(self, parameters: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Values for :meth:`parameters`, branch by branch."""
        return split(parameters, self.branches)

    def advance_(
        self,
        y: Tensor,
        contributions: Sequence[Contribution],
        linear: Sequence[Values],
        grid: Grid | None,
        *,
        undone: bool = True,
    ) -> Tensor | None:
        """``y <- s y + sum_k contribution_k + sum_j c_j linear_j``, from the values of the linear sources.

        Args:
            undone: :meth:`retreat_` will follow.

        Returns:
            What that needs besides its other arguments: the remainders of dividing integers.
        """
        if self.coupling.scale != 1:
            y.mul_(self.coupling.scale)
        self.add_(y, [*contributions, *self._linear(linear)], subtract=False, grid=grid)
        return None

    def retreat_(
        self,
        y: Tensor,
        contributions: Sequence[Contribution],
        linear: Sequence[Values],
        grid: Grid | None,
        remainder: Tensor | None = None,
    ) -> None:
        """``y <- (y - sum_k contribution_k - sum_j c_j linear_j) / s``, with what :meth:`advance_` returned."""
        self.add_(y, [*contributions, *self._linear(linear)], subtract=True, grid=grid)
        if self.coupling.scale != 1:
            y.div_(self.coupling.scale)

    def _linear(self, inputs: Sequence[Values]) -> Iterator[Contribution]:
        for x, (_, coefficient) in zip(map(values, inputs), self.coupling.linear, strict=True):
            yield Contribution(x, x.new_full((x.shape[1],), coefficient))

    def add_(self, y: Tensor, contributions: Sequence[Contribution], *, subtract: bool, grid: Grid | None) -> None:
        """``y <- y +/- sum_k contribution_k`` in place, rounded to ``grid``."""
        for contribution in contributions:
            if contribution.p.shape != y.shape:
                raise ValueError(
                    f"transform: expected a result of its target's shape {tuple(y.shape)}, got "
                    f"{tuple(contribution.p.shape)}"
                )
        if grid is not None:
            p = [as_map(contribution.p) for contribution in contributions]
            scale = [contribution.scale for contribution in contributions]
            shift, factors = [contribution.shift for contribution in contributions], [1] * len(p)
            reference.couple_(
                as_map(y), p, scale, shift, factors, "nearest", subtract, grid.fraction_bits, grid.overflow
            )
            return
        for contribution in contributions:
            y.add_(_plain(contribution), alpha=-1 if subtract else 1)

    def adjoint(self, dy: Tensor, contributions: Sequence[Contribution]) -> list[tuple[Tensor, Tensor | None]]:
        """Per contribution of a branch, its gradient, and the sums that its ``center`` asks for or None."""
        return [(dy, None)] * len(contributions)

    def gradient(self, total: Gradient) -> Gradient:
        """Where the pullback of a branch leaves the gradient of its source, which is part of ``total``."""
        return total

    def pull_linear_(self, dy: Tensor, linear: Sequence[Gradient], pulled: Sequence[Gradient]) -> None:
        """``dy_j += c_j dy_t``, then ``dy_t <- s dy_t``.

        Args:
            dy: of the target.
            linear: of the linear sources.
            pulled: what :meth:`gradient` returned for the branches' sources.
        """
        for total, (_, coefficient) in zip(linear, self.coupling.linear, strict=True):
            total.tensor().add_(dy, alpha=coefficient)
        if self.coupling.scale != 1:
            dy.mul_(self.coupling.scale)


def _plain(contribution: Contribution) -> Tensor:
    """``scale p``: plain branches have no shift, linear sources one coefficient."""
    p, scale = contribution.p, contribution.scale
    return p if scale is None else p * scale.view(-1, *[1] * (p.dim() - 2))


class Coupler:
    """Chooses how couplings, and transforms between the streams and the pyramid, are run: here in plain PyTorch.

    Attributes:
        divides: its lowered couplings scale integers, and keep the remainders.
    """

    divides = False

    def lower(self, coupling: Coupling, inputs: Sequence[Values]) -> Lowered:
        """The branches that run the coupling's transforms on ``inputs``, the values of their sources."""
        return Lowered(coupling, tuple(map(ModuleBranch, coupling.transforms)))

    def stored(
        self, coupling: Coupling, y: Tensor | None, inputs: Sequence[Tensor], linear: Sequence[Tensor]
    ) -> Tensor:
        """The coupled target as an ordinary differentiable tensor; ``y = None`` is zero."""
        if y is not None and coupling.scale != 1:
            y = coupling.scale * y
        for x, (_, coefficient) in zip(linear, coupling.linear, strict=True):
            y = coefficient * x if y is None else torch.add(y, x, alpha=coefficient)
        return self.stored_sum(coupling, y, inputs)

    def stored_sum(self, coupling: Coupling, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        """``y + sum_k F_k(x_k)``, likewise."""
        for transform, x in zip(coupling.transforms, inputs, strict=True):
            p = transform(x)
            check_finite(transform, p)
            y = p if y is None else y + p
        assert y is not None, "a created target has terms"
        return y

    def branch(self, transform: nn.Module, *inputs: Values) -> Branch:
        """The branch that runs a transform outside couplings."""
        return ModuleBranch(transform)

    def apply(self, transform: nn.Module, *inputs: Tensor) -> Tensor:
        """``transform(*inputs)`` as an ordinary differentiable tensor."""
        return transform(*inputs)
