"""What nvcc makes of the CUDA kernels: registers, shared memory, spills and 16-byte accesses of every kernel.

Needs nvcc and c++filt, no GPU and no torch. Writes ``results/cuda_resources.csv``, one row per kernel and
architecture, and fails if any kernel spills. ``static_shared`` leaves out the tiles, which are sized at the launch and
at most 48 KiB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

from benchmarks.harness import command, results
from benchmarks.harness.command import BenchmarkError, UsageError, entry
from benchmarks.harness.results import ROOT

ARCHS = ("80", "86", "89", "90")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_\w+'(.*?)(?=Compiling entry function|\Z)", re.S)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
PTX_ENTRY = re.compile(r"\.entry (\w+)\((.*?)(?=\.entry |\Z)", re.S)
# Vectors of 16 bytes: four of 32 bits or two of 64.
WIDE = r"\.global\S*\.(?:v4\.[a-z]32|v2\.[a-z]64)"


def find_nvcc() -> str:
    """nvcc of ``CUDA_HOME``, of PATH, or of the newest toolkit in /usr/local."""
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    homes += [Path(path).parents[1] for path in [shutil.which("nvcc")] if path]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in homes:
        if (home / "bin" / "nvcc").exists():
            return str(home / "bin" / "nvcc")
    raise UsageError("nvcc was not found: install the CUDA toolkit or set CUDA_HOME")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def demangle(names: list[str]) -> list[str]:
    """``depthwise_conv_kernel<float, 3, 1>`` for each mangled name."""
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = [re.sub(r"^void |revkernels::(cuda::)?|\(anonymous namespace\)::", "", name) for name in plain]
    return [re.sub(r"\((Upsampling)\)(\d)", r"\2", name).partition("(")[0] for name in short]


def report(nvcc: str, source: Path, arch: str) -> list[dict]:
    """Compile one file for one architecture; a row per kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
        command += [f"-I{ROOT / 'csrc'}", "--keep", f"--keep-dir={folder}", "-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchmarkError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    bodies = dict(PTX_ENTRY.findall(ptx))
    entries = ENTRY.findall(done.stdout + done.stderr)
    rows = []
    for (mangled, text), kernel in zip(entries, demangle([name for name, _ in entries]), strict=True):
        stack, stores, loads = map(int, FRAME.search(text).groups())
        shared = re.search(r"(\d+) bytes smem", text)
        rows.append(
            {
                "arch": f"sm_{arch}",
                "file": source.name,
                "kernel": kernel,
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "static_shared": int(shared[1]) if shared else 0,
                "stack": stack,
                "spill_stores": stores,
                "spill_loads": loads,
                "loads_16_bytes": len(re.findall("ld" + WIDE, bodies[mangled])),
                "stores_16_bytes": len(re.findall("st" + WIDE, bodies[mangled])),
            }
        )
    return rows


def _parser() -> command.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = command.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--archs", nargs="+", default=ARCHS, help="compute capabilities without the dot")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--output", type=Path, default=results.RESULTS / "cuda_resources.csv")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    command.at_least_one(jobs=arguments.jobs)
    folder = command.pick_output(str(arguments.output.parent))
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        work = ((source, arch) for arch in arguments.archs for source in sources)
        rows = [row for part in pool.map(lambda item: report(nvcc, *item), work) for row in part]
    rows = sorted(({"nvcc": version, **row} for row in rows), key=lambda r: (r["arch"], r["file"], r["kernel"]))
    with results.replacing(folder) as new:
        lines = [list(rows[0]), *(row.values() for row in rows)]
        results.write_csv(new / arguments.output.name, lines, lineterminator="\n")

    for arch in arguments.archs:
        own = [row for row in rows if row["arch"] == f"sm_{arch}"]
        wide = sum(row["loads_16_bytes"] > 0 for row in own)
        most = max(own, key=lambda row: row["registers"])
        print(f"sm_{arch}: {len(own)} kernels, {wide} with 16-byte loads, at most {most['registers']} registers")
    spilled = [row for row in rows if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    if spilled:
        which = [f"{row['arch']} {row['kernel']} ({row['stack']} B stack, {row['spill_stores']} B)" for row in spilled]
        raise BenchmarkError(f"{len(spilled)} kernels spill registers: {'; '.join(which)}")


if __name__ == "__main__":
    sys.exit(main())
