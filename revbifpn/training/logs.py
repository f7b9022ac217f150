"""``metrics.csv``: one line per number, on the disk before the next step, and without gaps over restarts."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from revbifpn.training.checkpoints import write_whole

COLUMNS = ("step", "name", "value")
Curves = dict[str, list[tuple[int, float]]]


class MetricsFile(Logger):
    """Appends lines ``step,name,value``; a run that resumes at a step takes back what lies beyond it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def begin(self, step: int) -> None:
        """Keep what was written up to a step."""
        kept = [(at, name, value) for name, points in read_curves(self.path).items() for at, value in points if at <= step]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *sorted(kept)])
        write_whole(self.path, lambda file: file.write(text.getvalue().encode()))

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        lines = "".join(f"{step},{name},{value!r}\n" for name, value in metrics.items())
        with self.path.open("ab") as file:
            os.write(file.fileno(), lines.encode())


def read_curves(path: Path) -> Curves:
    """Points ``(step, value)`` by name; a line that a kill has cut is left out, and the later of two at one step holds."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines(keepends=True)[1:] if path.exists() else []:
        fields = line.rstrip("\n").split(",")
        if line.endswith("\n") and len(fields) == len(COLUMNS):
            curves.setdefault(fields[1], {})[int(fields[0])] = float(fields[2])
    return {name: sorted(points.items()) for name, points in curves.items()}
