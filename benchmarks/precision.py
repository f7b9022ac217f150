"""How far gradients of 16-bit and reversible steps are from what they should be, and what streams cost in memory.

    python benchmarks/precision.py                     a minute or two on one core

Every difference is ``||g - g'|| / ||g'||`` over the gradients of all parameters of a network with random weights, in
the same step on the same images:

- ``autocast``: a narrow RevBiFPN with the levels, kernels and ratios of S0, 64 pixels, a batch of 4, bfloat16 branches.
  A reversible step is compared with the stored one of the same streams, and the stored step of each stream with that of
  float32 streams and branches, to tell what rounding to the grid changes.
- ``float32``: the same without autocast.
- ``16 bits``: S0 as a whole in bfloat16 or float16, 64 pixels, a batch of 2, against float64.
- ``memory``: activations of S0 at 224 pixels, MiB per sample (:func:`revbifpn.memory.measure_sample`, a batch of 8).

Prints them and writes raw numbers (JSON, CSV) to benchmarks/results.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revbifpn
from benchmarks.harness import command, results
from benchmarks.harness.command import entry
from benchmarks.harness.terminal import Column, print_table
from benchmarks.parity_digits import NETWORK
from revbifpn import fast
from revbifpn.memory import measure_sample

MODULES = {"revbifpn": revbifpn, "revbifpn.fast": fast}
STREAMS = ("float32", "fixed32", "fixed16")
KEYS = ("part", "network", "module", "branches", "stream", "reversible", "against")
UNITS = {"difference": "", "mib_per_sample": "MiB"}


def gradients(model: nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Of all parameters, as one float64 vector; with a dtype the forward runs under autocast."""
    model.zero_grad(set_to_none=True)
    labels = torch.arange(len(images)) % 10
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(images)
    F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def of_streams(seed: int) -> Iterator[dict[str, Any]]:
    """Of the narrow network, by stream."""
    torch.manual_seed(seed)
    model = fast.RevBiFPN(**NETWORK)
    images = torch.randn(4, 3, 64, 64)
    about = {"network": "narrow", "module": "revbifpn.fast"}
    model.disable_rev, model.disable_recomp, model.stream = True, True, "float32"
    exact = gradients(model, images)
    for part, branches, dtype in (("float32", "float32", None), ("autocast", "bfloat16", torch.bfloat16)):
        for stream in STREAMS:
            model.stream = stream
            model.disable_rev = model.disable_recomp = True
            stored = gradients(model, images, dtype)
            model.disable_rev = model.disable_recomp = False
            reversible = gradients(model, images, dtype)
            row = about | {"part": part, "branches": branches, "stream": stream}
            yield row | {"reversible": True, "against": "stored", "difference": difference(reversible, stored)}
            yield row | {"reversible": False, "against": "float32", "difference": difference(stored, exact)}


def of_halves(seed: int) -> Iterator[dict[str, Any]]:
    """Of S0 as a whole in 16 bits, by class and stream."""
    torch.manual_seed(seed)
    base, images = revbifpn.revbifpn_s0(classes=10, head_dropout=0.0), torch.randn(2, 3, 64, 64)
    exact = gradients(copy.deepcopy(base).double(), images.double())
    for name, module in MODULES.items():
        for dtype in (torch.bfloat16, torch.float16):
            for stream in (None, "float32"):
                for reversible in (True, False):
                    model = module.revbifpn_s0(classes=10, head_dropout=0.0, stream=stream, reversible=reversible)
                    model.load_state_dict(base.state_dict())
                    found = gradients(model.to(dtype), images.to(dtype))
                    yield {
                        "part": "16 bits",
                        "network": "revbifpn_s0",
                        "module": name,
                        "branches": str(dtype).removeprefix("torch."),
                        "stream": stream or "default",
                        "reversible": reversible,
                        "against": "float64",
                        "difference": difference(found, exact),
                    }


def of_memory() -> Iterator[dict[str, Any]]:
    """Activations of S0, by stream and branches."""
    for dtype in (torch.float32, torch.bfloat16):
        for stream, reversible in (*((stream, True) for stream in STREAMS), ("float32", False)):
            model = (fast if reversible else revbifpn).revbifpn_s0(stream=stream, reversible=reversible)
            found = measure_sample(model, (3, 224, 224), batch=8, dtype=dtype, fake=True)
            yield {
                "part": "memory",
                "network": "revbifpn_s0",
                "module": "revbifpn.fast" if reversible else "revbifpn",
                "branches": str(dtype).removeprefix("torch."),
                "stream": stream,
                "reversible": reversible,
                "against": "",
                "mib_per_sample": found.bytes_per_sample / 2**20,
            }


def show(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Prints one line per row."""
    columns = [Column(name, number=False) for name in KEYS] + [Column("difference"), Column("MiB per sample")]
    lines = []
    for row in rows:
        numbers = [f"{row[name]:.3g}" if name in row else "" for name in UNITS]
        lines.append([*(str(row[key]) for key in KEYS), *numbers])
    print_table("Gradients and memory by streams", columns, [lines], results.origin(environment))


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default 0)")
    parser.add_argument("--parts", help="comma list of streams, halves, memory (default: all)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    parts = {"streams": of_streams, "halves": of_halves, "memory": lambda seed: of_memory()}
    chosen = command.some_of("--parts", arguments.parts or ",".join(parts), list(parts))
    output = command.pick_output(arguments.output)
    environment = results.environment(torch.device("cpu"))
    rows = [row for name in chosen for row in parts[name](arguments.seed)]
    written = results.save(output / "precision_cpu", environment, {"seed": arguments.seed}, rows, KEYS, UNITS)
    show(rows, environment)
    print(written)


if __name__ == "__main__":
    sys.exit(main())
