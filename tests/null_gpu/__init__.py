"""The GPU that does nothing, for the host's side of a step: see README.md.

:func:`build` compiles it, :func:`environment` is what a process needs to see it, and in such a process :func:`counts`
is what it was asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
LIBRARY = "libcuda.so.1"  # the driver's name, for those who open it by name
CACHE = Path(os.environ.get("NULL_GPU_CACHE") or Path(tempfile.gettempdir()) / f"null_gpu-{os.getuid()}")
COUNTS = (
    "launches", "driver_launches", "products", "copies", "fills", "synchronisations", "events", "allocations",
    "graph_launches", "captured",
)  # fmt: skip
# Whose imports are answered by one of our own calls, or by the name of the missing one.
FAMILIES = re.compile(r"(__cuda|cuda[A-Z]|cublas)\w+")
DRIVER_CALL = re.compile(r"\b(cu[A-Z]\w+)\(")  # in the source that Triton compiles


class Unavailable(Exception):
    """Why there can be no null GPU here, in a sentence."""


def _torch() -> Path:
    import torch

    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is built without CUDA")
    return Path(torch.__file__).parent


def _headers(torch: Path) -> Path:
    """The folder of cuda.h and cuda_runtime_api.h: of the toolkit, or of NVIDIA's wheels that torch brings."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if shutil.which("nvcc"):
        homes.insert(1, Path(shutil.which("nvcc")).parents[1])
    folders = [Path(home, "include") for home in homes if home]
    folders += [*(torch.parent / "nvidia").glob("*/include"), *torch.parent.glob("triton/backends/nvidia/include")]
    for folder in folders:
        if (folder / "cuda.h").exists() and (folder / "cuda_runtime_api.h").exists():
            return folder
    raise Unavailable("no cuda_runtime_api.h was found; install the CUDA toolkit and set CUDA_HOME to it")


def _symbols(*options: str) -> set[str]:
    lines = subprocess.run(["nm", "-D", *options], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip() and not line.endswith(":")}


def _digest(paths: list[Path], *more: str) -> str:
    content = repr(more).encode() + b"".join(path.read_bytes() for path in sorted(paths))
    return hashlib.sha256(content).hexdigest()[:16]


def build(cache: Path = CACHE) -> Path:
    """Compile the null GPU for the installed torch, unless ``cache`` has it; the folder of its library."""
    torch = _torch()
    if not sys.platform.startswith("linux") or shutil.which("g++") is None or shutil.which("nm") is None:
        raise Unavailable("the null GPU needs Linux, g++ and nm")
    include, sources = _headers(torch), sorted(FOLDER.glob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", f"-I{include}", f"-Wl,-soname,{LIBRARY}"]
    folder = cache / _digest([*sources, FOLDER / "device.h", torch / "version.py"], *flags)
    if (folder / LIBRARY).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch, LIBRARY)
        known = Path(scratch, "known.so")
        subprocess.run(["g++", *flags, "-o", known, *sources], check=True)
        imported = _symbols("--undefined-only", *map(str, (torch / "lib").glob("lib*cuda*.so")))
        imported = set(filter(FAMILIES.fullmatch, imported))
        for source in torch.parent.glob("triton/backends/nvidia/*.c"):
            imported |= set(DRIVER_CALL.findall(source.read_text()))
        unknown = sorted(imported - _symbols("--defined-only", str(known)))
        missing = Path(scratch, "missing.cpp")
        lines = [f'extern "C" void {name}() {{ null_gpu_unknown("{name}"); }}\n' for name in unknown]
        missing.write_text('extern "C" void null_gpu_unknown(const char*);\n' + "".join(lines))
        subprocess.run(["g++", *flags, "-o", library, *sources, missing], check=True)
        library.rename(folder / LIBRARY)
    return folder


def build_kernels(cache: Path = CACHE) -> Path:
    """Compile ``revkernels._C_cuda`` with the shared CUDA runtime, which can be replaced; the module's path."""
    torch = _torch()
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        raise Unavailable("no nvcc was found; install the CUDA toolkit and set CUDA_HOME to it")
    sources = [path for pattern in ("*.h", "cuda/*") for path in (ROOT / "csrc").glob(pattern)]
    folder = cache / ("kernels-" + _digest([*sources, ROOT / "setup.py", torch / "version.py"], sys.version))
    if not list(folder.glob("revkernels/_C_cuda.*.so")):
        environment = os.environ | {"REVKERNELS_CUDART": "shared", "REVKERNELS_REQUIRE": "cuda"}
        environment |= {"TORCH_CUDA_ARCH_LIST": "9.0", "REVKERNELS_DISABLE": "cpp", "CUDA_HOME": _cuda_home()}
        command = [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            folder,
            "--build-temp",
            cache / "objects",
        ]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return next(folder.glob("revkernels/_C_cuda.*.so"))


