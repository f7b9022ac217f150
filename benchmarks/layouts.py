"""NCHW or channels_last: four ops on one large stream, of this package and of PyTorch, in either layout.

    python benchmarks/layouts.py --threads 1                     seconds

A stream of 8 x 144 x 56 x 56, float32, on the CPU. Contestants take turns, and each one's time is the least of its
turns; before that they are compared. Prints a table and writes raw numbers (JSON, CSV) to benchmarks/results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import command, results
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.terminal import Column, print_table
from revkernels import functional

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
KEYS, UNITS = ("op", "implementation", "layout"), {"milliseconds": "ms"}
SHAPE, FACTORS = (8, 144, 56, 56), (2, 4)


@dataclass(frozen=True)
class Inputs:
    """What the ops read; maps are in the layout of the contestant."""

    x: Tensor  # [N, C, H, W]
    weight: Tensor  # [C, 1, 3, 3]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    gate: Tensor  # [N, C]
    contributions: tuple[Tensor, ...]  # [N, C, H / f, W / f]

    @classmethod
    def random(cls, shape: Sequence[int], layout: torch.memory_format) -> Inputs:
        n, c, h, w = shape
        g = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=g)

        maps = [draw(n, c, h, w), *(draw(n, c, h // f, w // f) for f in FACTORS)]
        x, *contributions = (m.contiguous(memory_format=layout) for m in maps)
        return cls(x, draw(c, 1, 3, 3), draw(c), draw(c), torch.rand((n, c), generator=g), tuple(contributions))


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


def _couple(i: Inputs) -> Tensor:
    y = i.x.clone(memory_format=torch.preserve_format)
    for p, factor in zip(i.contributions, FACTORS, strict=True):
        p = F.interpolate(_affine(p, i.scale, i.shift), scale_factor=factor, mode="bilinear")
        y += p
    return y


def _couple_here(i: Inputs) -> Tensor:
    y, count = i.x.clone(memory_format=torch.preserve_format), len(FACTORS)
    return functional.couple_(y, i.contributions, FACTORS, scale=[i.scale] * count, shift=[i.shift] * count)


OPS: dict[str, dict[str, Callable[[Inputs], Any]]] = {
    "depthwise_conv": {
        "here": lambda i: functional.depthwise_conv(i.x, i.weight),
        "pytorch": lambda i: F.conv2d(i.x, i.weight, padding=1, groups=i.x.shape[1]),
    },
    "bn_act": {
        "here": lambda i: torch.ops.revkernels.bn_act(i.x, i.scale, i.shift, i.gate, "hardswish"),
        "pytorch": lambda i: F.hardswish(_affine(i.x, i.scale, i.shift)).mul_(i.gate[:, :, None, None]),
    },
    "bn_stats": {
        "here": lambda i: torch.stack(torch.ops.revkernels.bn_stats(i.x)),
        "pytorch": lambda i: torch.stack(torch.var_mean(i.x, (0, 2, 3), correction=0)[::-1]),
    },
    "couple_": {"here": _couple_here, "pytorch": _couple},
}


def measure(shape: Sequence[int], turns: int) -> list[dict[str, Any]]:
    """A row per op, implementation and layout."""
    inputs = {name: Inputs.random(shape, layout) for name, layout in LAYOUTS.items()}
    rows = []
    for op, implementations in OPS.items():
        contestants = {(who, layout): (run, i) for who, run in implementations.items() for layout, i in inputs.items()}
        expected = implementations["pytorch"](inputs["NCHW"])
        for (who, layout), (run, i) in contestants.items():
            error = (run(i) - expected).abs().max() / expected.abs().max()
            if not error < 1e-4:
                raise BenchmarkError(f"{op}, {who}, {layout}: differs from PyTorch's by {error:.1e}; nothing was timed")
        least = dict.fromkeys(contestants, float("inf"))
        for _ in range(turns):
            for name, (run, i) in contestants.items():
                began = time.perf_counter()
                run(i)
                least[name] = min(least[name], 1e3 * (time.perf_counter() - began))
        rows += [
            {"op": op, "implementation": who, "layout": layout, "milliseconds": ms}
            for (who, layout), ms in least.items()
        ]
    return rows


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="x".join(map(str, SHAPE)), help="N x C x H x W (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=41, help="of each contestant (default 41)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    command.at_least_one(turns=arguments.turns, threads=arguments.threads)
    shape = [int(size) for size in arguments.shape.split("x")]
    output = command.pick_output(arguments.output)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with torch.inference_mode():
            rows = measure(shape, arguments.turns)
        environment = results.environment(torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    settings = {"shape": shape, "turns": arguments.turns}
    written = results.save(output / "layouts_cpu", environment, settings, rows, KEYS, UNITS)
    columns = [*(Column(key, number=False) for key in KEYS), Column("ms")]
    lines = [[*(row[key] for key in KEYS), f"{row['milliseconds']:.2f}"] for row in rows]
    print_table("Layouts", columns, [lines], results.origin(environment))
    print(written)


if __name__ == "__main__":
    sys.exit(main())
