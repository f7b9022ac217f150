"""Lightning: alpha and beta of a converted model follow the trainer's steps.

>>> from revbifpn.adapters.lightning import DualResidualSchedule
>>> convert(module.model, exact=True)
>>> Trainer(callbacks=[DualResidualSchedule()]).fit(module)
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    raise ImportError(f"revbifpn.adapters.lightning needs lightning ({error}): pip install 'lightning'") from error

from revbifpn.dual_residual.schedule import Schedule, default_steps


class DualResidualSchedule(Callback):
    """A :class:`revbifpn.dual_residual.Schedule` whose steps are those of the trainer's optimizers.

    It follows ``trainer.global_step``, so that accumulated batches are one step, and a resumed run goes on.

    Args:
        steps: until the end of the schedule; by default half of the trainer's.
        start, end: as of the schedule.

    Raises:
        ValueError: when training starts: the module has no stack, or the coefficients do not suit it; the trainer has
            no last step and ``steps`` is None.
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = default_steps(trainer.estimated_stepping_batches) if self.steps is None else self.steps
        self.schedule = Schedule(pl_module, steps, start=self.start, end=self.end)
        self.schedule.step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.schedule is not None, "training has started"
        self.schedule.step(trainer.global_step)
