"""Kill -9 a training run again and again, and compare what comes of it with a run that nobody killed.

    python benchmarks/training_kills.py              fifty kills
    python benchmarks/training_kills.py --kills 3    that it runs

Every second kill comes at a random moment after the start (while modules are imported or a checkpoint is read, too), the
others come while a checkpoint is being written. After each the checkpoint in place is read, and the run started again
with ``--resume``. Steps are saved every second time. At the end the losses and every bit of the weights are compared.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
from safetensors.torch import load_file

from benchmarks.harness import command, results
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.terminal import Column, print_table, track

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 96
NETWORK = ("channels=[48,16,16,16]", "head_channels=[16,16,16,16]", "fc_features=32", "num_ext_layers=0", "inv_blk_rep=1")
STEPS_PER_EPOCH = 24


@dataclass
class Row:
    """One kill; ``left_partial``: a checkpoint was half written."""

    kill: int
    when: str
    seconds: float  # after the start
    step_logged: int
    step_saved: int
    left_partial: bool


ROW_KEYS = ("kill", "when", "left_partial")
UNITS = {"seconds": "s", "step_logged": "step", "step_saved": "step"}


class Run:
    """The same command, with a folder for its output."""

    def __init__(self, folder: Path, data: Path, epochs: int) -> None:
        self.folder = folder
        options = ["--data", data, "--output", folder, "--epochs", epochs, "--resolution", 32, "--batch", 4, "--lr", 1e-3]
        options += ["--log-every", 1, "--save-every", 2, "--ema", 0.99, "--mixup", 0.2, "--workers", 0, "--no-progress"]
        script = ROOT / "examples" / "train_classification.py"
        words = [sys.executable, script, *options, "--resume", "--device", "cpu", "--model-kwargs", *NETWORK]
        self.command = [str(word) for word in words]

    def start(self) -> subprocess.Popen:
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        return subprocess.Popen(self.command, env=os.environ | {"PYTHONPATH": paths}, stdout=log, stderr=log)

    def finish(self) -> None:
        if self.start().wait():
            raise BenchmarkError((self.folder.parent / f"{self.folder.name}.log").read_text()[-2000:])

    @property
    def partial(self) -> Path:
        return self.folder / "last.ckpt.partial"

    def logged(self) -> int:
        from revbifpn.training.logs import read_curves

        return max((points[-1][0] for points in read_curves(self.folder / "metrics.csv").values()), default=0)

    def saved(self) -> int:
        from revbifpn.training.checkpoints import read

        path = self.folder / "last.ckpt"
        return read(path)["global_step"] if path.exists() else 0


def kill(run: Run, number: int, chance: random.Random, usual: float) -> Row | None:
    """Start, kill, and read what is left; None: it came to its end before."""
    when = "at random" if number % 2 else "while writing"
    process, began = run.start(), time.perf_counter()
    until = began + (chance.uniform(0, usual + 6) if number % 2 else chance.uniform(usual, usual + 4))
    while process.poll() is None:
        now = time.perf_counter()
        if now >= until and (number % 2 or run.partial.exists()):
            break
        time.sleep(0.0002)
    seconds = time.perf_counter() - began
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    return Row(number, when, round(seconds, 3), run.logged(), run.saved(), run.partial.exists())


def compare(one: Path, other: Path) -> dict[str, bool]:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    metrics = [[line for line in (f / "metrics.csv").read_text().splitlines() if "memory" not in line] for f in (one, other)]
    return {
        "same_metrics": metrics[0] == metrics[1],
        "same_weights": a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a),
    }


@entry
def main(argv: Sequence[str] | None = None) -> None:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, help="default: a dozen steps for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    arguments = parser.parse_args(argv)
    output = command.pick_output(arguments.output)
    epochs = arguments.epochs or max(2, arguments.kills * 12 // STEPS_PER_EPOCH)
    command.require("lightning", "revbifpn-fast[train]")
    chance, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = ROOT / "examples" / "make_patterns.py"
        subprocess.run([sys.executable, make, "classes", folder / "data", "--images", str(IMAGES)], check=True)
        whole, killed = Run(folder / "whole", folder / "data", epochs), Run(folder / "killed", folder / "data", epochs)
        begun = time.perf_counter()
        warm = Run(folder / "warm", folder / "data", 1)
        warm.finish()
        usual = time.perf_counter() - begun  # a start and a few steps
        whole.finish()
        for number in track(range(1, arguments.kills + 1), lambda n: f"kill {n}", "kills"):
            row = kill(killed, number, chance, usual * 0.7)
            if row is None:
                raise BenchmarkError(f"the run ended before kill {number}: give more --epochs")
            rows.append(row)
        killed.finish()
        same = compare(whole.folder, killed.folder)
    environment = results.environment(torch.device("cpu"))
    settings: dict[str, Any] = {"kills": arguments.kills, "epochs": epochs, "steps": epochs * STEPS_PER_EPOCH, **same}
    written = results.save(output / "training_kills_cpu", environment, settings, [asdict(r) for r in rows], ROW_KEYS, UNITS)
    columns = (Column("kill"), Column("when", number=False), Column("s"), Column("logged"), Column("saved"), Column("partial"))
    lines = [[str(r.kill), r.when, f"{r.seconds:.1f}", str(r.step_logged), str(r.step_saved), str(r.left_partial)] for r in rows]
    print_table("Kill -9", columns, [lines], f"{same}\n{results.origin(environment)}")
    print(written)
    if not all(same.values()):
        raise BenchmarkError(f"the killed run differs from the whole one: {same}")


if __name__ == "__main__":
    sys.exit(main())
