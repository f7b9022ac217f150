"""Parts of the suite that are no benchmark of their own; each prints its headline last."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.profile import work_profile
from benchmarks.harness import results
from benchmarks.harness.command import BenchmarkError
from benchmarks.harness.terminal import markdown
from benchmarks.harness.timing import seconds

WARM_UP, REPEATS, READINGS = 2, 20, 5  # of a transfer


def work_env(folder: Path) -> None:
    """What the machine is: driver, tools, packages, GPU state, and what of this package runs before the build."""
    queries = {
        "nvidia-smi": ["nvidia-smi"],
        "clocks": ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,ECC"],
        "nvcc": ["nvcc", "--version"],
        "processor": ["lscpu"],
        "packages": [sys.executable, "-m", "pip", "list", "--format=freeze"],
        "kernels": [sys.executable, "-m", "revkernels.env"],
    }
    for name, command in queries.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            text = done.stdout + done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"{shlex.join(command)}: {error}\n"
        (folder / f"{name}.txt").write_text(text)
        print(f"--- {name}", text, sep="\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = results.environment(device)
    results.write_json(folder / "environment.json", record, {}, [])
    print(f"{record['device']}, torch {record['torch']}, CUDA {record['cuda']}, commit {record['commit']}")


def work_implementations(folder: Path, device: str) -> None:
    """Report the kernels in use; on a GPU, every op must have one there."""
    from revkernels import env

    report = env.collect()
    print(env.render(report))
    results.write_text(folder / "kernels.json", results.to_json(report))
    used = {op: by_device[device] for op, by_device in report["ops"].items()}
    missing = [op for op, name in used.items() if name == "reference"]
    if device == "cuda" and missing:
        reasons = [f"{name}: {about['reason']}" for name, about in report["implementations"].items() if about["reason"]]
        raise BenchmarkError(f"no CUDA kernel for {', '.join(missing)} ({'; '.join(reasons) or 'none registered'})")
    print(", ".join(f"{n} ops by {name}" for name in sorted(set(used.values())) if (n := [*used.values()].count(name))))


def work_bandwidth(folder: Path, device: str, sizes: list[int]) -> None:
    """Bytes per second of copying, reading and writing buffers of ``sizes`` bytes; a copy counts both ways."""
    rows, where = [], torch.device(device)
    for size in sizes:
        operations = _transfers(size, device)
        for name, (moved, operation) in operations.items():
            seconds(operation, where, WARM_UP)
            median = statistics.median(seconds(operation, where, REPEATS // READINGS) for _ in range(READINGS))
            rows.append({"operation": name, "bytes": size, "bytes_per_second": moved / median, "seconds": median})
            print(f"{name:<6} {size / 2**20:8.0f} MiB  {moved / median / 1e9:8.1f} GB/s")
        del operations, operation
    record = results.environment(where)
    units = {"bytes_per_second": "B/s", "seconds": "s"}
    results.save(folder / "bandwidth", record, {"repeats": REPEATS}, rows, ("operation", "bytes"), units)
    best = max(row["bytes_per_second"] for row in rows if row["operation"] == "copy")
    print(f"copy bandwidth {best / 1e9:.0f} GB/s")


def _transfers(size: int, device: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """For each kind of transfer, the bytes that it moves and the transfer."""
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))
    return {"copy": (2 * size, lambda: y.copy_(x)), "read": (size, x.sum), "write": (size, lambda: y.fill_(1.0))}


def work_agreement(folder: Path) -> None:
    """Memory per sample by CUDA's allocator beside what the CPU's meter says in the repository's results."""
    cpu = {}
    for path in sorted(results.RESULTS.glob("memory_vs_hrnet_cpu_*.json")):
        if "_quick" not in path.name:
            cpu |= {_key(row): row["bytes_per_sample"] for row in json.loads(path.read_text())["rows"]}
    rows = {}
    for path in sorted(folder.parent.glob("memory-*/memory_vs_hrnet_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if _key(row) in cpu:
                rows[_key(row)] = (row["bytes_per_sample"], cpu[_key(row)])
    table = [[*key, f"{a / 2**20:.2f}", f"{b / 2**20:.2f}", f"{a / b:.3f}"] for key, (a, b) in rows.items()]
    header = ["setting", "model", "variant", "px", "dtype", "MiB/sample", "metered on the CPU", "ratio"]
    text = markdown(header, table)
    with results.replacing(folder) as new:
        results.write_csv(new / "agreement.csv", [header, *table])
        (new / "agreement.md").write_text(text)
    print(text)
    near = sum(abs(a / b - 1) <= 0.15 for a, b in rows.values())
    print(f"{near} of {len(rows)} figures within 15 % of the CPU's" if rows else "nothing to compare")


def _key(row: dict[str, Any]) -> tuple:
    return row["setting"], row["model"], row["variant"], row["resolution"], row["dtype"]


WORKERS: dict[str, Callable[..., None]] = {
    "env": work_env,
    "implementations": work_implementations,
    "bandwidth": work_bandwidth,
    "agreement": work_agreement,
    "profile": work_profile,
}
