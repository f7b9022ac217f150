"""What the GPU suite runs: commands, each part's in a process and a folder of its own."""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.results import ROOT

LIMIT = 170.0  # seconds: what a part may take unless it says otherwise, just under three minutes
BUDGETS = ("0.25", "0.5", "0.75")  # of the activations that torch.compile may keep
PROFILED = {"s0": (64, 224), "s3": (64, 288), "s6": (16, 352)}  # batch and resolution of the profiles


@dataclass(frozen=True)
class Machine:
    """What is measured: ``device`` is ``"cuda"``, or ``"cpu"`` in a dry run."""

    device: str
    name: str
    capability: str = ""  # as in TORCH_CUDA_ARCH_LIST

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other in a folder of their own; ``{folder}`` in an argument is that folder.

    ``skip`` says why the part cannot run here. The last line that the commands print is the part's headline.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    timeout: float = LIMIT
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""

    @property
    def group(self) -> str:
        return self.name.split("-")[0]


def all_parts(machine: Machine) -> list[Part]:
    """All parts, in the order in which they run."""
    groups = (_build, _tests, _sanitizers, _bandwidth, _kernels, _memory, _throughput, _host, _profiles)
    found = [part for group in groups for part in group(machine)]
    return [Part("env", (_worker("env"),)), *found]


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "benchmarks" / script), *arguments)


def _worker(name: str, **settings: Any) -> tuple[str, ...]:
    return _python("gpu_suite.py", "--worker", name, json.dumps(settings), "{folder}")


