"""Everything there is to run on a machine with a GPU: build, tests, kernel and model benchmarks, profiles.

    python benchmarks/gpu_suite.py                            every part, results in benchmarks/results/gpu-<device>
    python benchmarks/gpu_suite.py --parts build,tests        some groups of parts; names and wildcards do too
    python benchmarks/gpu_suite.py --dry-run                  every part on the CPU with tiny sizes

Needs no network. Each part runs in a process of its own with a time-out, and has a folder for its log, its result and
its files. A part that has passed is not run again unless --force; one that fails stops none of the others. The exit
code is the number of parts that failed or ran out of time. See docs/gpu.md.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import glob
import importlib.util
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import ROOT, Column, UsageError

LIMIT = 170.0  # seconds: what a part may take unless it says otherwise, just under three minutes
SHORTEST = 20.0  # seconds: with less of the budget left, no part is started
PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "passed", "failed", "timed out", "skipped", "not run"

SCALES = {"s0": (64, 224), "s3": (64, 288), "s6": (16, 352)}  # batch and resolution of the profiles


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


@dataclass
class Result:
    """What became of a part."""

    part: str
    status: str
    seconds: float = 0.0
    returncode: int | None = None
    headline: str = ""
    device: str = ""
    date: str = ""
    commands: list[str] = field(default_factory=list)


# Parts ----------------------------------------------------------------------------------------------


def parts(machine: Machine) -> list[Part]:
    """All parts, in the order in which they run."""
    groups = (_build, _tests, _sanitizers, _bandwidth, _kernels, _memory, _throughput, _profiles)
    found = [part for group in groups for part in group(machine)]
    return [Part("env", (_worker("env"),)), *found]


def _python(script: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "benchmarks" / script), *arguments)


def _worker(name: str, **settings: Any) -> tuple[str, ...]:
    return _python("gpu_suite.py", "--worker", name, json.dumps(settings), "{folder}")


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/junit.xml", *arguments)


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
        yield part("quick", "revbifpn_s0/fast,revbifpn_s0/stored", "2", 64, "float32", "--quick", "--rounds", "2")
        return
    sizes = {"s0": ("8,256", 224, "15"), "s3": ("8,64", 288, "9"), "s6": ("8,32", 352, "5")}
    for dtype in ("float32", "bfloat16"):
        for scale, (batches, resolution, rounds) in sizes.items():
            arch, size = f"revbifpn_{scale}", (batches, resolution, dtype, "--rounds", rounds)
            yield part(f"{scale}-{dtype}", f"{arch}/fast,{arch}/reversible,{arch}/stored", *size)
            streams = "fixed32,fixed16" if dtype == "float32" else "float32,fixed16"  # and the default
            yield part(f"{scale}-{dtype}-streams", f"{arch}/fast", *size, "--streams", streams)
            yield part(f"{scale}-{dtype}-graph", f"{arch}/fast,{arch}/stored", *size, "--graph")
            yield part(f"{scale}-{dtype}-checkpointed", f"{arch}/fast,{arch}/checkpointed", *size)
            yield part(f"{scale}-{dtype}-compiled", f"{arch}/fast,{arch}/compiled", *size)
        rivals = "revbifpn_s[03]/fast,hrnet_w18/[sc]*ed,tf_efficientnet_b0/[sc]*ed,tf_efficientnetv2_s/[sc]*ed"
        yield part(f"rivals-{dtype}", rivals, "64", 224, dtype, "--rounds", "9")
    yield part("s0-tf32", "revbifpn_s0/*", "256", 224, "float32", "--rounds", "15", "--tf32")


def _profiles(machine: Machine) -> Iterator[Part]:
    for scale in ("s0",) if machine.dry else ("s0", "s6"):
        batch, resolution = (2, 64) if machine.dry else SCALES[scale]
        settings = {"device": machine.device, "scale": scale, "batch": batch, "resolution": resolution}
        dtypes = ["float32"] if machine.dry else ["float32", "bfloat16"]
        yield Part(
            f"profile-{scale}", (_worker("profile", **settings, dtypes=dtypes),), environment=_environment(machine)
        )


# Running --------------------------------------------------------------------------------------------


def run_part(part: Part, machine: Machine, output: Path, limit: float) -> Result:
    """Run a part's commands, ``limit`` seconds at most, and leave ``log.txt`` and ``result.json`` in its folder."""
    folder = output / part.name
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[word.replace("{folder}", str(folder)) for word in command] for command in part.commands]
    result = Result(part.name, SKIPPED if part.skip else PASSED, headline=part.skip, device=machine.name)
    result.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    start = time.monotonic()
    if not part.skip:
        result.commands = [shlex.join(command) for command in commands]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        if machine.device == "cuda":  # the checkout is built in place there, and comes before an installed package
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / "log.txt").open("w") as log:
            for command in commands:
                print(f"$ {shlex.join(command)}", file=log, flush=True)
                result.returncode = _run(command, environment, log, limit - (time.monotonic() - start))
                if result.returncode != 0:
                    result.status = TIMED_OUT if result.returncode is None else FAILED
                    break
        result.headline = _last_line(folder / "log.txt")
    result.seconds = round(time.monotonic() - start, 1)
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def _run(command: Sequence[str], environment: dict[str, str], log: Any, limit: float) -> int | None:
    """The command's exit code; None if it had to be ended, with every process it started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        print(f"cannot be started: {error}", file=log)
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"ended after {limit:.0f} s", file=log)
        return None
    finally:
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # its session is its own: nothing else is in that group
            if process.poll() is not None:
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def _last_line(path: Path) -> str:
    lines = [line.strip(" =") for line in path.read_text(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1][:100] if lines else ""


def earlier(part: Part, output: Path) -> Result | None:
    """The result of a part that has passed before."""
    with suppress(OSError, ValueError, TypeError):
        result = Result(**json.loads((output / part.name / "result.json").read_text()))
        if result.status == PASSED:
            return result
    return None


def run_all(
    chosen: Sequence[Part], machine: Machine, output: Path, *, force: bool, budget: float | None
) -> list[Result]:
    """Run what has not passed yet, and tell about every part; what ``budget`` seconds do not allow is not started."""
    start, results = time.monotonic(), []
    for i, part in enumerate(chosen, 1):
        left = float("inf") if budget is None else budget - (time.monotonic() - start)
        before = None if force else earlier(part, output)
        print(f"[{i}/{len(chosen)}] {part.name}", end=" ", flush=True)
        if before is not None:
            results.append(before)
            print("passed before", flush=True)
            continue
        if left < SHORTEST:
            results.append(Result(part.name, NOT_RUN, headline="no time was left"))
        else:
            results.append(run_part(part, machine, output, min(part.timeout, left)))
        result = results[-1]
        print(f"{result.status} ({result.seconds:.0f} s): {result.headline}", flush=True)
        if result.status in (FAILED, TIMED_OUT):
            tail = (output / part.name / "log.txt").read_text(errors="replace").splitlines()[-12:]
            print(*(f"    {line}" for line in tail), sep="\n", flush=True)
    return results


def show(results: Sequence[Result], machine: Machine, output: Path) -> None:
    """The final table, on stdout and as ``summary.md``."""
    columns = (Column("part", number=False), Column("status", number=False), Column("s"), Column("says", number=False))
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for result in results:
        row = [result.part, result.status, f"{result.seconds:.0f}", result.headline]
        groups[result.part.split("-")[0]].append(row)
    counts = {
        status: sum(r.status == status for r in results) for status in (PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_RUN)
    }
    caption = ", ".join(f"{count} {status}" for status, count in counts.items() if count) + f"; results in {output}"
    print()
    common.print_table(f"GPU suite on {machine.name}", columns, groups.values(), caption)
    rows = [row for group in groups.values() for row in group]
    (output / "summary.md").write_text(_markdown([c.header for c in columns], rows) + f"\n{machine.name}: {caption}\n")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def pack(output: Path, archive: Path) -> None:
    """The results as one ``.tar.gz``, without what a dry run built."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(output.rglob("*")):
            inside = path.relative_to(output)
            if path.is_file() and path.resolve() != archive.resolve() and inside.parts[:2] not in _BUILT:
                tar.add(path, arcname=str(Path(output.name) / inside))


