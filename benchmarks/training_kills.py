"""Kill -9 training runs again and again, and compare what comes of them with a run that nobody killed.

    python benchmarks/training_kills.py              fifty kills
    python benchmarks/training_kills.py --kills 3    that it runs
    python benchmarks/training_kills.py --kills 9 --seed 1 --add    nine more, beside those that are there

Every second kill comes at a random moment after the start (while a checkpoint is read, too), the others while a
checkpoint is being written. After each the checkpoint in place is read, and the run started again with ``--resume``.
Every second step is saved. When a run comes to its end, losses and every bit of the weights are compared, and another
one begins.
"""

from __future__ import annotations

import json
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

from benchmarks.harness import command, results, rivals
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.scripts import Life
from benchmarks.harness.terminal import Column, print_table

rivals.import_timm()  # before anything imports torchvision

from revbifpn.training.checkpoints import read  # noqa: E402
from revbifpn.training.logs import read_curves  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 96
NETWORK = (
    "channels=[48,16,16,16]",
    "head_channels=[16,16,16,16]",
    "fc_features=32",
    "num_ext_layers=0",
    "inv_blk_rep=1",
)
STEPS_PER_EPOCH = 24


@dataclass
class Row:
    """One kill; ``left_partial``: a half written checkpoint lies there, of this kill or one before."""

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
        options = [
            "--data",
            data,
            "--output",
            folder,
            "--epochs",
            epochs,
            "--resolution",
            32,
            "--batch",
            4,
            "--lr",
            1e-3,
        ]
        options += ["--log-every", 1, "--save-every", 2, "--ema", 0.99, "--mixup", 0.2, "--workers", 0, "--no-progress"]
        self.options = [*options, "--resume", "--device", "cpu", "--model-kwargs", *NETWORK]

    def start(self) -> Life:
        return Life("train_classification", self.options, self.folder.with_suffix(".log"))

    def finish(self) -> None:
        life = self.start()
        if life.wait(3600):
            raise BenchmarkError(life.output()[-2000:])

    @property
    def partial(self) -> Path:
        return self.folder / "last.ckpt.partial"

    def logged(self) -> int:
        return max((points[-1][0] for points in read_curves(self.folder / "metrics.csv").values()), default=0)

    def saved(self) -> int:
        path = self.folder / "last.ckpt"
        return read(path)["global_step"] if path.exists() else 0


def kill(run: Run, number: int, chance: random.Random, usual: float) -> Row | None:
    """Start, kill, and read what is left; None: it came to its end before.

    Args:
        run: goes on.
        number: odd: at a random moment; even: while a checkpoint is being written.
        chance: draws the moment.
        usual: seconds of a start and a few steps.
    """
    life = run.start()
    at_random = number % 2 == 1
    wait = chance.uniform(0, 2 * usual) if at_random else chance.uniform(0, usual)
    first = None if at_random else run.saved()
    while life.running:
        waited = time.perf_counter() - life.began
        if at_random and waited >= wait:
            break
        if not at_random and waited >= wait and run.partial.exists() and run.logged() > first:
            break
        time.sleep(0.0005)
    seconds = time.perf_counter() - life.began
    if life.running:
        life.signal()
    if life.wait() != -signal.SIGKILL:
        return None
    when = "at random" if at_random else "while writing"
    return Row(number, when, round(seconds, 3), run.logged(), run.saved(), run.partial.exists())


def compare(one: Path, other: Path) -> dict[str, bool]:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    metrics = [
        [line for line in (f / "metrics.csv").read_text().splitlines() if "memory" not in line] for f in (one, other)
    ]
    return {
        "same_metrics": metrics[0] == metrics[1],
        "same_weights": a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a),
    }


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3, help="of each run (default 3)")
    parser.add_argument("--minutes", type=float, default=60, help="begin no further kill after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="keep the kills that the results have")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    output = command.pick_output(arguments.output)
    chance, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = ROOT / "examples" / "make_patterns.py"
        subprocess.run([sys.executable, make, "classes", folder / "data", "--images", str(IMAGES)], check=True)
        whole = Run(folder / "whole", folder / "data", arguments.epochs)
        whole.finish()  # the modules are imported now
        begun = time.perf_counter()
        Run(folder / "once", folder / "data", 1).finish()
        usual = (time.perf_counter() - begun) / 2
        killed, runs, same = Run(folder / "killed0", folder / "data", arguments.epochs), 1, []
        until = time.perf_counter() + 60 * arguments.minutes
        while len(rows) < arguments.kills and time.perf_counter() < until:
            row = kill(killed, len(rows) + 1, chance, usual)
            if row is not None:
                rows.append(row)
                print(f"kill {row.kill} {row.when}, {row.step_logged} steps", file=sys.stderr, flush=True)
                continue
            same.append(compare(whole.folder, killed.folder))  # it came to its end: another one
            killed, runs = Run(folder / f"killed{runs}", folder / "data", arguments.epochs), runs + 1
        killed.finish()
        same.append(compare(whole.folder, killed.folder))
    all_same = {name: all(one[name] for one in same) for name in same[0]}
    environment = results.environment(torch.device("cpu"))
    steps = arguments.epochs * STEPS_PER_EPOCH
    part = {"date": environment["date"], "commit": environment["commit"], "seed": arguments.seed}
    part |= {"kills": len(rows), "runs": runs, "steps_of_each": steps, **all_same}
    stem = output / "training_kills_cpu"
    before: dict[str, Any] = {"settings": {"parts": []}, "rows": []}
    if arguments.add:
        before = json.loads(stem.with_suffix(".json").read_text())
    parts, first = [*before["settings"]["parts"], part], len(before["rows"])
    every = before["rows"] + [asdict(row) | {"kill": first + row.kill} for row in rows]
    settings: dict[str, Any] = {"kills": len(every), "parts": parts}
    written = results.save(stem, environment, settings, every, ROW_KEYS, UNITS)
    columns = (
        Column("kill"),
        Column("when", number=False),
        Column("s"),
        Column("logged"),
        Column("saved"),
        Column("partial"),
    )
    lines = [
        [str(r.kill), r.when, f"{r.seconds:.1f}", str(r.step_logged), str(r.step_saved), str(r.left_partial)]
        for r in rows
    ]
    print_table("Kill -9", columns, [lines], f"{runs} runs of {steps} steps: {all_same}\n{results.origin(environment)}")
    print(written)
    if not all(all_same.values()):
        raise BenchmarkError(f"a killed run differs from the whole one: {all_same}")


if __name__ == "__main__":
    sys.exit(main())
