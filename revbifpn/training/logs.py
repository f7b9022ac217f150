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
from revbifpn.training.errors import SaveError

COLUMNS = ("step", "name", "value")
Curves = dict[str, list[tuple[int, float]]]


class MetricsFile(Logger):
    """Appends lines ``step,name,value``; the first one takes back those beyond the step that a run begins after."""

    def __init__(self, path: Path, after: int = 0) -> None:
        super().__init__()
        self.path, self.after = path, after
        self._begun = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> int:
        return 0

    def _begin(self) -> None:
        """Keep what was written before."""
        curves = read_curves(self.path)
        kept = [(at, name, value) for name, points in curves.items() for at, value in points if at <= self.after]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *sorted(kept)])
        write_whole(self.path, lambda file: file.write(text.getvalue().encode()))

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self._begun:
            self._begin()
            self._begun = True
        lines = "".join(f"{step},{name},{value!r}\n" for name, value in metrics.items())
        try:
            with self.path.open("ab") as file:
                os.write(file.fileno(), lines.encode())
        except OSError as error:
            raise SaveError(f"{self.path}: cannot be written: {error.strerror}; make room, and add --resume") from error


def read_curves(path: Path) -> Curves:
    """Points ``(step, value)`` by name; a line cut by a kill is left out, and the later of two at one step holds."""
    curves: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines(keepends=True)[1:] if path.exists() else []:
        fields = line.rstrip("\n").split(",")
        if line.endswith("\n") and len(fields) == len(COLUMNS):
            curves.setdefault(fields[1], {})[int(fields[0])] = float(fields[2])
    return {name: sorted(points.items()) for name, points in curves.items()}
