"""Runs of ``examples/train_*.py``, each a process that a server forks off: what they import is imported once."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.harness.preloaded"])


def load(name: str) -> ModuleType:
    """A script of ``examples`` as a module, loaded once."""
    key = f"examples.{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def _life(name: str, argv: Sequence[str], log: str, environment: Mapping[str, str], before: Callable | None) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv = [str(ROOT / "examples" / f"{name}.py"), *argv]
    script = load(name)
    from revbifpn.training.run import entry

    if before is not None:
        before()
    code = entry(script.main)(list(argv))
    sys.stdout.flush()
    os._exit(code)


class Life:
    """A run that is going on.

    Args:
        name: of the script.
        argv: its command line.
        log: a file for what it prints.
        environment: variables beside those of this process.
        before: called in the process before the script is; at the top level of a module.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[object],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.log, self.began = log, time.perf_counter()
        words = [str(word) for word in argv]
        arguments = (name, words, str(log), dict(environment or {}), before)
        self.process: BaseProcess = _context.Process(target=_life, args=arguments)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def signal(self, number: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 500) -> int:
        """The exit code, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.signal()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def group(
    name: str,
    argv: Sequence[object],
    folder: Path,
    *,
    port: int,
    world: int = 2,
    restart: int = 0,
    before: Callable | None = None,
) -> list[Life]:
    """``world`` processes of one group, as torchrun starts them."""
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_RESTART_COUNT": restart}
    common |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    lives = []
    for rank in range(world):
        own = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        lives.append(Life(name, argv, folder / f"rank{rank}.log", environment=own, before=before))
    return lives
