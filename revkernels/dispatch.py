"""Loads the native modules once, and answers which implementations exist and why the others do not.

======================  ==========================  =====================================================
implementation          registered for              where
======================  ==========================  =====================================================
``reference``           every device                :mod:`revkernels.reference`
``cpp``                 CPU                         ``csrc/cpu``, module ``revkernels._C``
``cuda``                CUDA                        ``csrc/cuda``, module ``revkernels._C_cuda``
``triton``              CUDA                        :mod:`revkernels.triton`
======================  ==========================  =====================================================

Environment variables, read once at import:

``REVKERNELS_REQUIRE``
    Comma-separated implementations that must load; a missing one is an ImportError that says why.
``REVKERNELS_DISABLE``
    Comma-separated implementations that are not loaded, to compare or to debug.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from revkernels import reference
from revkernels.damage import REBUILD, why_not_loaded
from revkernels.registry import LIBRARY, NAMESPACE, OPS

IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton")


@dataclass(frozen=True)
class Status:
    """Whether an implementation is in use, why not, its module if so, and the ops for which that has a kernel."""

    name: str
    loaded: bool
    reason: str = ""
    module: ModuleType | None = None
    ops: frozenset[str] = frozenset()


def _listed(variable: str) -> set[str]:
    names = {name.strip() for name in os.environ.get(variable, "").split(",")} - {""}
    unknown = names - set(IMPLEMENTATIONS)
    if unknown:
        raise ValueError(f"{variable}: unknown implementation {sorted(unknown)}; choose from {IMPLEMENTATIONS}")
    return names


def _registered(device: str) -> frozenset[str]:
    """The ops for which PyTorch's dispatcher has a kernel of this device's own, as opposed to the reference."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in OPS if has_kernel(f"{NAMESPACE}::{op}", device))


def left_out() -> dict[str, str]:
    """What the installation did not build, and why: implementation to reason."""
    record = Path(__file__).with_name("_skipped.json")  # written by setup.py
    return json.loads(record.read_text()) if record.exists() else {}


def _why_not_built(name: str, module: str) -> str:
    others = [path.name for path in Path(__file__).parent.glob(f"{module}.*.so")]
    if others:
        return f"{others[0]} is for another Python than {sys.implementation.cache_tag}; {REBUILD}"
    reason = left_out().get(name)
    if reason is None and (installed := hidden_installation()):
        return f"this source tree hides the package that is installed in {installed}: start Python in another folder"
    reason = reason or "this is a source tree, which `pip install -e .` builds in"
    return f"revkernels.{module} was not built: {reason}"


def hidden_installation() -> Path | None:
    """Where a later folder of ``sys.path`` has this package with native modules, while this is the one imported.

    ``python -m``, ``python -c`` and an interactive Python put the working directory first: in a checkout they import
    its sources rather than what was installed from them.
    """
    here = Path(__file__).parent
    for folder in sys.path:
        other = Path(folder, here.name)
        if any(other.glob("_C*.so")) and not other.samefile(here):
            return other
    return None


