"""alpha and beta over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from revbifpn.dual_residual.convert import runs_of
from revbifpn.dual_residual.precision import precise_beta
from revbifpn.dual_residual.sequence import check_coefficients

PREDICTED_ERRORS = (1e-2, 1e-4)  # at the start and the end of a schedule of float streams
EXACT_BETAS = (2.0**-7, 2.0**-3)  # of exact ones


def default_steps(training_steps: float) -> int:
    """How long a schedule takes in a training of that many steps: half of it.

    Raises:
        ValueError: the training has no last step.
    """
    if not 0 < training_steps < math.inf:
        raise ValueError(f"steps: expected a number, as the training has no last step, got None and {training_steps}")
    return max(1, round(training_steps / 2))


class Schedule:
    """Moves alpha and beta from the pretrained network to where floats invert, like a learning-rate scheduler.

    Over ``steps`` calls of :meth:`step`, float streams go from ``start`` to ``end`` in a straight line,
    ``alpha = 1 - s (1 - alpha_end)``. Exact streams invert anywhere: ``beta`` goes through powers of two, from that of
    ``start`` to that of ``end``, in equal shares of the steps, with ``alpha = 1 - beta``, so that memory falls by a bit
    an element and block each time.

    Args:
        model: converted, or with a :class:`DualResidualSequence` in it; or several (a model and its average).
        steps: calls of :meth:`step` until ``end`` is reached; it stays there.
        start, end: ``(alpha, beta)``. By default, for exact streams, k = 7 and k = 3, ``(127/128, 1/128)`` and
            ``(7/8, 1/8)``; for float streams ``(1 - beta, beta)`` with the smallest beta at which the deepest stack's
            :func:`predicted_error` in float32 is at most 1e-2, and at most 1e-4: at depth 6 beta = 0.10 and 0.26, at
            depth 12 0.36 and 0.54, at depth 24 0.61 and 0.75.

    Raises:
        ValueError: no stack in the model; float and exact stacks in one; steps below 1; coefficients without
            an inverse.

    Example:
        >>> schedule = Schedule(model, steps=500)
        >>> for batch in loader:
        ...     loss(model(batch)).backward(); optimizer.step(); schedule.step()
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        steps: int,
        *,
        start: tuple[float, float] | None = None,
        end: tuple[float, float] | None = None,
    ) -> None:
        models = [model] if isinstance(model, nn.Module) else list(model)
        self._stacks = [stack for one in models for stack in runs_of(one)]
        if not self._stacks:
            raise ValueError("model: expected a converted model or one with a DualResidualSequence in it, got neither")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        kinds = {stack._format.exact for stack in self._stacks}
        if len(kinds) > 1:
            raise ValueError("model: expected stacks of one kind, got float and exact ones; take a Schedule for each")
        (self.exact,) = kinds
        deepest = max(len(stack.labels) for stack in self._stacks)
        first, last = EXACT_BETAS if self.exact else (precise_beta(deepest, error) for error in PREDICTED_ERRORS)
        self.start, self.end = start or (1 - first, first), end or (1 - last, last)
        self.steps, self.count = steps, 0
        for point in (self.start, self.end):
            for stack in self._stacks:
                check_coefficients(*point, stack._format)
        self._set()

    def coefficients(self, count: int) -> tuple[float, float]:
        """``(alpha, beta)`` after ``count`` steps."""
        share = min(count / self.steps, 1.0)
        if share == 1:
            return self.end
        if share == 0:
            return self.start
        if not self.exact:
            alpha, beta = (a + share * (b - a) for a, b in zip(self.start, self.end, strict=True))
            return alpha, beta
        first, last = (round(-math.log2(beta)) for _, beta in (self.start, self.end))
        k = first + math.trunc(share * (abs(last - first) + 1)) * (1 if last > first else -1)
        beta = 2.0**-k
        return self.end if k == last else self.start if k == first else (1 - beta, beta)

    def step(self, count: int | None = None) -> None:
        """One training step is done; or ``count`` are, from the first one, where a trainer counts them."""
        self.count = self.count + 1 if count is None else count
        self._set()

    def _set(self) -> None:
        alpha, beta = self.coefficients(self.count)
        for stack in self._stacks:
            stack.set(alpha, beta)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: numbers alone."""
        return {"count": self.count, "steps": self.steps, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule was; sets the coefficients."""
        self.count, self.steps = int(state["count"]), int(state["steps"])
        self.start, self.end = tuple(state["start"]), tuple(state["end"])
        self._set()