def _cuda_home() -> str:
    return os.environ.get("CUDA_HOME") or str(Path(shutil.which("nvcc")).parents[1])


def environment(architecture: int = 90, devices: int = 1, *, kernels: bool = True) -> dict[str, str]:
    """The variables of a process that sees null GPUs. ``kernels``: the project's CUDA C++ kernels are built too."""
    folder = build()
    library = folder / LIBRARY
    path = os.environ.get("LD_LIBRARY_PATH")
    variables = {
        "NULL_GPU": str(library),
        "NULL_GPU_ARCH": str(architecture),
        "NULL_GPU_DEVICES": str(devices),
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": f"{folder}:{path}" if path else str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_INTERPRET": "0",
    }
    if kernels:
        variables["NULL_GPU_KERNELS"] = str(build_kernels())
    return variables


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["NULL_GPU"])


def counts(device: int | None = None) -> dict[str, int]:
    """What the null GPU was asked for since the process began: on one device, or on all of them."""
    devices = range(int(os.environ["NULL_GPU_DEVICES"])) if device is None else (device,)
    total = [0] * len(COUNTS)
    for i in devices:
        values = (ctypes.c_int64 * len(COUNTS))()
        _library().null_gpu_counts(i, values)
        total = [a + b for a, b in zip(total, values, strict=True)]
    return dict(zip(COUNTS, total, strict=True))


def kernels() -> dict[str, int]:
    """How often each CUDA C++ kernel was launched since the process began, by its demangled name."""
    found: dict[str, int] = {}
    each = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64)
    _library().null_gpu_kernels(each(lambda name, launches: found.update({name.decode(): launches})))
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True)
    return dict(zip(names.stdout.splitlines(), found.values(), strict=True))


class DriverLaunch(NamedTuple):
    """A launch as the driver was asked for it; ``parameters`` are the bytes of each."""

    kernel: int
    programs: tuple[int, ...]
    threads: tuple[int, ...]
    shared_memory: int
    attributes: int
    stream: int
    device: int
    parameters: tuple[bytes, ...]


@contextmanager
def watched(sizes: Callable[[int], Sequence[int]]) -> Iterator[list[DriverLaunch]]:
    """The launches through the driver while this is open; ``sizes`` are a kernel's parameters', in bytes."""
    found: list[DriverLaunch] = []

    def each(kernel: int, numbers: list[int], stream: int | None, parameters: list[int]) -> None:
        device = ctypes.c_int()
        _library().cuCtxGetDevice(ctypes.byref(device))
        values = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes(kernel)))
        grid, block = tuple(numbers[:3]), tuple(numbers[3:6])
        found.append(DriverLaunch(kernel, grid, block, numbers[6], numbers[7], stream or 0, device.value, values))

    pointer = ctypes.POINTER
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, pointer(ctypes.c_uint), ctypes.c_void_p, pointer(ctypes.c_void_p))
    watcher = kind(each)
    _library().null_gpu_watch(watcher)
    try:
        yield found
    finally:
        _library().null_gpu_watch(kind())


def parameter_sizes(cubin: bytes, kernel: str) -> list[int]:
    """Bytes of each parameter of a compiled kernel: what the driver copies, by ``.nv.info`` of the ELF file."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    sizes = {}
    for name, _, _, _, begin, length in headers:
        at = headers[names][4] + name
        if cubin[at : cubin.index(b"\0", at)] != f".nv.info.{kernel}".encode():
            continue
        end = begin + length
        while begin < end:
            form, attribute, value = struct.unpack_from("<BBH", cubin, begin)
            if (form, attribute) == (4, 0x17):  # a parameter: its number, where it is, and how long
                _, number, _, bits = struct.unpack_from("<IHHI", cubin, begin + 4)
                sizes[number] = bits >> 18
            begin += 4 + (value if form == 4 else 0)
    return [sizes[i] for i in range(len(sizes))]


class Kernels:
    """Finds ``revkernels._C_cuda`` where :func:`build_kernels` left it, rather than beside the package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "revkernels._C_cuda":
            return importlib.util.spec_from_file_location(name, os.environ["NULL_GPU_KERNELS"])
        return None
