"""Runs recorded kernel calls through an emulated library. Needs no torch, so that a sanitizer can be preloaded.

A call is a dict: ``function``; ``buffers``, uint8 arrays; ``arguments``, each an int, a float, a str, None,
``("pointer", buffer, offset)`` or ``("map", buffer, offset, shape, strides)`` with the offset in bytes and strides in
elements; ``outputs``, the buffers to hand back. As a script: ``replay.py LIBRARY CALLS RESULTS``, pickled lists.
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path

import numpy as np


class Map(ctypes.Structure):
    """``revkernels::cuda::Map``."""

    _fields_ = [("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4)]


class EmulationError(RuntimeError):
    """What the emulation found wrong with a kernel."""


def load(path: Path) -> ctypes.CDLL:
    """The emulated library at ``path``."""
    return ctypes.CDLL(str(path))


def run(library: ctypes.CDLL, call: dict, *, reverse: bool) -> list[np.ndarray]:
    """Run one call on fresh copies of its buffers, threads in order or in reverse; the output buffers."""
    buffers = []
    for data in call["buffers"]:
        buffer = np.empty(len(data), np.uint8)  # of exactly this size: a sanitizer sees both ends
        buffer[:] = data
        buffers.append(buffer)

    def convert(argument: object) -> object:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, int):
            return ctypes.c_int64(argument)
        if isinstance(argument, float):
            return ctypes.c_double(argument)
        if isinstance(argument, str):
            return ctypes.c_char_p(argument.encode())
        address = buffers[argument[1]].ctypes.data + argument[2]
        if argument[0] == "pointer":
            return ctypes.c_void_p(address)
        return ctypes.byref(Map(address, tuple(argument[3]), tuple(argument[4])))

    function = getattr(library, call["function"])
    function.restype = ctypes.c_char_p
    error = function(ctypes.c_int64(reverse), *map(convert, call["arguments"]))
    if error is not None:
        raise EmulationError(error.decode())
    return [buffers[i] for i in call["outputs"]]


def main() -> None:
    library_path, calls_path, results_path = map(Path, sys.argv[1:])
    library = load(library_path)
    calls = pickle.loads(calls_path.read_bytes())
    results = [[run(library, call, reverse=reverse) for call in calls] for reverse in (False, True)]
    results_path.write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
