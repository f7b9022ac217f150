"""Where numbers go: what they need to be read later, and files that appear together or not at all."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.command import BenchmarkError, uninterrupted

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
UNWRITTEN = (".", ":(exclude)benchmarks/results", ":(exclude)revbifpn/fits.json")  # what benchmarks do not write

Environment = dict[str, Any]


def environment(device: torch.device) -> Environment:
    """Date, commit, versions, machine, threads and loaded kernels: what a number needs to be read later."""
    import torch

    from revkernels import dispatch

    return {
        "date": now(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": [name for name, status in dispatch.STATUS.items() if status.loaded],
    }


def origin(record: Environment) -> str:
    """The line under a table that says where and when its numbers were made."""
    return (
        f"{record['device']}, {record['threads']} threads, torch {record['torch']}, "
        f"kernels {'+'.join(record['kernels'])}, commit {record['commit']}, {record['date']}"
    )


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _commit() -> str:
    """The commit, and whether code has changed since; results have, where a run goes on with what it wrote."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *UNWRITTEN) else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write files into; when all of them are on the disk, they take their places in ``folder``.

    Whatever goes wrong before that (a full disk, Ctrl-C, a fault) leaves the files that were there as they were.

    Raises:
        BenchmarkError: they cannot be written.
    """
    new: Path | None = None
    try:
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))  # beside them, so that a rename is all it takes
        yield new
        files = [path for path in new.iterdir() if path.is_file()]
        for path in files:
            _to_disk(path)
        with uninterrupted():
            for path in files:
                os.replace(path, folder / path.name)
        _to_disk(folder)
    except OSError as error:
        reason = error.strerror or error
        raise BenchmarkError(f"{folder}: cannot be written to ({reason}); earlier results are kept") from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """One file, replaced as a whole."""
    with replacing(path.parent) as new:
        (new / path.name).write_text(text)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, record: Environment, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """``{"environment", "settings", "rows"}``; everything printed or plotted can be made again from it."""
    path.write_text(to_json({"environment": record, "settings": settings, "rows": rows}))


def earlier_rows(stem: Path, record: Environment, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of results that were made with this commit, machine and torch, and with these settings; or none."""
    path = _with(stem, ".json")
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    same = [name for name in record if name != "date"]
    if earlier["settings"] != settings or any(earlier["environment"].get(name) != record[name] for name in same):
        return []
    return earlier["rows"]


def write_csv(path: Path, rows: Iterable[Sequence[Any]], lineterminator: str = "\r\n") -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator=lineterminator).writerows(rows)


def write_long_csv(
    path: Path, record: Environment, rows: Sequence[dict[str, Any]], keys: Sequence[str], units: dict[str, str]
) -> None:
    """One line per number: ``keys`` of its row, metric, value, unit, environment. ``units`` lists the metrics."""
    about = {name: "+".join(value) if isinstance(value, list) else value for name, value in record.items()}
    lines = [[*keys, "metric", "value", "unit", *about]]
    for row in rows:
        for metric, unit in units.items():
            if row.get(metric) is not None:
                lines.append([*(row[key] for key in keys), metric, row[metric], unit, *about.values()])
    write_csv(path, lines)


def save(
    stem: Path,
    record: Environment,
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    keys: Sequence[str],
    units: dict[str, str],
    plot: Callable[[Path], None] | None = None,
) -> str:
    """``stem``.json, .csv and, by ``plot``, .png; returns the line that says so."""
    with replacing(stem.parent) as new:
        new = new / stem.name
        write_json(_with(new, ".json"), record, settings, rows)
        write_long_csv(_with(new, ".csv"), record, rows, keys, units)
        if plot is not None:
            plot(_with(new, ".png"))
    return f"written: {stem}.json, .csv" + (", .png" if plot is not None else "")


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)
