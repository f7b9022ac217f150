"""Operations of a training step: how often RevBiFPN's step calls the device, against plain autograd.

    python benchmarks/launches.py                                S0, S3, S6
    python benchmarks/launches.py --published ~/RevBiFPN         the published code as well

Counts what PyTorch dispatches in forward, loss and backward, without views and allocations. On a GPU an operation is
one kernel or a few, and each costs a launch, unless the step is captured in a CUDA graph, which is launched as one
(examples/cuda_graph.py); `benchmarks/gpu_suite.py` counts the kernels themselves. The count depends neither on the size
of the images nor on the device, as long as a batch is one chunk, so small images on the CPU tell it. Prints a table and
writes it to benchmarks/results/launches.csv.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import Column
from benchmarks.memory_vs_hrnet import FAST, REVBIFPN, REVERSIBLE, STORED
from benchmarks.throughput import PUBLISHED, contestants, load_published, select
from revbifpn import fused

SCALES = ("s0", "s3", "s6")
SHAPE = (2, 3, 64, 64)
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
VIEWS = {"detach", "_unsafe_view"}  # that their schemas do not call so


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.name().split("::")[1].split(".")[0]
        if not func.is_view and name not in ALLOCATIONS | VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count(make: Callable[[], nn.Module]) -> Counter[str]:
    """The operations of one training step."""
    torch.manual_seed(0)
    model = make().train()
    images, labels = torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.long)
    with fused.chunks_of(fused.chunk_bytes(torch.device("cuda"))), Operations() as operations:
        F.cross_entropy(model(images), labels).backward()
    return operations.calls


def _parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(f"revbifpn_{s}" for s in SCALES), help="comma list of networks")
    parser.add_argument("--published", metavar="DIR", help="a checkout of the published code, to count beside ours")
    parser.add_argument("--output", default=str(common.RESULTS), help="directory for the CSV")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    output = common.pick_output(arguments.output)
    published = load_published(arguments.published) if arguments.published else None
    wanted = [name.strip() for name in arguments.models.split(",")]
    chosen = [
        c
        for c in select(wanted, contestants(published))
        if c.family == REVBIFPN and c.variant in (FAST, REVERSIBLE, STORED, PUBLISHED)
    ]
    records: list[dict[str, Any]] = []
    groups: dict[str, list[list[str]]] = {}
    for c in common.track(chosen, lambda c: c.key, "launches"):
        calls = count(c.make)
        records += [{"model": c.name, "variant": c.variant, "operation": op, "calls": n} for op, n in calls.items()]
        most = ", ".join(f"{op} {n}" for op, n in calls.most_common(4))
        groups.setdefault(c.name, []).append([c.label, c.variant, str(calls.total()), most])
    columns = [Column("model", number=False), Column("variant", number=False), Column("operations")]
    columns += [Column("most", number=False)]
    environment = common.environment(torch.device("cpu"))
    caption = f"torch {environment['torch']}, commit {environment['commit']}; captured in a CUDA graph: one launch"
    common.print_table("Operations of a training step, forward to gradients", columns, groups.values(), caption)
    path = output / "launches.csv"
    common.write_long_csv(path, environment, records, ("model", "variant", "operation"), {"calls": "1"})
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(common.run(main))
