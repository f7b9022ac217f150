"""The command line of a benchmark. Whatever stops one from outside is one line on stderr and an exit code.

====  =======================================================================================
0     done (or what the command returns)
1     results cannot be written (those that were there are kept), or contestants disagree
2     the user can put it right: an option, a missing package, a missing GPU
130   Ctrl-C
141   whoever read the output went away (``| head``); nothing is said
====  =======================================================================================

Anything else that is raised is a fault of the program, and shows its traceback. This file does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class BenchmarkError(Exception):
    """There is no result to show; one line says why."""

    code = 1


class UsageError(BenchmarkError):
    """Something the user can put right."""

    code = 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line and go through :class:`UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def entry(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make ``main(argv)`` a command: a function that returns the exit code, see above."""

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        with _interrupts_raised():
            try:
                code = _returned(main, argv)
                _flush()
                return code
            except BrokenPipeError:
                code, message = PIPE_CLOSED, ""
            except KeyboardInterrupt:
                code, message = INTERRUPTED, "interrupted"
            except BenchmarkError as error:
                code, message = error.code, f"error: {error}"
            except OSError as error:
                where = "" if error.filename is None else f"{error.filename}: "
                code, message = 1, f"error: {where}{error.strerror or error}"
            with suppress(OSError):  # stderr may be what is full or closed
                if message and sys.stderr is not None:
                    print(message, file=sys.stderr, flush=True)
            _discard_output()
            return code

    return command


def _returned(main: Callable, argv: Sequence[str] | None) -> int:
    try:
        return main(argv) or 0
    except SystemExit as done:  # --help
        return done.code or 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _discard_output() -> None:
    """What cannot be written now would be tried, and complained about, once more when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def quiet_interrupts() -> None:
    """Until the command starts and after it ends, Ctrl-C ends the process with one line: importing takes seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    quiet = signal.getsignal(signal.SIGINT) is _leave
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if quiet:
            signal.signal(signal.SIGINT, _leave)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it never see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Arguments ----------------------------------------------------------------------------------------------


def select(flag: str, patterns: str, items: Sequence[Item], names: Callable[[Item], Sequence[str]]) -> list[Item]:
    """The items, in their order, of which a name matches one of the wildcard ``patterns`` with commas between.

    Raises:
        UsageError: a pattern matches nothing; names with a slash are suggested for a pattern with a slash only.
    """
    wanted = split(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for item in items for name in names(item)):
            known = sorted({name for item in items for name in names(item) if "/" in pattern or "/" not in name})
            close = difflib.get_close_matches(pattern, known, n=4, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(known)}"
            raise UsageError(f"{flag}: {pattern!r} is unknown; {hint}")
    return [item for item in items if any(fnmatchcase(name, pattern) for name in names(item) for pattern in wanted)]


def some_of(flag: str, text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between, each one of ``known``."""
    names = split(text)
    for name in names:
        if name not in known:
            raise UsageError(f"{flag}: {name!r} is unknown; choose from {', '.join(known)}")
    return names


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def numbers(flag: str, text: str) -> list[int]:
    """Positive whole numbers with commas between, in order, each once."""
    parts = split(text)
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{flag}: got {text!r}, needs positive numbers with commas between")
    return sorted({int(part) for part in parts})


def fractions(flag: str, text: str) -> list[float]:
    """Numbers from 0 to 1 with commas between."""
    with suppress(ValueError):
        found = [float(part) for part in split(text)]
        if all(0 <= fraction <= 1 for fraction in found):
            return found
    raise UsageError(f"{flag}: got {text!r}, needs numbers from 0 to 1 with commas between")


def at_least_one(**options: int | None) -> None:
    """Each number that was given is at least 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name}: got {value}, needs at least 1")


def check_resolution(pixels: int) -> None:
    if pixels < 32 or pixels % 32:
        raise UsageError(f"--resolution: got {pixels}, RevBiFPN needs a positive multiple of 32")


def require(module: str, package: str = "") -> ModuleType:
    """Import an optional dependency, or say in one line how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        how = f"pip install {package}" if package else f"pip install '.[bench]' (or pip install {module})"
        raise UsageError(f"{package or module} is not installed: {how}") from None


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; ``cuda`` without one is a :class:`UsageError`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda} but sees no GPU" if torch.version.cuda else "is a CPU build"
        raise UsageError(f"--device cuda: torch {torch.__version__} {built}; use --device cpu")
    return torch.device(name)


def pick_output(path: str) -> Path:
    """A directory that can be written to, made if need be."""
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output {path}: cannot write there ({error.strerror})") from None
    return directory
