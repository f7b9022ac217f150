"""Two processes of one group: a test file runs itself as both, and reads what each of them saved."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import revbifpn

WORLD = 2


def run(file: str, out: Path, *arguments: str) -> list[Any]:
    """What :func:`worker` in ``file`` saved, rank by rank.

    Args:
        file: calls :func:`worker` where it is run as a script.
        out: an empty folder.
        arguments: for the function that ``file`` gives to :func:`worker`.
    """
    paths = [str(Path(revbifpn.__file__).parents[1]), os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    processes = [
        subprocess.Popen(
            [sys.executable, file, str(rank), str(out), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        logs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(logs)
    return [torch.load(out / f"{rank}.pt") for rank in range(WORLD)]


def worker(results: Callable[..., Any]) -> None:
    """Save ``results(rank, *arguments)`` of this process, one of a group."""
    rank, out, *arguments = sys.argv[1:]
    distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=int(rank), world_size=WORLD)
    torch.set_num_threads(1)
    torch.save(results(int(rank), *arguments), f"{out}/{rank}.pt")
    distributed.destroy_process_group()
