"""Fine-tuning from the same weights on the same batches in several ways: the ways, the loop, the table, the curves."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import command, plots, results
from benchmarks.harness.terminal import Column, print_table
from revbifpn.dual_residual import Schedule, convert, precise_beta, runs_of

Prepare = Callable[[nn.Module, int], Schedule | None]


def _ordinary(model: nn.Module, steps: int) -> None:
    return None


def _fixed(model: nn.Module, steps: int, *, beta: float, exact: bool) -> None:
    convert(model, alpha=1 - beta, beta=beta, exact=exact)


def _precise(model: nn.Module, steps: int, *, error: float) -> None:
    """Float streams at the smallest beta with that predicted error."""
    convert(model)
    deepest = max(len(stack.blocks) for stack in runs_of(model))
    for stack in runs_of(model):
        stack.set(1 - (beta := precise_beta(deepest, error)), beta)


def _scheduled(
    model: nn.Module,
    steps: int,
    *,
    exact: bool,
    share: float = 0.5,
    start: float | None = None,
    end: float | None = None,
) -> Schedule:
    """Over a share of the steps, between two betas or the default ones."""
    convert(model, exact=exact)
    ends = {name: (1 - b, b) for name, b in (("start", start), ("end", end)) if b is not None}
    return Schedule(model, max(1, round(steps * share)), **ends)


ORDINARY = "ordinary"
WAYS: dict[str, Prepare] = {
    ORDINARY: _ordinary,
    "float (1/2, 1/2)": partial(_fixed, beta=0.5, exact=False),
    "float (0, 1)": partial(_fixed, beta=1.0, exact=False),
    "float, error 0.01": partial(_precise, error=1e-2),
    "float, error 0.0001": partial(_precise, error=1e-4),
    "float scheduled": partial(_scheduled, exact=False),
    "float scheduled, all steps": partial(_scheduled, exact=False, share=1.0),
    "float scheduled to (0, 1)": partial(_scheduled, exact=False, end=1.0),
    **{f"int32 k={k}": partial(_fixed, beta=2.0**-k, exact=True) for k in (7, 3, 1, 0)},
    "int32 scheduled to k=3": partial(_scheduled, exact=True),
    "int32 scheduled": partial(_scheduled, exact=True, end=0.5),
    "int32 scheduled, all steps": partial(_scheduled, exact=True, share=1.0, end=0.5),
    "int32 scheduled to k=0": partial(_scheduled, exact=True, end=1.0),
}
SHOWN = (ORDINARY, "float scheduled", "int32 k=7", "int32 scheduled")  # in the plot


@dataclass
class Row:
    """One run, or with ``seed="mean"`` the means of a way."""

    way: str
    seed: int | str
    test_accuracy: float  # per cent
    train_loss: float  # mean over the last part of ``losses``
    difference: float | None = None  # of the mean accuracy to the ordinary one, points
    deviation: float | None = None  # of the accuracies, points
    losses: list[float] = field(default_factory=list)  # mean of every ``losses_every`` steps


UNITS = {"test_accuracy": "%", "train_loss": "1", "difference": "points", "deviation": "points"}


def fine_tune(
    model: nn.Module,
    batches: Iterator[Any],
    steps: int,
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    rate: float,
    losses_every: int,
    prepare: Prepare = _ordinary,
) -> list[float]:
    """AdamW at a one-cycle rate; the mean loss of every ``losses_every`` steps."""
    schedule = prepare(model, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        loss.backward()
        optimizer.step()
        cycle.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return [statistics.fmean(losses[i : i + losses_every]) for i in range(0, steps, losses_every)]


def run_ways(
    pretrained: nn.Module,
    ways: Sequence[str],
    seed: int,
    train: Callable[[nn.Module, Prepare], list[float]],
    accuracy: Callable[[nn.Module], float],
) -> Iterator[Row]:
    """A run of every way from the same weights, with the same random numbers."""
    for way in ways:
        torch.manual_seed(seed)
        model = copy.deepcopy(pretrained)
        losses = train(model, WAYS[way])
        yield Row(way, seed, accuracy(model.eval()), losses[-1], losses=losses)


def means(rows: Sequence[Row]) -> list[Row]:
    """Per way, the mean of the seeds, and their standard deviation."""
    found: list[Row] = []
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        accuracies = [row.test_accuracy for row in own]
        found.append(Row(way, "mean", statistics.fmean(accuracies), statistics.fmean(row.train_loss for row in own)))
        found[-1].deviation = statistics.stdev(accuracies) if len(own) > 1 else None
    ordinary = next((row for row in found if row.way == ORDINARY), None)
    for row in found:
        row.difference = None if ordinary is None else row.test_accuracy - ordinary.test_accuracy
    return found


def seeds_of(text: str) -> list[int]:
    """Of ``--seeds``.

    Raises:
        UsageError: one is no number.
    """
    found = command.split(text)
    if not found or not all(seed.isdigit() for seed in found):
        raise command.UsageError(f"--seeds: expected numbers with commas between, got {text!r}")
    return [int(seed) for seed in found]


def earlier_rows(stem: Path, settings: dict[str, Any], seeds: Sequence[int], ways: Sequence[str]) -> list[Row]:
    """The runs of :func:`benchmarks.harness.results.earlier_rows`, but those that are made again."""
    rows = results.earlier_rows(stem, results.environment(torch.device("cpu")), settings)
    kept = [row for row in rows if row["seed"] != "mean" and (row["seed"] not in seeds or row["way"] not in ways)]
    return [Row(**row) for row in kept]


def report(title: str, rows: Sequence[Row], stem: Path, settings: dict[str, Any]) -> None:
    """Print the table and write it with every run's losses, and their plot."""
    environment = results.environment(torch.device("cpu"))
    rows = sorted(rows, key=lambda row: (row.seed, list(WAYS).index(row.way)))
    seeds, averages = list(dict.fromkeys(row.seed for row in rows)), means(rows)
    columns = [Column("way", False), *(Column(f"seed {seed}") for seed in seeds), Column("mean")]
    columns += [Column("deviation"), Column("to ordinary"), Column("loss")]
    cells = [
        [m.way, *(f"{r.test_accuracy:.2f}" for s in seeds for r in rows if (r.way, r.seed) == (m.way, s)),
         f"{m.test_accuracy:.2f}", "" if m.deviation is None else f"{m.deviation:.2f}",
         "" if m.difference is None else f"{m.difference:+.2f}", f"{m.train_loss:.4f}"]
        for m in averages
    ]  # fmt: skip
    print_table(title, columns, [cells], results.origin(environment))
    shown = [row for row in rows if row.way in SHOWN]
    draw = partial(plots.losses, shown, settings["losses_every"]) if shown else None
    saved = [asdict(row) for row in [*rows, *averages]]
    print(results.save(stem, environment, settings, saved, ("way", "seed"), UNITS, draw))
