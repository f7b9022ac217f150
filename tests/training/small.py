"""Small runs of the training scripts: a narrow network, a folder of generated images, processes of their own."""

import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.harness import scripts
from revbifpn.training.logs import read_curves

NETWORK = [
    "channels=[48,16,16,16]",
    "head_channels=[16,16,16,16]",
    "fc_features=32",
    "num_ext_layers=0",
    "inv_blk_rep=1",
]
CLASSIFICATION, SEGMENTATION = "train_classification", "train_segmentation"
_ports = itertools.count(20000 + os.getpid() % 20000)


def options(data: Path, output: Path, *more: object, epochs: int = 2) -> list[object]:
    """A run of a few steps on a CPU, every one of which is logged."""
    own = ["--data", data, "--output", output, "--resolution", 32, "--batch", 4, "--epochs", epochs, "--workers", 0]
    own += ["--device", "cpu", "--log-every", 1, "--save-every", 1, "--no-progress"]
    return [*own, *more, "--model-kwargs", *NETWORK]


def run(script: str, argv: Sequence[object], folder: Path, before: Any = None) -> tuple[int, str]:
    """Exit code and what was printed."""
    log = folder / f"{next(_ports)}.log"
    life = scripts.Life(script, argv, log, before=before)
    return life.wait(), life.output()


def group(script: str, argv: Sequence[object], folder: Path, **more: Any) -> list[scripts.Life]:
    """Two processes of one group."""
    return scripts.group(script, argv, folder, port=next(_ports), **more)


def outcome(folder: Path) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses and scores by step, and the weights: two runs that did the same are equal in both."""
    curves = read_curves(folder / "metrics.csv")
    kept = {name: points for name, points in curves.items() if not name.startswith("memory/")}
    return sorted(kept.items()), load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    (curves, weights), (others, other_weights) = outcome(one), outcome(other)
    assert curves == others
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def _at_step(number: int, action: Any) -> None:
    """``action()`` at the beginning of a step of this process."""
    from revbifpn.training.task import Task

    steps = itertools.count(1)
    ordinary = Task.training_step

    def training_step(self: Task, batch: Any, index: int) -> Any:
        if next(steps) == number:
            action()
        return ordinary(self, batch, index)

    Task.training_step = training_step  # type: ignore[method-assign]


def killed_in_step_5() -> None:
    _at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminated_in_step_3() -> None:
    _at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def killed_while_writing() -> None:
    """In the fourth checkpoint, half of which is on the disk."""
    from revbifpn.training import checkpoints

    writes = itertools.count(1)
    ordinary = torch.save

    def save(content: Any, file: Any) -> None:
        if next(writes) == 4:
            file.write(b"half of a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary(content, file)

    checkpoints.torch.save = save


def full_disk() -> None:
    """No file may grow beyond what a checkpoint takes: a write fails as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def killed_in_step_3_of_rank_1() -> None:
    if os.environ["RANK"] == "1":
        _at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
