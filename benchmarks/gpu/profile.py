"""Kernels of a training step, each by what it was launched for."""

from __future__ import annotations

import importlib.util
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import networks, plots, results
from benchmarks.harness.networks import FAST, REVERSIBLE, STORED
from benchmarks.harness.terminal import markdown
from benchmarks.harness.timing import seconds

DEPTHWISE, DEPTHWISE_GRADIENT = "depthwise", "depthwise gradients"
NORM, ACTIVATION, COPY, ELEMENTWISE = "batch norm", "activations", "copies and fills", "elementwise"
PRODUCT, RESAMPLE, REDUCE, OTHER = "dense convolutions and products", "resampling", "reductions", "other"
FUSED_NORM, COUPLING, SQUEEZE = "fused norm and activation", "fused coupling", "fused squeeze-excite"

OWN_OPS = (
    ("depthwise_conv_grad", DEPTHWISE_GRADIENT),
    ("depthwise_conv", DEPTHWISE),
    ("couple", COUPLING),
    ("dequantize", COUPLING),
    ("bn_", FUSED_NORM),
    ("se_gate", SQUEEZE),
    ("", RESAMPLE),
)
# Words in an ATen op's name, most telling first.
ATEN_OPS = (
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
            return next(kind for prefix, kind in OWN_OPS if name.startswith(prefix))
        if space != "aten":
            continue
        if "conv" in name and "pool" not in name:
            backward = "backward" in name
            weight = op.shapes[1 + backward] if len(op.shapes) > 1 + backward else ()
            if len(weight) == 4 and weight[1] == 1 < weight[0]:
                return DEPTHWISE_GRADIENT if backward else DEPTHWISE
            if weight:
                return PRODUCT
        for words, kind in ATEN_OPS:
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
    arch = f"revbifpn_{scale}"
    makers = {n.variant: n.make for n in networks.catalogue() if n.name == arch}
    summary, kernels = [], []
    for dtype in dtypes:
        for variant in (STORED, REVERSIBLE, FAST):
            row = {"model": arch, "variant": variant, "dtype": dtype, "batch": batch, "resolution": resolution}
            try:
                found, seconds = _profile(makers[variant], device, batch, resolution, dtype)
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
        with torch.autocast(device, networks.DTYPES[dtype], enabled=dtype != "float32"):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()

    seconds = _median_seconds(step, torch.device(device))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return list(launches(profiler.events(), device)), seconds


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    for _ in range(2):
        step()
    return statistics.median(seconds(step, device) for _ in range(5 if device.type == "cuda" else 1))


def _write_profile(folder: Path, device: str, arch: str, summary: list[dict], kernels: list[dict]) -> None:
    record = results.environment(torch.device(device))
    keys = ("model", "variant", "dtype", "batch", "resolution")
    metrics = [name for row in summary for name in row if name not in (*keys, "note")]
    units = {name: "s" if name.endswith("seconds") else "1" for name in dict.fromkeys(metrics)}
    kernels.sort(key=lambda row: (row["dtype"], row["variant"], -row["seconds"]))
    kinds = sorted({name for row in summary for name in row if name.startswith("share_")})
    kinds.sort(key=lambda name: -max(row.get(name, 0.0) for row in summary))
    text = _table(summary, kinds)
    batch, resolution = summary[0]["batch"], summary[0]["resolution"]
    title = f"Training step of {arch}, batch {batch}, {resolution} pixels, on {record['device']}"
    with results.replacing(folder) as new:
        results.write_json(new / "profile.json", record, {}, summary)
        results.write_long_csv(new / "profile.csv", record, summary, keys, units)
        header = list(kernels[0]) if kernels else keys
        results.write_csv(new / "kernels.csv", [header, *(row.values() for row in kernels)])
        (new / "profile.md").write_text(f"# {title}\n\n{text}")
        if importlib.util.find_spec("matplotlib") is not None:
            plots.shares([row for row in summary if not row["note"]], kinds, title, new / "profile.png")
    print(text)
    fast, plain = (
        next((row for row in summary if row["variant"] == variant and not row["note"]), None)
        for variant in (FAST, REVERSIBLE)
    )
    if fast and plain:
        ratio = plain["step_seconds"] / fast["step_seconds"]
        print(f"{fast['dtype']}: fast {fast['launches']} launches, {ratio:.2f} x reversible's speed")


def _table(summary: list[dict], kinds: list[str]) -> str:
    header = ["variant", "dtype", "step ms", "kernels ms", "launches", *(k.removeprefix("share_") for k in kinds)]
    table = []
    for row in summary:
        if row["note"]:
            table.append([row["variant"], row["dtype"], row["note"], *[""] * (len(header) - 3)])
            continue
        times = [f"{1e3 * row[name]:.1f}" for name in ("step_seconds", "busy_seconds")]
        shares = [f"{100 * row.get(kind, 0.0):.1f} %" for kind in kinds]
        table.append([row["variant"], row["dtype"], *times, str(row["launches"]), *shares])
    return markdown(header, table)
