"""Compiles the Triton kernels of a training step before there is a GPU.

    python -m revkernels.warm --arch 90 --scales s0,s3 --dtype bfloat16

fills Triton's cache (``TRITON_CACHE_DIR``) for a GPU of that compute capability, so that the first step there compiles
nothing, whatever the batch and the size of the images. A step on the CPU, of small images of two sizes, says which
kernels are needed: they are specialised on dtypes and on whether 16 bytes divide a row, not on sizes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from revkernels.triton import INTERPRETED, LAUNCHERS
from revkernels.triton.compile import Launch, compile_launch, recorded, specialisation

SIZES = (64, 96)  # pixels: of every level of a pyramid, rows that 16 bytes divide and rows that they do not


class _Calls(TorchDispatchMode):
    """The arguments of the ops that Triton runs on a GPU, as meta tensors of equal layout and alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple, dict]] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "revkernels" and name in LAUNCHERS:
            self.found.append((name, *tree_map_only(Tensor, _meta, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _meta(x: Tensor) -> Tensor:
    skew = x.data_ptr() % 16 // x.element_size()
    size = skew + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True) if x.numel())
    return torch.empty(size, dtype=x.dtype, device="meta").as_strided(x.shape, x.stride(), skew)


def launches_of(step: Callable[[], object]) -> list[Launch]:
    """Every launch that ``step``, which runs on the CPU, would make on a GPU; of equal specialisations one."""
    with _Calls() as calls:
        step()
    with recorded() as launches:
        for op, args, kwargs in calls.found:
            LAUNCHERS[op](*args, **kwargs)
    return list({specialisation(launch): launch for launch in launches}.values())


def warm(step: Callable[[], object], architectures: Sequence[int], jobs: int | None = None) -> int:
    """Compile what ``step`` needs for each architecture into Triton's cache; how many kernels that is.

    Args:
        step: runs on the CPU.
        architectures: compute capabilities, 90 for 9.0.
        jobs: compilations at a time; by default one per core.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled under the interpreter; unset it")
    work = [(launch, architecture) for launch in launches_of(step) for architecture in architectures]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for _ in pool.map(lambda pair: compile_launch(*pair), work):
            pass
    return len(work)


def _steps(scales: Sequence[str], dtype: torch.dtype, stream: str | None) -> Iterator[Callable[[], object]]:
    from revbifpn import fast  # the command's alone: the ops know no network

    for scale in scales:
        torch.manual_seed(0)
        model = getattr(fast, f"revbifpn_{scale}")(**({"stream": stream} if stream else {})).train()
        for size in SIZES:

            def step(model: torch.nn.Module = model, size: int = size) -> None:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    out = model(torch.randn(2, 3, size, size))
                out.float().sum().backward()

            yield step


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="comma list of compute capabilities, 90 for 9.0 (default 90)")
    parser.add_argument("--scales", default="s0", help="comma list of RevBiFPN's scales, s0 to s6 (default s0)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="autocast's")
    parser.add_argument("--stream", help="format of the streams, such as fixed16; see revbifpn.streams")
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: one per core)")
    arguments = parser.parse_args(argv)
    if not all(arch.isdecimal() for arch in arguments.arch.split(",")):
        parser.error(f"--arch: {arguments.arch!r} is not a list of compute capabilities; write it like 80,90")
    known = [f"s{i}" for i in range(7)]
    scales = arguments.scales.split(",")
    if not set(scales) <= set(known):
        parser.error(f"--scales: {arguments.scales!r} is unknown; choose from {', '.join(known)}")
    architectures = [int(arch) for arch in arguments.arch.split(",")]
    steps = list(_steps(scales, getattr(torch, arguments.dtype), arguments.stream))
    count = warm(lambda: [step() for step in steps], architectures, arguments.jobs)
    print(f"{count} kernels are in Triton's cache for {', '.join(f'sm_{a}' for a in architectures)}")


if __name__ == "__main__":
    main()