def _has_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is here; PyTorch is not asked, as that would initialise it."""
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))


def _load_native(name: str, module: str, device: str, why_not: str) -> Status:
    if why_not:
        return Status(name, False, why_not)
    spec = importlib.util.find_spec(f"revkernels.{module}")
    origin = spec and spec.origin
    reason = why_not_loaded(Path(origin)) if origin else _why_not_built(name, module)
    if reason:
        return Status(name, False, reason)
    before = _registered(device)
    try:
        loaded = importlib.import_module(f"revkernels.{module}")
        return Status(name, True, module=loaded, ops=_registered(device) - before)
    except ImportError as error:
        return Status(name, False, f"revkernels.{module} does not load: {error}")


def _load_triton(why_not: str, native: ModuleType | None) -> Status:
    if why_not:
        return Status("triton", False, why_not)
    try:
        module = importlib.import_module("revkernels.triton")
    except ImportError as error:
        return Status("triton", False, f"triton does not import: {error}")
    if native is not None and not module.INTERPRETED:
        module.register_native(native)
    for op in module.LAUNCHERS.keys() - _registered("CUDA"):
        LIBRARY.impl(op, module.LAUNCHERS[op], "CUDA")
    return Status("triton", True, module=module, ops=frozenset(module.LAUNCHERS))


def _load() -> dict[str, Status]:
    required, disabled = _listed("REVKERNELS_REQUIRE"), _listed("REVKERNELS_DISABLE")

    def why_not(name: str, needs_cuda: bool) -> str:
        if name in disabled:
            return "disabled by REVKERNELS_DISABLE"
        if needs_cuda and torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        return ""

    statuses = {
        "reference": Status("reference", True, module=reference),
        "cpp": _load_native("cpp", "_C", "CPU", why_not("cpp", needs_cuda=False)),
        "cuda": _load_native("cuda", "_C_cuda", "CUDA", why_not("cuda", needs_cuda=True)),
    }
    statuses["triton"] = _load_triton(why_not("triton", needs_cuda=False), statuses["cuda"].module)
    for name in sorted(required):
        if not statuses[name].loaded:
            raise ImportError(f"REVKERNELS_REQUIRE asks for {name!r}: {statuses[name].reason}")
    wanted = {"cpp": "C++", "cuda": "CUDA"} if torch.version.cuda and _has_gpu() else {"cpp": "C++"}
    for name, kernels in wanted.items():
        if not statuses[name].loaded and name not in disabled:
            warnings.warn(f"revkernels runs without its {kernels} kernels: {statuses[name].reason}", stacklevel=3)
    return statuses


STATUS: dict[str, Status] = _load()


def can_run(op: str, implementation: str, device: torch.device, *, raise_error: bool = False) -> bool:
    """Whether ``op`` can run as ``implementation`` on tensors of ``device``.

    Args:
        op: name of a registered op, such as ``"couple_"``.
        implementation: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.
        device: where the tensors are.
        raise_error: raise with the reason instead of returning False.

    Raises:
        ValueError: unknown op or implementation.
        RuntimeError: it cannot run, and ``raise_error`` is set.
    """
    reason = why_not(op, implementation, device)
    if reason and raise_error:
        raise RuntimeError(f"{op} cannot run as {implementation!r} on {device}: {reason}")
    return not reason


def why_not(op: str, implementation: str, device: torch.device) -> str:
    """The reason why ``op`` cannot run as ``implementation`` on ``device``; empty when it can."""
    if op not in OPS:
        raise ValueError(f"op: {op!r} is not registered; choose from {sorted(OPS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r} is unknown; choose from {IMPLEMENTATIONS}")
    status = STATUS[implementation]
    if status.module is None:
        return status.reason
    if implementation == "reference":
        return ""
    if op not in status.ops:
        return f"{op} has no {implementation} kernel"
    if implementation == "triton" and device.type == "cpu" and status.module.INTERPRETED:
        return ""
    wanted = "cpu" if implementation == "cpp" else "cuda"
    if device.type != wanted:
        return f"it runs on {wanted} tensors only"
    if implementation == "cuda" and torch.cuda.is_available():
        return why_no_code(status.module.build_info()["architectures"], torch.cuda.get_device_capability(device))
    return ""


def why_no_code(architectures: str, capability: tuple[int, int]) -> str:
    """Why kernels built for ``architectures`` ("8.0;9.0+PTX") do not run on a GPU of this capability; empty if they do.

    Machine code runs on its own major version, from its minor version on; PTX is compiled for anything newer.
    """
    for major, minor, ptx in re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", architectures):
        built = (int(major), int(minor))
        if (ptx and built <= capability) or (built[0] == capability[0] and built[1] <= capability[1]):
            return ""
    version = ".".join(map(str, capability))
    return (
        f"revkernels._C_cuda has no code for a GPU of capability {version}; it was built for {architectures}: "
        f"build it again with TORCH_CUDA_ARCH_LIST={version}"
    )


def implementation(op: str, name: str, device: torch.device) -> Callable:
    """The callable that runs ``op`` as the implementation asked for by name; see :func:`can_run` for what is raised."""
    can_run(op, name, device, raise_error=True)
    if name == "reference":
        return OPS[op].reference
    module = STATUS[name].module
    return module.LAUNCHERS[op] if name == "triton" and module else OPS[op].overload


def in_use(op: str, device_type: str) -> str:
    """The name of the implementation that the dispatcher takes for ``op`` on ``device_type``."""
    names = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}.get(device_type, ())
    return next((name for name in names if op in STATUS[name].ops), "reference")
