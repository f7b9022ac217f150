"""Operations of a training step: what PyTorch dispatches in RevBiFPN's, against plain autograd.

    python benchmarks/launches.py                                S0, S3, S6
    python benchmarks/launches.py --published ~/RevBiFPN         the published code as well

Counts what PyTorch dispatches in forward, loss and backward, without views and allocations. On a GPU a pass over a map
is one kernel or a few, an MBConv's op is many; each costs a launch, unless the step is captured in a CUDA graph, which
is launched as one (examples/cuda_graph.py). `benchmarks/host.py` and `gpu_suite.py` count the kernels themselves. The
count depends neither on the size of the images nor on the device, as long as a batch is one chunk, so small images on
the CPU tell it. Prints a table and writes it to benchmarks/results/launches.csv.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import command, networks, results
from benchmarks.harness.command import entry
from benchmarks.harness.networks import FAST, PUBLISHED, REVBIFPN, REVERSIBLE, STORED
from benchmarks.harness.terminal import Column, print_table, track
from revbifpn.fused import chunk_bytes, chunks_of

SCALES = ("s0", "s3", "s6")
SHAPE = (2, 3, 64, 64)
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
VIEWS = {"detach", "_unsafe_view"}  # that their schemas do not call so


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if not func.is_view and name not in ALLOCATIONS | VIEWS:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count(make: Callable[[], nn.Module]) -> Counter[str]:
    """The operations of one training step."""
    torch.manual_seed(0)
    model = make().train()
    images, labels = torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.long)
    with chunks_of(chunk_bytes(torch.device("cuda"))), Operations() as operations:
        F.cross_entropy(model(images), labels).backward()
    return operations.calls


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(f"revbifpn_{s}" for s in SCALES), help="comma list of networks")
    parser.add_argument("--published", metavar="DIR", help="a checkout of the published code, to count as well")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the CSV")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    output = command.pick_output(arguments.output)
    published = networks.load_published(arguments.published) if arguments.published else None
    chosen = networks.choose(arguments.models, networks.catalogue(published))
    chosen = [n for n in chosen if n.family == REVBIFPN and n.variant in (FAST, REVERSIBLE, STORED, PUBLISHED)]
    records: list[dict[str, Any]] = []
    groups: dict[str, list[list[str]]] = {}
    for n in track(chosen, lambda n: n.key, "launches"):
        calls = count(n.make)
        records += [{"model": n.name, "variant": n.variant, "operation": op, "calls": c} for op, c in calls.items()]
        most = ", ".join(f"{op} {c}" for op, c in calls.most_common(4))
        groups.setdefault(n.name, []).append([n.label, n.variant, str(calls.total()), most])

    environment = results.environment(torch.device("cpu"))
    with results.replacing(output) as new:
        keys = ("model", "variant", "operation")
        results.write_long_csv(new / "launches.csv", environment, records, keys, {"calls": "1"})
    words = Column("model", number=False), Column("variant", number=False)
    columns = (*words, Column("operations"), Column("most", number=False))
    caption = f"torch {environment['torch']}, commit {environment['commit']}; captured in a CUDA graph: one launch"
    print_table("Operations of a training step, forward to gradients", columns, groups.values(), caption)
    print(f"wrote {output / 'launches.csv'}")


if __name__ == "__main__":
    sys.exit(main())
