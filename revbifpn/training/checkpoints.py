"""Checkpoints that survive what kills the run that writes them.

A checkpoint is written beside its place, brought to the disk, and renamed: its place always holds a whole one. It has
the model, its average, optimizer, schedule, scaler, progress, and of every process the random generators and the
position in the data.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from revbifpn.training.errors import OptionError, SaveError, Stopped

FORMAT = 1  # raised with every change that an older reader would misunderstand
KEY = "revbifpn"  # of what this module adds to Lightning's checkpoint
LAST, BEST = "last.ckpt", "best.ckpt"


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """``write(file)`` into a file that takes its place as a whole, on the disk, or not at all.

    Raises:
        SaveError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save answers a failed write with either
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
        before = "what was there before is whole" if path.exists() else "there was none before"
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise SaveError(
            f"{path}: cannot be written: {getattr(cause, 'strerror', None) or cause}; {before}: make room or correct "
            "the permissions, and start again with --resume"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of :class:`WholeFiles`: tensors in plain containers.

    Raises:
        OptionError: it is none, or written by a newer version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise anything
        raise OptionError(
            f"{path}: no checkpoint can be read: {str(error).partition('. ')[0]}; delete it to start anew"
        ) from error
    about = content.get(KEY) if isinstance(content, dict) else None
    if about is None:
        raise OptionError(f"{path}: not a checkpoint of these scripts; for weights alone use --weights")
    if about["format"] > FORMAT:
        raise OptionError(
            f"{path}: written by a newer version (format {about['format']}, this one reads {FORMAT}): update"
        )
    return content


class WholeFiles(CheckpointIO):
    """Writes with :func:`write_whole`, reads with :func:`read`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def generators(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that a step draws from, in plain containers."""
    words: dict[str, Any] = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "bit_generator": str(words["bit_generator"]),
            "key": torch.from_numpy(words["state"]["key"].astype(np.int64)),
            "numbers": [int(words["state"]["pos"]), int(words["has_gauss"]), float(words["gauss"])],
        },
        "python": [version, list(internal), gauss],
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    words = state["numpy"]
    position, has_gauss, gauss = words["numbers"]
    key = words["key"].numpy().astype(np.uint32)
    np.random.set_state((words["bit_generator"], key, position, has_gauss, gauss))
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class Saving(Callback):
    """Saves every ``every`` steps and after every epoch, and on SIGTERM, after which it stops the run.

    Args:
        folder: of ``last.ckpt`` and ``best.ckpt``.
        about: what a run that resumes is compared with.
        every: steps; 0: after epochs only.
        agree: steps after which several processes agree on whether one of them has got SIGTERM.
        monitor: ``monitor() -> value``, higher is better, after an epoch.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, every: int, agree: int, monitor: Callable[[], float]
    ) -> None:
        self.folder, self.about, self.every, self.agree, self.monitor = folder, about, every, agree, monitor
        self.best = float("-inf")
        self.terminated = False
        self._restored: dict[str, Any] | None = None

    # What a checkpoint has ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = state["best"]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own = {
            "generators": generators(trainer.strategy.root_device),
            "loader": checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader"),
        }
        everyone = [own]
        if trainer.world_size > 1:
            everyone = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everyone, own)
        between = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # of one epoch and the next: 0 or all
        checkpoint[KEY] = {"format": FORMAT, "about": self.about, "processes": everyone, "batches": between}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        everyone = checkpoint[KEY]["processes"]
        if len(everyone) != trainer.world_size:
            raise OptionError(
                f"--resume: saved by {len(everyone)} processes, this run has {trainer.world_size}, and the position in "
                f"the data does not carry over: use {len(everyone)}, or train on from its weights with --weights"
            )
        own = everyone[trainer.global_rank]
        if own["loader"] is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = own["loader"]
        self._restored = own["generators"]

    # When --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._restored is not None:
            set_generators(self._restored, trainer.strategy.root_device)
            self._restored = None
        signal.signal(signal.SIGTERM, self._note)  # in place of Lightning's, which does not save

    def _note(self, *_: Any) -> None:
        self.terminated = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        loop = trainer.fit_loop
        if trainer.is_last_batch or loop._should_accumulate():
            return  # saved after the epoch, and between steps
        step = trainer.global_step
        if self._told_to_stop(trainer, step):
            self._stop(trainer)
        elif self.every and step % self.every == 0:
            self.save(trainer, LAST)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        value = self.monitor()
        if value > self.best:
            self.best = value
            self.save(trainer, BEST)  # first: a kill before LAST repeats the epoch, and this
        self.save(trainer, LAST)
        if self._told_to_stop(trainer, 0):
            self._stop(trainer, saved=True)

    def save(self, trainer: Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)

    def _told_to_stop(self, trainer: Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self.terminated
        return step % self.agree == 0 and trainer.strategy.reduce_boolean_decision(self.terminated, all=False)

    def _stop(self, trainer: Trainer, *, saved: bool = False) -> None:
        if not saved:
            self.save(trainer, LAST)
        raise Stopped(
            f"SIGTERM: saved {self.folder / LAST} at step {trainer.global_step}; the same command with --resume goes on"
        )


def plain(value: Any) -> Any:
    """``value`` as a checkpoint may hold it."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else str(value)


def check_same(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Compare what a checkpoint was made with to what this run is.

    Raises:
        OptionError: something differs; the message names it.
    """
    different = {k: (found.get(k), wanted[k]) for k in wanted if found.get(k) != wanted[k]}
    if different:
        listed = "; ".join(f"{k.replace('_', '-')} {a!r}, now {b!r}" for k, (a, b) in different.items())
        raise OptionError(
            f"{path}: made with {listed}. --resume goes on with the same run: give the same options and data, or start "
            "another with --weights and a new --output"
        )
