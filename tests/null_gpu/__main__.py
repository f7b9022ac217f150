"""Runs Python on the GPU that does nothing.

    python -m tests.null_gpu SCRIPT [ARGUMENTS]         or -m MODULE [ARGUMENTS], or -c CODE [ARGUMENTS]
    python -m tests.null_gpu --arch 80 --devices 2 --no-kernels SCRIPT

The first call compiles the library (seconds) and the project's CUDA kernels (minutes; not with --no-kernels: then their
ops run the reference). Both are kept in NULL_GPU_CACHE, by default a folder of the user's in the temporary directory.
"""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import sys
import time

from tests.null_gpu import Kernels, Unavailable, environment


def _execute(script: list[str], module: list[str] | None, code: list[str] | None) -> None:
    """In the process that sees the GPU: what ``python`` would do."""
    import torch

    torch.backends.cudnn.enabled = False  # its library is not replaced
    # A thread of autograd's lets go of Python objects after backward() has returned, and aborts the process if the
    # interpreter has gone by then.
    atexit.register(time.sleep, 0.1)
    if "NULL_GPU_KERNELS" in os.environ:
        sys.meta_path.insert(0, Kernels)
    if code:
        sys.argv = ["-c", *code[1:]]
        exec(compile(code[0], "<string>", "exec"), {"__name__": "__main__"})
    elif module:
        sys.argv = module
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        sys.path[0] = os.path.dirname(os.path.abspath(script[0]))
        sys.path.append(os.getcwd())
        runpy.run_path(script[0], run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.null_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs there are")
    parser.add_argument("--no-kernels", action="store_true", help="without the project's CUDA C++ kernels")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, and its arguments")
    parser.add_argument("-c", dest="code", nargs=argparse.REMAINDER, help="code to run, and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script to run, and its arguments")
    arguments = parser.parse_args()
    command = arguments.script, arguments.module, arguments.code
    if not any(command):
        parser.error("nothing to run; give a script, -m module or -c code")
    if "NULL_GPU" in os.environ:
        return _execute(*command)
    try:
        variables = environment(arguments.arch, arguments.devices, kernels=not arguments.no_kernels)
    except Unavailable as error:
        raise SystemExit(f"error: {error}") from None
    os.execve(sys.executable, [sys.executable, "-m", "tests.null_gpu", *sys.argv[1:]], os.environ | variables)


if __name__ == "__main__":
    main()