_BUILT = (("build", "lib"), ("build", "build"))


# Workers: what parts run in their own process -------------------------------------------------------


def work_env(folder: Path) -> None:
    """What the machine is: driver, tools, packages, GPU state, and what of this package runs before the build."""
    queries = {
        "nvidia-smi": ["nvidia-smi"],
        "clocks": ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,ECC"],
        "nvcc": ["nvcc", "--version"],
        "processor": ["lscpu"],
        "packages": [sys.executable, "-m", "pip", "list", "--format=freeze"],
        "kernels": [sys.executable, "-m", "revkernels.env"],
    }
    for name, command in queries.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            text = done.stdout + done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"{shlex.join(command)}: {error}\n"
        (folder / f"{name}.txt").write_text(text)
        print(f"--- {name}", text, sep="\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = common.environment(device)
    common.write_json(folder / "environment.json", record, {}, [])
    print(f"{record['device']}, torch {record['torch']}, CUDA {record['cuda']}, commit {record['commit']}")


def work_implementations(folder: Path, device: str) -> None:
    """Report the kernels in use; on a GPU, every op must have one there."""
    from revkernels import env

    report = env.collect()
    print(env.render(report))
    (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    used = {op: by_device[device] for op, by_device in report["ops"].items()}
    missing = [op for op, name in used.items() if name == "reference"]
    if device == "cuda" and missing:
        reasons = [f"{name}: {about['reason']}" for name, about in report["implementations"].items() if about["reason"]]
        raise SystemExit(f"no CUDA kernel for {', '.join(missing)} ({'; '.join(reasons) or 'none registered'})")
    print(", ".join(f"{n} ops by {name}" for name in sorted(set(used.values())) if (n := [*used.values()].count(name))))


def work_bandwidth(folder: Path, device: str, sizes: list[int]) -> None:
    """Bytes per second of copying, reading and writing buffers of ``sizes`` bytes; a copy counts both ways."""
    rows = []
    for size in sizes:
        operations = _transfers(size, device)
        for name, (moved, operation) in operations.items():
            seconds = _seconds(operation, device, repeats=20)
            rate = moved / statistics.median(seconds)
            rows.append(
                {"operation": name, "bytes": size, "bytes_per_second": rate, "seconds": statistics.median(seconds)}
            )
            print(f"{name:<6} {size / 2**20:8.0f} MiB  {rate / 1e9:8.1f} GB/s")
        del operations, operation
    record = common.environment(torch.device(device))
    common.write_json(folder / "bandwidth.json", record, {"repeats": 20}, rows)
    units = {"bytes_per_second": "B/s", "seconds": "s"}
    common.write_long_csv(folder / "bandwidth.csv", record, rows, ("operation", "bytes"), units)
    best = max(row["bytes_per_second"] for row in rows if row["operation"] == "copy")
    print(f"copy bandwidth {best / 1e9:.0f} GB/s")


def _transfers(size: int, device: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """For each kind of transfer, the bytes that it moves and the transfer."""
    x, y = (torch.ones(size // 4, device=device) for _ in range(2))
    return {"copy": (2 * size, lambda: y.copy_(x)), "read": (size, x.sum), "write": (size, lambda: y.fill_(1.0))}


def _seconds(action: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """The duration of each of ``repeats`` calls after two that warm up; by the GPU's own clock on a GPU."""
    for _ in range(2):
        action()
    if device != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def work_agreement(folder: Path) -> None:
    """Memory per sample by CUDA's allocator beside what the CPU's meter says in the repository's results."""
    cpu = {}
    for path in sorted(common.RESULTS.glob("memory_vs_hrnet_cpu_*.json")):
        if "_quick" not in path.name:
            cpu |= {_key(row): row["bytes_per_sample"] for row in json.loads(path.read_text())["rows"]}
    rows = {}
    for path in sorted(folder.parent.glob("memory-*/memory_vs_hrnet_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if _key(row) in cpu:
                rows[_key(row)] = (row["bytes_per_sample"], cpu[_key(row)])
    table = [[*key, f"{a / 2**20:.2f}", f"{b / 2**20:.2f}", f"{a / b:.3f}"] for key, (a, b) in rows.items()]
    header = ["setting", "model", "variant", "px", "dtype", "MiB/sample", "metered on the CPU", "ratio"]
    with (folder / "agreement.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *table])
    text = _markdown(header, table)
    (folder / "agreement.md").write_text(text)
    print(text)
    near = sum(abs(a / b - 1) <= 0.15 for a, b in rows.values())
    print(f"{near} of {len(rows)} figures within 15 % of the CPU's" if rows else "nothing to compare")


def _key(row: dict[str, Any]) -> tuple:
    return row["setting"], row["model"], row["variant"], row["resolution"], row["dtype"]


# Profile --------------------------------------------------------------------------------------------

DEPTHWISE, DEPTHWISE_GRADIENT = "depthwise", "depthwise gradients"
NORM, ACTIVATION, COPY, ELEMENTWISE = "batch norm", "activations", "copies and fills", "elementwise"
PRODUCT, RESAMPLE, REDUCE, OTHER = "dense convolutions and products", "resampling", "reductions", "other"
FUSED_NORM, COUPLING, SQUEEZE = "fused norm and activation", "fused coupling", "fused squeeze-excite"

OURS = (
    ("depthwise_conv_grad", DEPTHWISE_GRADIENT),
    ("depthwise_conv", DEPTHWISE),
    ("couple", COUPLING),
    ("dequantize", COUPLING),
    ("bn_", FUSED_NORM),
    ("se_gate", SQUEEZE),
    ("", RESAMPLE),
)
# Words in an ATen op's name, most telling first.
ATEN = (
    (("batch_norm",), NORM),
    (("hardswish", "hardsigmoid", "relu", "sigmoid"), ACTIVATION),
    (("upsample",), RESAMPLE),
    (("copy_", "clone", "cat", "contiguous", "fill_", "zero_", "repeat", "_to_copy"), COPY),
    (("bmm", "mm", "matmul", "linear"), PRODUCT),
    (("sum", "mean", "pool", "var", "norm"), REDUCE),
    (("add", "mul", "sub", "div", "lerp", "sqrt", "neg", "pow", "where", "softmax", "nll", "bernoulli"), ELEMENTWISE),
)


class Op(NamedTuple):
    """An op under the profiler and its arguments' shapes."""

    name: str
    shapes: Sequence[Sequence[int]] = ()


def category(kernel: str, ops: Sequence[Op]) -> str:
    """What a kernel was launched for: by the innermost of the ops around it that tells."""
    if kernel.startswith(("Memcpy", "Memset")):
        return COPY
    for op in ops:
        space, _, name = op.name.partition("::")
        if space == "revkernels":
            return next(kind for prefix, kind in OURS if name.startswith(prefix))
        if space != "aten":
            continue
        if "conv" in name and "pool" not in name:
            backward = "backward" in name
            weight = op.shapes[1 + backward] if len(op.shapes) > 1 + backward else ()
            if len(weight) == 4 and weight[1] == 1 < weight[0]:
                return DEPTHWISE_GRADIENT if backward else DEPTHWISE
            if weight:
                return PRODUCT
        for words, kind in ATEN:
            if any(word in name for word in words):
                return kind
    return OTHER


class Launch(NamedTuple):
    kernel: str
    ops: tuple[Op, ...]  # innermost first
    microseconds: float


def launches(events: Sequence[Any], device: str) -> Iterator[Launch]:
    """Every kernel in a profile; on a CPU, whose profile has none, every op by its own time."""
    attributed: Counter[str] = Counter()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        kernels = [(k.name, k.duration) for k in event.kernels]
        if device == "cpu" and event.name.startswith(("aten::", "revkernels::")):
            kernels = [(event.name, event.self_cpu_time_total)]
        if kernels:
            ops, outer = [], event
            while outer is not None:
                ops.append(Op(outer.name, outer.input_shapes or ()))
                outer = outer.cpu_parent
            for name, duration in kernels:
                attributed[name] += 1
                yield Launch(name, tuple(ops), duration)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU or getattr(event, "is_user_annotation", False):
            continue
        if attributed[event.name] > 0:
            attributed[event.name] -= 1
        else:
            yield Launch(event.name, (Op("unattributed"),), event.time_range.elapsed_us())


def work_profile(folder: Path, device: str, scale: str, batch: int, resolution: int, dtypes: list[str]) -> None:
    """Kernels of one training step: the plain model stored and reversible, and the fast one."""
    import revbifpn
    import revbifpn.fast

    arch = f"revbifpn_{scale}"
    makers = {
        "stored": lambda: getattr(revbifpn, arch)(reversible=False),
        "reversible": getattr(revbifpn, arch),
        "fast": getattr(revbifpn.fast, arch),
    }
    summary, kernels = [], []
    for dtype in dtypes:
        for variant, make in makers.items():
            row = {"model": arch, "variant": variant, "dtype": dtype, "batch": batch, "resolution": resolution}
            try:
                found, seconds = _profile(make, device, batch, resolution, dtype)
            except torch.cuda.OutOfMemoryError:
                summary.append({**row, "note": "out of memory"})
                continue
            finally:
                if device == "cuda":
                    torch.cuda.empty_cache()
            total = sum(launch.microseconds for launch in found)
            summary.append(
                {**row, "step_seconds": seconds, "busy_seconds": total / 1e6, "launches": len(found), "note": ""}
            )
            by_kind, by_kernel = defaultdict(list), defaultdict(list)
            for launch in found:
                by_kind[category(launch.kernel, launch.ops)].append(launch.microseconds)
                by_kernel[category(launch.kernel, launch.ops), launch.ops[0].name, launch.kernel].append(
                    launch.microseconds
                )
            summary[-1] |= {f"share_{kind}": sum(times) / total for kind, times in by_kind.items()}
            summary[-1] |= {f"launches_{kind}": len(times) for kind, times in by_kind.items()}
            for (kind, op, kernel), times in by_kernel.items():
                numbers = {"launches": len(times), "seconds": sum(times) / 1e6, "share": sum(times) / total}
                kernels.append({**row, "category": kind, "op": op, "kernel": kernel, **numbers})
            print(f"{arch} {variant} {dtype}: {1e3 * seconds:.1f} ms, {len(found)} launches", flush=True)
    _write_profile(folder, device, arch, summary, kernels)


def _profile(
    make: Callable[[], torch.nn.Module], device: str, batch: int, resolution: int, dtype: str
) -> tuple[list[Launch], float]:
    """The kernels of a step, and the seconds that a step takes without a profiler."""
    torch.manual_seed(0)
    with torch.device(device):
        model = make().train()
        images, labels = torch.randn(batch, 3, resolution, resolution), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, common.DTYPES[dtype], enabled=dtype != "float32"):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()

    seconds = statistics.median(_seconds(step, device, repeats=5 if device == "cuda" else 1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return list(launches(profiler.events(), device)), seconds


def _write_profile(folder: Path, device: str, arch: str, summary: list[dict], kernels: list[dict]) -> None:
    record = common.environment(torch.device(device))
    common.write_json(folder / "profile.json", record, {}, summary)
    keys = ("model", "variant", "dtype", "batch", "resolution")
    metrics = [name for row in summary for name in row if name not in (*keys, "note")]
    units = {name: "s" if name.endswith("seconds") else "1" for name in dict.fromkeys(metrics)}
    common.write_long_csv(folder / "profile.csv", record, summary, keys, units)
    kernels.sort(key=lambda row: (row["dtype"], row["variant"], -row["seconds"]))
    with (folder / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(kernels[0]) if kernels else keys)
        writer.writeheader()
        writer.writerows(kernels)

    kinds = sorted({name for row in summary for name in row if name.startswith("share_")})
    kinds.sort(key=lambda name: -max(row.get(name, 0.0) for row in summary))
    header = ["variant", "dtype", "step ms", "kernels ms", "launches", *(k.removeprefix("share_") for k in kinds)]
    table = []
    for row in summary:
        if row["note"]:
            table.append([row["variant"], row["dtype"], row["note"], *[""] * (len(header) - 3)])
            continue
        times = [f"{1e3 * row[name]:.1f}" for name in ("step_seconds", "busy_seconds")]
        shares = [f"{100 * row.get(kind, 0.0):.1f} %" for kind in kinds]
        table.append([row["variant"], row["dtype"], *times, str(row["launches"]), *shares])
    text = _markdown(header, table)
    batch, resolution = summary[0]["batch"], summary[0]["resolution"]
    title = f"# Training step of {arch}, batch {batch}, {resolution} pixels, on {record['device']}\n\n"
    (folder / "profile.md").write_text(title + text)
    print(text)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot_profile([row for row in summary if not row["note"]], kinds, title[2:].strip(), folder / "profile.png")
    fast = next((row for row in summary if row["variant"] == "fast" and not row["note"]), None)
    plain = next((row for row in summary if row["variant"] == "reversible" and not row["note"]), None)
    if fast and plain:
        ratio = plain["step_seconds"] / fast["step_seconds"]
        print(f"{fast['dtype']}: fast {fast['launches']} launches, {ratio:.2f} x reversible's speed")


def _plot_profile(rows: list[dict], kinds: list[str], title: str, path: Path) -> None:
    """A bar per model: the time of its kernels by what they are for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.55 * len(rows)), layout="constrained")
    labels = [f"{row['variant']}, {row['dtype']}" for row in rows]
    left = [0.0] * len(rows)
    for kind, colour in zip(kinds, plt.get_cmap("tab20").colors, strict=False):
        widths = [1e3 * row["busy_seconds"] * row.get(kind, 0.0) for row in rows]
        axis.barh(labels, widths, left=left, color=colour, label=kind.removeprefix("share_"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("time in kernels, ms")
    axis.set_title(title)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


WORKERS: dict[str, Callable[..., None]] = {
    "env": work_env,
    "implementations": work_implementations,
    "bandwidth": work_bandwidth,
    "agreement": work_agreement,
    "profile": work_profile,
}


# Command line ---------------------------------------------------------------------------------------


def find_machine(dry_run: bool) -> Machine:
    """The GPU, asked for in another process: this one must not hold a context while others measure."""
    if dry_run:
        return Machine("cpu", "dry run on the CPU")
    question = (
        "import torch; a = torch.cuda.is_available(); print(torch.cuda.get_device_name() if a else ''); "
        "print('%d.%d' % torch.cuda.get_device_capability() if a else '')"
    )
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    name, capability = (done.stdout.splitlines() + ["", ""])[:2]
    if not name:
        raise UsageError(f"torch {torch.__version__} sees no GPU; --dry-run tries every part on the CPU")
    return Machine("cuda", name, capability)


def select(patterns: Sequence[str], everything: Sequence[Part]) -> list[Part]:
    """The parts whose name or group matches one of the wildcard patterns, in their order."""
    chosen = set()
    for pattern in patterns:
        hits = {p.name for p in everything if fnmatchcase(p.name, pattern) or fnmatchcase(p.group, pattern)}
        if not hits:
            known = sorted({p.name for p in everything} | {p.group for p in everything})
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(known)}"
            raise UsageError(f"--parts: {pattern!r} is unknown; {hint}")
        chosen |= hits
    return [part for part in everything if part.name in chosen]


def _parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--parts", default="*", help="comma list of parts, groups or wildcards: build,tests,kernels-s0*"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their commands, run nothing")
    parser.add_argument("--force", action="store_true", help="run again what has passed before")
    parser.add_argument("--dry-run", action="store_true", help="every part on the CPU, with tiny sizes")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no part, and end those running, after this"
    )
    parser.add_argument("--output", help="folder of the results (default benchmarks/results/gpu-<device>)")
    parser.add_argument("--archive", metavar="FILE", help="pack the folder into this .tar.gz at the end")
    return parser


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    machine = find_machine(arguments.dry_run)
    chosen = select([pattern.strip() for pattern in arguments.parts.split(",")], parts(machine))
    if arguments.list:
        for part in chosen:
            print(part.name, *(f"    {shlex.join(command)}" for command in part.commands), sep="\n")
        return 0
    name = "dry-run" if machine.dry else "-".join(machine.name.lower().split()).removeprefix("nvidia-")
    output = common.pick_output(arguments.output or str(common.RESULTS / f"gpu-{name}")).resolve()
    results = run_all(chosen, machine, output, force=arguments.force, budget=arguments.budget)
    show(results, machine, output)
    if arguments.archive:
        pack(output, Path(arguments.archive))
    return sum(result.status in (FAILED, TIMED_OUT) for result in results)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; returns how many parts failed or ran out of time, or 64 (EX_USAGE) for a usage error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        _, name, settings, folder = argv
        WORKERS[name](Path(folder), **json.loads(settings))
        return 0
    try:
        return _main(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64


if __name__ == "__main__":
    sys.exit(main())
