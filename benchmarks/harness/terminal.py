"""Tables and progress: by rich on a terminal, plain text elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, and whether its cells are numbers (to the right) or words."""

    header: str
    number: bool = True


def print_table(title: str, columns: Sequence[Column], groups: Iterable[Sequence[Sequence[str]]], caption: str) -> None:
    """A table with a rule between groups of rows: by rich on a terminal, plain text elsewhere."""
    groups = [group for group in groups if group]
    if _is_terminal(sys.stdout):
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


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def track(items: Iterable[Any], label: Callable[[Any], str], title: str, total: int | None = None) -> Iterator[Any]:
    """Iterate with a progress bar on a terminal's stderr; elsewhere one line per item. ``total``: their number."""
    total = len(items) if total is None else total
    if _is_terminal(sys.stderr):
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


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether it can be drawn on; a stream may be closed."""
    return stream is not None and stream.isatty() and importlib.util.find_spec("rich") is not None
