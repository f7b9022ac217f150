"""What is installed and which kernels run: ``python -m revkernels.env``, with ``--json`` for machines.

Meant for bug reports, and to see whether the source tree or the installed package is the one that runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import revkernels
from revkernels import dispatch
from revkernels.registry import OPS

DEVICE_TYPES = ("cpu", "cuda")


def collect() -> dict[str, Any]:
    """Everything that the report says, as plain values.

    Returns:
        ``package``, ``versions`` and ``devices`` (name to text), ``environment`` (the variables that are set),
        ``implementations`` (name to ``loaded``, ``reason`` and the module's ``build``), ``left_out`` (what the
        installation did not build, and why) and ``ops`` (op to device type to the implementation in use).
    """
    return {
        "package": {"version": revkernels.__version__, "path": str(Path(revkernels.__file__).parent)},
        "versions": _versions(),
        "devices": _devices(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _is_ours(name)},
        "implementations": {name: _implementation(status) for name, status in dispatch.STATUS.items()},
        "left_out": dispatch.left_out(),
        "ops": {op: {device: dispatch.in_use(op, device) for device in DEVICE_TYPES} for op in OPS},
    }


def _is_ours(variable: str) -> bool:
    return variable.startswith(("REVKERNELS_", "TRITON_")) or variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _versions() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "CUDA of torch": torch.version.cuda or "none",
        "cuDNN of torch": str(torch.backends.cudnn.version() or "none"),
        "nvcc": _nvcc(),
    }


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return "not found"
    release = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return f"{release[1] if release else 'unknown version'} ({nvcc})"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
    return devices


def _implementation(status: dispatch.Status) -> dict[str, Any]:
    build_info = getattr(status.module, "build_info", None)
    return {"loaded": status.loaded, "reason": status.reason, "build": dict(build_info()) if build_info else {}}


def render(report: dict[str, Any]) -> str:
    """The report of :func:`collect` as aligned text."""
    package = report["package"]
    implementations = report["implementations"].items()
    states = {
        name: "loaded" if about["loaded"] else f"NOT loaded: {about['reason']}" for name, about in implementations
    }
    sections = {f"revbifpn-fast {package['version']}": {"loaded from": package["path"]}}
    sections |= {title: report[title] for title in ("versions", "devices", "environment")}
    sections |= {"implementations": states, "not built when this package was installed": report["left_out"]}
    sections |= {f"{name}, as built": about["build"] for name, about in implementations}
    uses = {op: "".join(f"{used:<11}" for used in by_device.values()) for op, by_device in report["ops"].items()}
    sections["implementation in use"] = {"op": "".join(f"{device:<11}" for device in DEVICE_TYPES)} | uses
    return "\n\n".join(_section(title, rows) for title, rows in sections.items() if rows)


def _section(title: str, rows: dict[str, Any]) -> str:
    width = max(map(len, rows))
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in rows.items()}
    return "\n".join([title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in texts.items())])


def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m revkernels.env", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args(argv).json else render(report))


if __name__ == "__main__":
    main()
