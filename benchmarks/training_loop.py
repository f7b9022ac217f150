"""What the loop of the training scripts adds to a bare step: forward, loss, backward, optimizer.

    python benchmarks/training_loop.py --steps 30

Both sides take turns in one process, on the same batch, each with its own network. Time is the processor's, not the
clock's, so that other programs on the machine do not count; images are in memory. The loop is Lightning's, with all
callbacks and logs of the scripts, a number logged at every tenth step, as is their default.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
import torch.nn.functional as F

from benchmarks.harness import command, results, rivals, scripts
from benchmarks.harness.command import entry
from benchmarks.harness.terminal import Column, print_table

rivals.import_timm()  # before anything imports torchvision

import lightning.pytorch as lightning  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

from revbifpn.training.checkpoints import Saving, WholeFiles  # noqa: E402
from revbifpn.training.logs import MetricsFile  # noqa: E402
from revbifpn.training.run import backbone, quiet  # noqa: E402
from revbifpn.training.task import Task  # noqa: E402

WARM_UP = 3


@dataclass
class Row:
    """One network; seconds are medians over steps, ``overhead`` the median of the ratios within pairs, less one."""

    arch: str
    resolution: int
    batch: int
    bare: float
    loop: float
    overhead: float


ROW_KEYS = ("arch", "resolution", "batch")
UNITS = {"bare": "s", "loop": "s", "overhead": "1"}


class Turns(lightning.Callback):
    """After each step of the loop a bare one of another network; the last of the callbacks."""

    def __init__(self, options: Any, classes: int) -> None:
        self.model = backbone(options, classes).train()
        self.optimizer = create_optimizer_v2(self.model, options.opt, lr=options.lr, weight_decay=options.weight_decay)
        self.bare: list[float] = []
        self.loop: list[float] = []
        self._ended = 0.0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._ended = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        begun = time.process_time()
        self.loop.append(begun - self._ended)
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._ended = time.process_time()
        self.bare.append(self._ended - begun)


def measure(arch: str, resolution: int, batch: int, steps: int, folder: Path) -> Row:
    script = scripts.load("train_classification")
    words = ["--data", folder, "--output", folder, "--arch", arch, "--resolution", resolution, "--batch", batch]
    options = script.options([str(word) for word in [*words, "--epochs", 1, "--device", "cpu"]])
    classes = [str(i) for i in range(10)]
    data = SimpleNamespace(classes=classes, updates=steps)
    task = Task(backbone(options, len(classes)), script.work(options, classes), options, data)
    turns = Turns(options, len(classes))
    saving = Saving(folder, {}, every=options.save_every, agree=options.log_every, monitor=lambda: 0.0)
    batches = [(torch.randn(batch, 3, resolution, resolution), torch.randint(10, (batch,)))] * steps
    quiet()
    lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        logger=[MetricsFile(folder / "metrics.csv")],
        log_every_n_steps=options.log_every,
        callbacks=[saving, turns],
        plugins=[WholeFiles()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    ).fit(task, torch.utils.data.DataLoader(batches, batch_size=None))
    bare, loop = turns.bare[WARM_UP:], turns.loop[WARM_UP:]
    ratios = [b / a for a, b in zip(bare, loop, strict=True)]
    values = [statistics.median(of) for of in (bare, loop, ratios)]
    return Row(arch, resolution, batch, round(values[0], 4), round(values[1], 4), round(values[2] - 1, 4))


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--arch", default="revbifpn_s0")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    output = command.pick_output(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(arguments.arch, arguments.resolution, arguments.batch, arguments.steps + WARM_UP, Path(folder))
    environment = results.environment(torch.device("cpu"))
    settings = {"steps": arguments.steps, "clock": "time.process_time"}
    written = results.save(output / "training_loop_cpu", environment, settings, [asdict(row)], ROW_KEYS, UNITS)
    columns = (Column("network", number=False), Column("bare step, s"), Column("in the loop, s"), Column("overhead, %"))
    line = [
        f"{row.arch}, {row.batch} x {row.resolution}",
        f"{row.bare:.3f}",
        f"{row.loop:.3f}",
        f"{100 * row.overhead:.1f}",
    ]
    print_table("The training loop", columns, [[line]], results.origin(environment))
    print(written)


if __name__ == "__main__":
    sys.exit(main())