def _pytest(*arguments: str) -> tuple[str, ...]:
    options = ("-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "--junitxml={folder}/junit.xml")
    return (sys.executable, "-m", "pytest", *options, *arguments)


def _environment(machine: Machine) -> dict[str, str]:
    """Falling back to the reference is an error on a GPU; a dry run's tiny maps are not worth a second thread."""
    return {"OMP_NUM_THREADS": "1"} if machine.dry else {"REVKERNELS_REQUIRE": "cpp,cuda,triton"}


def _build(machine: Machine) -> Iterator[Part]:
    where = ("--inplace",)
    environment = {"REVKERNELS_REQUIRE": "cpp,cuda", "TORCH_CUDA_ARCH_LIST": machine.capability}
    environment["MAX_JOBS"] = str(os.cpu_count())
    if machine.dry:
        where = ("--build-lib={folder}/lib", "--build-temp={folder}/build")
        environment = {"REVKERNELS_DISABLE": "cuda", "MAX_JOBS": "2"}
    command = (sys.executable, "setup.py", "build_ext", *where)
    yield Part("build", (command, _worker("implementations", device=machine.device)), environment=environment)


def _tests(machine: Machine) -> Iterator[Part]:
    environment = _environment(machine) | {"REVBIFPN_TEST_DEVICE": machine.device}
    gpu = str(ROOT / "tests" / "test_gpu.py")
    # A dry run leaves out what takes a CPU minutes: the published values in float64.
    model = ("-k", "TestModel and not published") if machine.dry else ("-k", "TestModel")
    yield Part("tests-ops", (_pytest(gpu, "-k", "TestOps"),), environment=environment)
    yield Part("tests-model", (_pytest(gpu, *model),), environment=environment)
    others = [path for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if "in DEVICES" in path.read_text()]
    select = ("-k", "cpp-cpu and not any_factors") if machine.dry else ("-k", "cuda")
    yield Part("tests-kernels", (_pytest(*map(str, others), *select),), environment=environment)


def _find_sanitizer() -> str | None:
    found = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    return shutil.which("compute-sanitizer") or (found[0] if found else None)


def _sanitizers(machine: Machine) -> Iterator[Part]:
    """Small maps in a layout with gaps; without the caching allocator, beyond a tensor is beyond its block."""
    tool = _find_sanitizer()
    skip = "needs a GPU" if machine.dry else "" if tool else "compute-sanitizer was not found"
    tests = _pytest(
        str(ROOT / "tests" / "test_gpu.py"), "-k", "equals_the_reference and half and (float32 or bfloat16)"
    )
    environment = _environment(machine) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = (tool or "compute-sanitizer", f"--tool={check}", "--error-exitcode=86", *tests)
        yield Part(f"sanitize-{check}", (command,), environment=environment, skip=skip)


def _bandwidth(machine: Machine) -> Iterator[Part]:
    sizes = [1 << 22] if machine.dry else [1 << 26, 1 << 28, 1 << 30, 1 << 32]
    yield Part("bandwidth", (_worker("bandwidth", device=machine.device, sizes=sizes),))


def _kernels(machine: Machine) -> Iterator[Part]:
    quick = ("--quick",) if machine.dry else ()
    for scale in ("s0",) if machine.dry else ("s0", "s3", "s6"):
        for dtype in ("float32",) if machine.dry else ("float32", "bfloat16"):
            options = ("--scales", scale, "--dtype", dtype, "--device", machine.device, *quick, "--output", "{folder}")
            yield Part(
                f"kernels-{scale}-{dtype}", (_python("kernels.py", *options),), environment=_environment(machine)
            )


def _memory(machine: Machine) -> Iterator[Part]:
    def part(name: str, models: str, dtype: str, *more: str) -> Part:
        options = ("--device", machine.device, "--models", models, "--dtype", dtype, *more, "--output", "{folder}")
        return Part(f"memory-{name}", (_python("memory_vs_hrnet.py", *options),), environment=_environment(machine))

    if machine.dry:
        yield part("quick", "revbifpn_s0/fast", "float32", "--quick", "--resolution", "64", "--fake")
    else:
        yield part("revbifpn", "revbifpn_*", "float32")
        yield part("hrnet", "revbifpn_*/fast,hrnet_*", "float32")
        yield part("efficientnet", "revbifpn_*/fast,tf_*", "float32")
        yield part("bfloat16", "revbifpn_*,hrnet_*", "bfloat16")
    yield Part("memory-agreement", (_worker("agreement"),))


def _throughput(machine: Machine) -> Iterator[Part]:
    def part(name: str, models: str, batch: str, resolution: int, dtype: str, *more: str) -> Part:
        options = ("--device", machine.device, "--models", models, "--batch", batch, "--dtype", dtype)
        command = _python("throughput.py", *options, "--resolution", str(resolution), *more, "--output", "{folder}")
        return Part(f"throughput-{name}", (command,), environment=_environment(machine))

    if machine.dry:
        more = ("--quick", "--rounds", "2", "--reduce-overhead", "--offload", "--defaults")
        yield part("quick", "revbifpn_s0/fast,revbifpn_s0/stored", "2", 64, "float32", *more)
        return
    sizes = {"s0": ("8,256", 224, "15"), "s3": ("8,64", 288, "9"), "s6": ("8,32", 352, "5")}
    for dtype in ("float32", "bfloat16"):
        for scale, (batches, resolution, rounds) in sizes.items():
            arch, name, size = f"revbifpn_{scale}", f"{scale}-{dtype}", (batches, resolution, dtype, "--rounds", rounds)
            yield part(name, f"{arch}/fast,{arch}/reversible,{arch}/stored", *size)
            streams = "fixed32,fixed16" if dtype == "float32" else "float32,fixed16"  # and the default
            yield part(f"{name}-streams", f"{arch}/fast", *size, "--streams", streams)
            yield part(f"{name}-graph", f"{arch}/fast,{arch}/stored", *size, "--graph")
            yield part(f"{name}-checkpointed", f"{arch}/fast,{arch}/checkpointed", *size)
            yield part(f"{name}-compiled", f"{arch}/fast,{arch}/compiled", *size)
            beside = f"{arch}/fast,{arch}/stored"
            yield part(f"{name}-offloaded", beside, *size, "--offload")
            if dtype == "float32":
                yield part(f"{name}-defaults", beside, *size, "--defaults")
            large = (batches.split(",")[-1], *size[1:])  # each batch is compiled anew
            yield part(f"{name}-reduce-overhead", beside, *large, "--reduce-overhead")
            for budget in BUDGETS:
                yield part(f"{name}-budget{budget}", beside, *large, "--budgets", budget)
        rivals = "revbifpn_s[03]/fast,hrnet_w18/[sc]*ed,tf_efficientnet_b0/[sc]*ed,tf_efficientnetv2_s/[sc]*ed"
        yield part(f"rivals-{dtype}", rivals, "64", 224, dtype, "--rounds", "9")
    yield part("s0-tf32", "revbifpn_s0/*", "256", 224, "float32", "--rounds", "15", "--tf32")


def _host(machine: Machine) -> Iterator[Part]:
    skip = "needs a GPU: python -m tests.null_gpu benchmarks/host.py has one that does nothing" if machine.dry else ""
    for name, models in {"s0": "revbifpn_s0", "s3": "revbifpn_s3", "s6": "revbifpn_s6", "hrnet": "hrnet_w18"}.items():
        command = _python("host.py", "--models", models, "--output", "{folder}")
        yield Part(f"host-{name}", (command,), environment=_environment(machine), skip=skip)


def _profiles(machine: Machine) -> Iterator[Part]:
    for scale in ("s0",) if machine.dry else ("s0", "s6"):
        batch, resolution = (2, 64) if machine.dry else PROFILED[scale]
        settings = {"device": machine.device, "scale": scale, "batch": batch, "resolution": resolution}
        dtypes = ["float32"] if machine.dry else ["float32", "bfloat16"]
        yield Part(
            f"profile-{scale}", (_worker("profile", **settings, dtypes=dtypes),), environment=_environment(machine)
        )
