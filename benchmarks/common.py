"""What the benchmarks share: one-line errors, the record of machine and versions, tables, progress, result files."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UsageError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line and go through :class:`UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code: 0, or 2 after a :class:`UsageError` shown as one line on stderr."""
    try:
        main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def require(module: str, extra: str = "bench") -> ModuleType:
    """Import an optional dependency, or say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UsageError(f"{module} is not installed: pip install '.[{extra}]' (or pip install {module})") from None


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; ``cuda`` without one is a :class:`UsageError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda} but sees no GPU" if torch.version.cuda else "is a CPU build"
        raise UsageError(f"--device cuda: torch {torch.__version__} {built}; use --device cpu")
    return torch.device(name)


def pick_output(path: str) -> Path:
    """A directory that can be written to, made if need be."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output {path}: cannot write there ({error.strerror})") from None
    return directory


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions, machine, threads and loaded kernels: what a number needs to be read later."""
    from revkernels import dispatch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": [name for name, status in dispatch.STATUS.items() if status.loaded],
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, environment: dict[str, Any], settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """``{"environment", "settings", "rows"}``; everything printed or plotted can be made again from it."""
    path.write_text(json.dumps({"environment": environment, "settings": settings, "rows": rows}, indent=1) + "\n")


def write_long_csv(
    path: Path, environment: dict[str, Any], rows: list[dict[str, Any]], keys: Sequence[str], units: dict[str, str]
) -> None:
    """One line per number: ``keys`` of its row, metric, value, unit, environment. ``units`` lists the metrics."""
    record = {name: "+".join(value) if isinstance(value, list) else value for name, value in environment.items()}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "metric", "value", "unit", *record])
        for row in rows:
            for metric, unit in units.items():
                if row.get(metric) is not None:
                    writer.writerow([*(row[key] for key in keys), metric, row[metric], unit, *record.values()])


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and whether its cells are numbers (to the right) or words."""

    header: str
    number: bool = True


def print_table(title: str, columns: Sequence[Column], groups: Iterable[Sequence[Sequence[str]]], caption: str) -> None:
    """A table with a rule between groups of rows: by rich on a terminal, plain text elsewhere."""
    groups = [group for group in groups if group]
    if sys.stdout.isatty() and _has_rich():
        _print_rich(title, columns, groups, caption)
    else:
        _print_plain(title, columns, groups, caption)


def _print_rich(title: str, columns: Sequence[Column], groups: list, caption: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column.header, justify="right" if column.number else "left", no_wrap=not column.number)
    for group in groups:
        for i, cells in enumerate(group):
            table.add_row(*cells, end_section=i == len(group) - 1)
    Console().print(table)


def _print_plain(title: str, columns: Sequence[Column], groups: list, caption: str) -> None:
    header = [column.header for column in columns]
    cells = [header, *(row for group in groups for row in group)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, columns, strict=True)
        return "  ".join(f"{cell:>{width}}" if c.number else f"{cell:<{width}}" for cell, width, c in pairs).rstrip()

    rule = "  ".join("-" * width for width in widths)
    print(title, line(header), sep="\n")
    for group in groups:
        print(rule, *map(line, group), sep="\n")
    print(rule, caption, "", sep="\n")


def track(items: Iterable[Any], label: Callable[[Any], str], title: str, total: int | None = None) -> Iterator[Any]:
    """Iterate with a progress bar on a terminal's stderr; elsewhere one line per item. ``total``: their number."""
    total = len(items) if total is None else total
    if sys.stderr.isatty() and _has_rich():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=total)
            for item in items:
                progress.update(task, description=f"{title}: {label(item)}")
                yield item
                progress.advance(task)
    else:
        for i, item in enumerate(items, 1):
            print(f"{title} [{i}/{total}] {label(item)}", file=sys.stderr, flush=True)
            yield item


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], jobs: int) -> Iterator[tuple[Any, Any]]:
    """``(item, function(item))`` in the order in which ``jobs`` processes, of one thread each, are done."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None
