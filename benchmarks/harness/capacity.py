"""The largest batch of a training step that fits into a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from benchmarks.harness import networks
from benchmarks.harness.steps import Runner
from benchmarks.harness.terminal import Column, print_table, track

CAPACITY = "capacity"
GIGABYTES = (8, 16, 24, 80)
OPTIMIZER_STATES = 1  # SGD with momentum


def capacities(runners: Sequence[Runner], resolution: int, batch: int) -> list[dict[str, Any]]:
    """The largest batch of a training step in each of ``GIGABYTES``, of all whose memory a meter sees."""
    rows = []
    metered = [r for r in runners if r.is_metered and not networks.why_not(r.network, r.device)]
    for runner in track(metered, lambda r: r.network.key, "largest batch"):
        row = {"task": CAPACITY, **runner.network.about, "resolution": resolution, "batch": None, "dtype": runner.dtype}
        with suppress(torch.OutOfMemoryError):
            fits = runner.largest_batch(resolution, batch, OPTIMIZER_STATES)
            row |= {f"largest_batch_{gigabytes}gb": fits(gigabytes * 2**30) for gigabytes in GIGABYTES}
        rows.append(row)
    return rows


def show_capacities(rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Prints the table of largest batches."""
    if not rows:
        return
    columns = [Column("model", number=False), Column("activations", number=False)]
    columns += [Column(f"{gigabytes} GB") for gigabytes in GIGABYTES]
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        found = [row.get(f"largest_batch_{gigabytes}gb") for gigabytes in GIGABYTES]
        cells = ["-" if n is None else str(n) for n in found]
        groups.setdefault(row["model"], []).append([row["label"], row["variant"], *cells])
    how = "from the allocator's peaks" if device.type == "cuda" else "from a simulated step (revbifpn.estimate_memory)"
    caption = (
        f"Activations, images, parameters, gradients, {OPTIMIZER_STATES} optimizer state (SGD with momentum), {how}.\n"
        "1 GB = 2^30 bytes. Not counted: CUDA's context, workspaces, what the allocator rounds up and keeps."
    )
    title = f"Largest batch of a training step at {rows[0]['resolution']} pixels, {rows[0]['dtype']}"
    print_table(title, columns, groups.values(), caption)
