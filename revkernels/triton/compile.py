"""Compile every kernel for GPUs that need not be here, and report what it costs them.

``python -m revkernels.triton.compile [--out FILE]`` writes one row per kernel, configuration and architecture:
registers per thread, bytes of shared memory and of local memory (spills) by ``cuobjdump``, and the widest global load
and store in the PTX. Launchers run as they are on meta tensors; only the launch itself is replaced, so that what is
compiled is what would run, with the same heuristics and the same specialisation of arguments.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from revkernels.triton import INTERPRETED, LAUNCHERS

ARCHITECTURES = (80, 90)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTERS |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHORT |= {torch.int16: "int16", torch.int32: "int32"}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel by a launcher; ``prepared``: it is compiled for other sizes, and not launched."""

    kernel: JITFunction
    args: tuple
    kwargs: dict[str, Any]
    prepared: bool = False


@dataclass(frozen=True)
class Resources:
    """A row of the report. Widths are bytes per thread and instruction."""

    op: str
    configuration: str
    kernel: str
    architecture: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    widest_load: int
    widest_store: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs, warmup))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _specialise(value: Any, path: tuple[int, ...], constexprs: dict, attrs: dict, *, numbers: bool = True) -> Any:
    """The type of an argument as the launch would see it; fills in constants and known divisibility.

    ``numbers``: those of integers too. Empty entries are made where Triton makes them, as its cache's key has them.
    """
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not numbers:
        return _integer(value)
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constexprs, attrs) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constexprs[path] = value
        if len(path) == 1:
            attrs[path] = []
        return "constexpr"
    if isinstance(value, Tensor):
        address, kind = value.storage_offset() * value.element_size(), POINTERS[value.dtype]
    else:
        address, kind = value, _integer(value)
    attrs[path] = [["tt.divisibility", 16]] if address % 16 == 0 else []
    return kind


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, and its options."""
    options = {k: v for k, v in launch.kwargs.items() if k in OPTIONS}
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    named |= {k: v for k, v in launch.kwargs.items() if k not in OPTIONS}
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list] = {}
    for i, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[(i,)], attrs[(i,)] = "constexpr", named[parameter.name], []
        else:
            value, numbers = named[parameter.name], not parameter.do_not_specialize
            signature[parameter.name] = _specialise(value, (i,), constexprs, attrs, numbers=numbers)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs), options


def specialisation(launch: Launch) -> str:
    """Equal for launches that are compiled once."""
    source, options = _source(launch)
    return f"{source.hash()} {options}"


def compile_launch(launch: Launch, architecture: int) -> triton.compiler.CompiledKernel:
    """Compile a recorded launch for an architecture, 90 for sm_90."""
    source, options = _source(launch)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _widest(ptx: str, instruction: str) -> int:
    """Bytes of the widest global load or store of one thread."""
    pattern = rf"{instruction}\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bufs](\d+)\b"
    return max((int(v or 1) * int(bits) // 8 for v, bits in re.findall(pattern, ptx)), default=0)


def resources(op: str, configuration: str, launch: Launch, architecture: int) -> Resources:
    """What a recorded launch takes on an architecture."""
    compiled = compile_launch(launch, architecture)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        op=op,
        configuration=configuration,
        kernel=launch.kernel.__name__.strip("_"),
        architecture=f"sm_{architecture}",
        num_warps=compiled.metadata.num_warps,
        registers=used["REG"],
        shared_bytes=compiled.metadata.shared,
        spill_bytes=used["STACK"] + used["LOCAL"],
        widest_load=_widest(compiled.asm["ptx"], "ld"),
        widest_store=_widest(compiled.asm["ptx"], "st"),
    )


def _map(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def configurations(n: int = 8) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """``(op, configuration, call)``: dtypes, factors and sizes as the network has them, for n samples."""
    c = 48
    vector, overflow = _map((c,), torch.float32), _map((1,), torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        for factors, size in (
            ((1,), 56), ((1, 1), 28), ((1, 1, 1), 7), ((2,), 14), ((2, 4), 28), ((2, 4, 8), 56), ((2, 4, 8), 88),
        ):  # fmt: skip
            p = [_map((n, c, size // f, size // f), dtype) for f in factors]
            vectors = [vector] * len(p)
            name = f"{SHORT[dtype]} f={'+'.join(map(str, factors))} {size}x{size}"
            for stream in dict.fromkeys((torch.float32, dtype, torch.int16)):
                y = _map((n, c, size, size), stream)
                fixed_point = (8, overflow) if stream == torch.int16 else ()
                args = (y, p, vectors, vectors, list(factors), "bilinear", False, *fixed_point)
                call = partial(LAUNCHERS["couple_"], *args)
                yield "couple_", f"{SHORT[stream]} stream {name}", call
            dy = _map((n, c, size, size), dtype)
            yield "couple_adjoint", name, partial(LAUNCHERS["couple_adjoint"], dy, p, vectors, factors, "bilinear")
    for p_dtype in (torch.float32, torch.bfloat16):
        shape = (n, c, 56, 56)
        t = _map(shape, p_dtype)
        for stream, k in ((torch.float32, 0), (torch.int32, 7), (torch.int32, 0), (torch.int16, 1)):
            y, grid = _map(shape, stream), () if stream == torch.float32 else (8,)
            bits = (torch.empty(y.numel() // 8 * k, dtype=torch.uint8, device="meta"),) if k else (None,) * len(grid)
            for inverse in (False, True):
                more = (*grid, *bits, overflow) if grid and not inverse else (*grid, *bits)
                arguments = (y, y.clone(), t, -0.5, 2.0**-k, inverse, *more)
                name = f"{SHORT[stream]} stream k={k} {SHORT[p_dtype]} {'inverse ' * inverse}56x56"
                yield "dual_residual_", name, partial(LAUNCHERS["dual_residual_"], *arguments)
        dy = _map(shape, torch.float32)
        yield (
            "dual_residual_adjoint_",
            f"fp32 {SHORT[p_dtype]} 56x56",
            partial(LAUNCHERS["dual_residual_adjoint_"], dy, dy.clone(), t, -0.5, 0.5),
        )


def report(
    architectures: tuple[int, ...] = ARCHITECTURES, wanted: Callable[[str, str], bool] = lambda op, configuration: True
) -> Iterator[Resources]:
    """Compile the wanted configurations, each kernel of each launch once."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled under the interpreter; unset it")
    for op, configuration, call in configurations():
        if not wanted(op, configuration):
            continue
        with recorded() as launches:
            call()
        for launch in launches:
            for architecture in architectures if not launch.prepared else ():
                yield resources(op, configuration, launch, architecture)


def main() -> None:
    """Write the table and a line per kernel that spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/triton_resources.csv"))
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Resources)), "triton"], lineterminator="\n")
        writer.writeheader()
        spilling, count = [], 0
        for row in report():
            writer.writerow(asdict(row) | {"triton": triton.__version__})
            count += 1
            if row.spill_bytes:
                spilling.append(row)
    print(f"{count} kernels compiled with triton {triton.__version__} into {out}; {len(spilling)} spill")
    for row in spilling:
        print(f"  {row.kernel} [{row.configuration}] {row.architecture}: {row.spill_bytes} bytes")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    main()
