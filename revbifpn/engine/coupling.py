"""What a coupling is: the one operation that every reversible block is made of.

A *stream* is a tensor that a pass updates in place, a *part* a stream or one channel half of it. A coupling adds to
its target what transforms compute from other parts, and may scale the target and add sources as they are:

    forward     y_t <- s y_t + sum_k F_k(y_k) + sum_j c_j y_j,         k, j != t
    inverse     y_t <- (y_t - sum_k F_k(y_k) - sum_j c_j y_j) / s
    gradients   dy_k += J_k^T dy_t,   dy_j += c_j dy_t,   then   dy_t <- s dy_t

The sources are the same before and after, so the same sum can be formed again from what the coupling leaves behind. A
RevBlock is two couplings of the halves of a stream, a RevSilo one per level and direction, with s = 1 and no c. The
coefficients s and c are those of dual-residual networks (``x_i = B(x_{i-1}) + (alpha - 1) x_{i-1} + beta x_{i-2}``, see
:mod:`revbifpn.dual_residual`); they belong to the pass, which goes back with those that it went forward with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn


class Part(NamedTuple):
    """A stream, or one channel half of it: the first half has the odd channel."""

    level: int
    half: int | None = None

    def overlaps(self, other: Part) -> bool:
        return self.level == other.level and (self.half == other.half or None in (self.half, other.half))

    def at(self, level: int) -> Part:
        """The same part among the streams from ``level`` on."""
        return Part(self.level + level, self.half)


class Levels(list):  # of tensors or None
    """One tensor per level. The views of its channel halves are made once, as every coupling of a RevBlock asks."""

    def __init__(self, tensors: Iterable[Tensor | None] = ()) -> None:
        super().__init__(tensors)
        self._halves: dict[int, tuple[Tensor, Tensor]] = {}

    def __setitem__(self, level, x) -> None:  # type: ignore[no-untyped-def]  # of one level, or of slices
        self._halves.clear()
        super().__setitem__(level, x)

    def pop(self, level=-1):  # type: ignore[no-untyped-def]
        self._halves.clear()
        return super().pop(level)

    def part(self, part: Part) -> Tensor:
        """The values of a part, a view."""
        x: Tensor = self[part.level]
        if part.half is None:
            return x
        halves = self._halves.get(part.level)
        if halves is None:
            first = x.shape[1] - x.shape[1] // 2
            halves = x.narrow(1, 0, first), x.narrow(1, first, x.shape[1] - first)
            self._halves[part.level] = halves
        return halves[part.half]


@dataclass(frozen=True)
class Coupling:
    """``target <- scale target + sum_k transform_k(source_k) + sum_j coefficient_j source_j``.

    Args:
        target: the part that is updated.
        terms: ``(source, transform)`` each; the transform's result has the target's shape.
        creates: the target starts from zero and is a new level.
        linear: ``(source, coefficient)`` each, sources of the target's shape that are added as they are.
        scale: of the target; not zero, or there is no inverse.

    Attributes:
        sources: what the transforms read.
        transforms: they alone.

    Raises:
        ValueError: a source overlaps the target, ``scale`` is zero, or a created target has nothing to scale.
    """

    target: Part
    terms: tuple[tuple[Part, nn.Module], ...] = ()
    creates: bool = False
    linear: tuple[tuple[Part, float], ...] = ()
    scale: float = 1.0
    sources: tuple[Part, ...] = field(init=False, repr=False, compare=False)
    transforms: tuple[nn.Module, ...] = field(init=False, repr=False, compare=False)
    _moved: dict[int, Coupling] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(source for source, _ in self.terms))
        object.__setattr__(self, "transforms", tuple(transform for _, transform in self.terms))
        for argument, sources in (("terms", self.sources), ("linear", [source for source, _ in self.linear])):
            for source in sources:
                if source.overlaps(self.target):
                    raise ValueError(
                        f"{argument}: {source} overlaps the target {self.target}; what is added to x must not depend "
                        "on x itself, or there is no inverse"
                    )
        if self.scale == 0:
            raise ValueError("scale: expected a number other than 0, which has no inverse")
        if self.creates and (self.scale != 1 or not self.terms):
            raise ValueError("creates: a new level starts from zero: it has terms, and nothing to scale")

    def at(self, level: int) -> Coupling:
        """The same coupling among the streams from ``level`` on."""
        if level == 0:
            return self
        moved = self._moved.get(level)
        if moved is None:
            terms = tuple((source.at(level), transform) for source, transform in self.terms)
            linear = tuple((source.at(level), coefficient) for source, coefficient in self.linear)
            moved = replace(self, target=self.target.at(level), terms=terms, linear=linear)
            self._moved[level] = moved
        return moved


class Upsampled(nn.Sequential):
    """A transform followed by upsampling: kernels that upsample while they add take the two apart."""

    def __init__(self, transform: nn.Module, factor: int, mode: str) -> None:
        super().__init__(transform, nn.Upsample(scale_factor=factor, mode=mode))
        self.factor, self.mode = factor, mode
