"""Transformers: alpha and beta of a converted model follow the steps of its Trainer.

>>> from revbifpn.adapters.transformers import DualResidualSchedule
>>> convert(model, exact=True)
>>> Trainer(model, arguments, train_dataset=texts, callbacks=[DualResidualSchedule()]).train()
"""

from __future__ import annotations

from typing import Any

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.adapters.transformers needs transformers ({error}): pip install 'transformers[torch]'"
    ) from error

from revbifpn.dual_residual.schedule import Schedule, default_steps


class DualResidualSchedule(TrainerCallback):
    """A :class:`revbifpn.dual_residual.Schedule` whose steps are those of the trainer's optimizer.

    It follows ``state.global_step``, so that accumulated batches are one step, and a resumed run goes on where it was.

    Args:
        steps: until the end of the schedule; by default half of the trainer's.
        start, end: as of the schedule.

    Raises:
        ValueError: when training starts: the model has no stack, or the coefficients do not suit it.
    """

    def __init__(
        self,
        steps: int | None = None,
        *,
        start: tuple[float, float] | None = None,
        end: tuple[float, float] | None = None,
    ) -> None:
        self.steps, self.start, self.end = steps, start, end
        self.schedule: Schedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        steps = default_steps(state.max_steps) if self.steps is None else self.steps
        self.schedule = Schedule(model, steps, start=self.start, end=self.end)
        self.schedule.step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.schedule is not None, "training has begun"
        self.schedule.step(state.global_step)
