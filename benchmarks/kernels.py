"""Time, bandwidth and speed-up of every op on the network's own shapes: each implementation against PyTorch's own ops.

    python benchmarks/kernels.py                               S0, S3 and S6 on this machine
    python benchmarks/kernels.py --quick                       the two heaviest shapes of each op of S0
    python benchmarks/kernels.py --ops 'depthwise*' --scales s3 --dtype bfloat16

The shapes are not chosen by hand: a training step of ``revbifpn.fast`` runs on fake tensors, and every call of an op is
written down with the shapes, strides and dtypes of its arguments and how often it occurs. Before a case is timed, every
implementation and PyTorch's composition are compared with the reference in float64; a case that disagrees gets no time,
and the exit code is 1. Contestants then take turns; times are medians, ratios medians of the ratios within rounds.

Bytes are those of the arguments and results, each once (``couple_`` reads and writes y): GB/s of a composition that
makes several passes counts the same bytes. Raw numbers go to benchmarks/results as CSV, one line per number.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import revbifpn.fast
from benchmarks import common
from benchmarks.common import Column, UsageError
from revbifpn.configs import CONFIGS
from revkernels import dispatch, reference
from revkernels.registry import OPS
from revkernels.testing import relative_error

PYTORCH = "pytorch"
SCALES = {"s0": 8, "s3": 4, "s6": 2}  # batch of the training step
ROUNDS, QUICK_ROUNDS = 15, 5
SAMPLE_SECONDS = 2e-4  # calls shorter than this are repeated within one reading
ULP = {torch.float32: 2**-23, torch.float64: 2**-52, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LARGEST_INTEGER = 4096  # in an integer argument
ULP |= {torch.int16: 1 / LARGEST_INTEGER}


# Cases --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A tensor argument: what is needed to make another one like it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def make(self, device: torch.device, generator: torch.Generator) -> Tensor:
        span = 1 + sum(s * (n - 1) for s, n in zip(self.stride, self.shape, strict=True)) if self.bytes else 0
        if self.dtype.is_floating_point:
            values = torch.randn(span, generator=generator)
        else:
            values = torch.randint(-LARGEST_INTEGER, LARGEST_INTEGER + 1, (span,), generator=generator)
        return values.to(device, self.dtype).as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Case:
    """One op with one set of arguments, and how often a training step calls it so (0: it is not part of one)."""

    scale: str
    op: str
    arguments: tuple[Any, ...]
    calls: int = field(compare=False)
    twin: int = 1

    @cached_property
    def label(self) -> str:
        """Shape of the first map and what else matters, such as ``8x24x56x56 view k3 s1``."""
        maps = [a for a in _tensors(self.arguments) if len(a.shape) == 4]
        main = maps[0] if maps else _tensors(self.arguments)[0]
        words = ["x".join(map(str, main.shape))]
        dense = torch.empty(main.shape, device="meta").stride()
        words += ["view"] if main.stride != dense else []
        if self.op.startswith("depthwise"):
            scale = self.arguments[3 if self.op.endswith("weight") else 2] if self.op != GRAD_INPUT else None
            kernel = self.arguments[4] if self.op.endswith("weight") else self.arguments[1].shape[-1]
            words += [f"k{kernel} s{self.arguments[-1]}"] + ["+act"] * isinstance(scale, Spec)
        elif self.op.startswith("pointwise"):
            x, y = self.arguments[:2] if self.op.endswith("weight") else self.arguments[1::-1]
            words = ["x".join(map(str, x.shape)) + f" to {y.shape[1]}"]
            words += ["+act"] * isinstance(self.arguments[-3], Spec) + ["gate"] * isinstance(self.arguments[-1], Spec)
        elif self.op in ("couple_", "couple_adjoint"):
            words += ["f" + ",".join(map(str, self.arguments[4 if self.op == "couple_" else 3]))]
            if self.op == "couple_":
                subtract, *fixed_point = (a for a in self.arguments[6:] if a is not None)
                words += ["minus"] * subtract + [f"g{bits}" for bits in fixed_point[:1]]
                words += ["counted"] * (len(fixed_point) == 2)
        elif self.op.startswith("upsample"):
            words += [f"f{self.arguments[1]}"]
        elif self.op in ("bn_act", "bn_act_grad"):
            words += ["gate"] * isinstance(self.arguments[3 if self.op == "bn_act" else 4], Spec)
        dtypes = dict.fromkeys(str(a.dtype).removeprefix("torch.") for a in maps or _tensors(self.arguments))
        words += ["+".join(dtypes)] * (len(dtypes) > 1) + [f"#{self.twin}"] * (self.twin > 1)
        return " ".join(words)

    def make(self, device: torch.device) -> list[Any]:
        """Arguments with random values, the same for the same case."""
        generator = torch.Generator().manual_seed(0)
        made = list(_map(self.arguments, Spec, lambda spec: spec.make(device, generator)))
        if self.op == "bn_fold":
            made[1].abs_()  # a variance
        return made


GRAD_INPUT = "depthwise_conv_grad_input"


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, kind, change) for v in value)
    return value


def _tensors(value: Any) -> list[Any]:
    """All tensors (or their specs) within nested lists."""
    if isinstance(value, (Tensor, Spec)):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


class Recorder(TorchDispatchMode):
    """Counts the calls of registered ops by their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[Any, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func.namespace == "revkernels":
            specs = _map(args, Tensor, lambda t: Spec(t.dtype, tuple(t.shape), tuple(t.stride())))
            self.calls[func.name().split("::")[1], _hashable(specs)] += 1
        return func(*args, **(kwargs or {}))


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def cases(scale: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Every call in a training step of ``revbifpn.fast`` at its native resolution, and the ops that none makes.

    With a 16-bit ``dtype`` the same calls with maps in it, the streams, their gradients and the weights in float32.
    """
    config = CONFIGS[f"revbifpn_{scale}"]
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = getattr(revbifpn.fast, config.arch)().train()
        images = torch.empty(SCALES[scale], 3, config.resolution, config.resolution)
        with recorder:
            model(images).sum().backward()
    found = [Case(scale, op, _narrowed(op, args, dtype), calls) for (op, args), calls in recorder.calls.items()]
    found += dict.fromkeys(_public_ops(found))
    order = list(OPS)
    found.sort(key=lambda c: (order.index(c.op), -sum(s.bytes for s in _tensors(c.arguments))))
    # What a label leaves out (the strides of a view, which vectors are there) tells cases of one label apart.
    seen: Counter[tuple[str, str]] = Counter()
    for i, case in enumerate(found):
        seen[case.op, case.label] += 1
        found[i] = replace(case, twin=seen[case.op, case.label])
    return found


FLOAT32 = {  # the argument that is kept so
    "couple_": 0,
    "couple_adjoint": 0,
    "depthwise_conv": 1,
    "depthwise_conv_grad_input": 1,
    "pointwise_conv_": 2,
}


def _narrowed(op: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def narrow(spec: Spec) -> Spec:
        return replace(spec, dtype=dtype) if len(spec.shape) == 4 else spec

    kept = FLOAT32.get(op)
    return tuple(a if i == kept else _map(a, Spec, narrow) for i, a in enumerate(arguments))


def _public_ops(found: Sequence[Case]) -> Iterator[Case]:
    """Ops that a fused step replaces, or that undo the stem, on the shapes they would have in it."""

    def dense(like: Spec, shape: Sequence[int]) -> Spec:
        return Spec(like.dtype, tuple(shape), torch.empty(tuple(shape), device="meta").stride())

    for case in found:
        if case.op == "couple_":
            _, maps, _, _, factors, mode, *_ = case.arguments
            for p, f in zip(maps, factors, strict=True):
                n, c, h, w = p.shape
                if f > 1:
                    yield Case(case.scale, "upsample", (p, f, mode), 0)
                    yield Case(case.scale, "upsample_adjoint", (dense(p, (n, c, h * f, w * f)), f, mode), 0)
        if case.op == "space_to_depth":
            x, planes, block = case.arguments
            n, c, h, w = x.shape
            y = dense(x, (n, planes * block * block, h // block, w // block))
            yield Case(case.scale, "depth_to_space", (y, c, block), 0)
            yield Case(case.scale, "space_to_depth_adjoint", (y, c, block), 0)


# PyTorch's own ops --------------------------------------------------------------------------------


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift`` per channel, as the BatchNorm that it comes from."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return F.batch_norm(x, zeros, ones, scale, shift, False, 0.0, 0.0)


def _activated(x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str = "hardswish") -> Tensor:
    if scale is None:
        return x
    u = _affine(x, scale, shift)
    return F.hardswish(u) if act == "hardswish" else u


def _interpolate(x: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))


def _interpolate_backward(dy: Tensor, factor: int, mode: str) -> Tensor:
    if factor == 1:
        return dy
    n, c, h, w = dy.shape
    size = [n, c, h // factor, w // factor]
    if mode == "nearest":
        return torch.ops.aten.upsample_nearest2d_backward(dy, [h, w], size, None, None)
    return torch.ops.aten.upsample_bilinear2d_backward(dy, [h, w], size, False, None, None)


def _couple_(y, p, scale, shift, factors, mode, subtract, fraction_bits=None, overflow=None):  # noqa: ANN001, ANN202
    total = y if fraction_bits is None else torch.zeros_like(y, dtype=reference.accumulate_dtype(y.dtype))
    for p_k, a_k, b_k, f_k in zip(p, scale, shift, factors, strict=True):
        if a_k is not None and b_k is not None:
            p_k = torch.addcmul(b_k[..., None, None].to(p_k.dtype), p_k, a_k[..., None, None].to(p_k.dtype))
        elif a_k is not None or b_k is not None:
            p_k = p_k * a_k[..., None, None] if b_k is None else p_k + b_k[..., None, None]
        term = _interpolate(p_k, f_k, mode)
        total.sub_(term) if subtract else total.add_(term)
    if fraction_bits is None:
        return
    q = torch.round(total.mul_(2.0**fraction_bits))
    if y.dtype == torch.int16:
        exact = y + q.to(torch.int32)
        outside = y.copy_(exact) != exact
    else:
        digits = 53 if y.dtype == torch.float64 else 24
        outside = y.add_(q, alpha=2.0**-fraction_bits).abs() >= 2.0 ** (digits - fraction_bits)
    if overflow is not None:
        overflow += outside.sum()


def _couple_adjoint(dy, p, center, factors, mode):  # noqa: ANN001, ANN202
    dus, sums = [], []
    acc = reference.accumulate_dtype(dy.dtype)
    for p_k, m_k, f_k in zip(p, center, factors, strict=True):
        du = _interpolate_backward(dy, f_k, mode)
        dus.append(dy.new_empty(0) if f_k == 1 else du)
        if p_k is None:
            sums.append(dy.new_empty(0, dtype=acc))
            continue
        centered = p_k if m_k is None else p_k - m_k[:, None, None].to(p_k.dtype)
        sums.append(torch.stack([du.sum((2, 3), dtype=acc), (du * centered).sum((2, 3), dtype=acc)]))
    return dus, sums


def _convolution_backward(x: Tensor, dy: Tensor, weight: Tensor, stride: int, mask: list[bool]) -> tuple[Tensor, ...]:
    pad, c = (weight.shape[-1] - 1) // 2, weight.shape[0]
    backward = torch.ops.aten.convolution_backward
    return backward(dy, x, weight.to(x.dtype), None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], c, mask)


def _depthwise_conv(x, weight, scale, shift, stride):  # noqa: ANN001, ANN202
    weight = weight.to(x.dtype)
    return F.conv2d(_activated(x, scale, shift), weight, None, stride, (weight.shape[-1] - 1) // 2, 1, x.shape[1])


def _depthwise_conv_grad_input(dy, weight, height, width, stride):  # noqa: ANN001, ANN202
    x = dy.new_empty((1,)).expand(*dy.shape[:2], height, width)  # only its shape is read
    return _convolution_backward(x, dy, weight, stride, [True, False, False])[0]


def _depthwise_conv_grad_weight(x, dy, scale, shift, kernel, stride):  # noqa: ANN001, ANN202
    weight = x.new_empty((x.shape[1], 1, kernel, kernel))
    dw = _convolution_backward(_activated(x, scale, shift), dy, weight, stride, [False, True, False])[1]
    return dw.to(reference.accumulate_dtype(x.dtype))


def _bn_act(x, scale, shift, gate, act="hardswish"):  # noqa: ANN001, ANN202
    z = _activated(x, scale, shift, act)
    return z if gate is None else z * gate[..., None, None].to(z.dtype)


def _convolve_(y, x, weight, *prologue):  # noqa: ANN001, ANN202
    y.copy_(F.conv2d(_bn_act(x, *prologue).to(y.dtype), weight.to(y.dtype)))


def _multiply_(y, x, weight, *prologue):  # noqa: ANN001, ANN202
    weight = weight.flatten(1).to(y.dtype).expand(len(x), -1, -1)
    torch.bmm(weight, _bn_act(x, *prologue).to(y.dtype).flatten(2), out=y.flatten(2))


def _convolution_grad_weight(x, dy, *prologue):  # noqa: ANN001, ANN202
    weight, mask = dy.new_empty(dy.shape[1], x.shape[1], 1, 1), [False, True, False]
    backward, z = torch.ops.aten.convolution_backward, _bn_act(x, *prologue).to(dy.dtype)
    dw = backward(dy, z, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)[1]
    return dw.to(reference.accumulate_dtype(x.dtype))


def _product_grad_weight(x, dy, *prologue):  # noqa: ANN001, ANN202
    z, acc = _bn_act(x, *prologue).to(dy.dtype).flatten(2).transpose(1, 2), reference.accumulate_dtype(x.dtype)
    if acc == dy.dtype and dy.is_cpu:
        return dy.new_zeros(dy.shape[1], x.shape[1]).addbmm_(dy.flatten(2), z)[..., None, None]
    return torch.bmm(dy.flatten(2), z).sum(0, dtype=acc)[..., None, None]


def _faster(*runs: Callable) -> Callable:
    """Whichever of several ways to compute one thing was the fastest on the first call with arguments of a shape."""
    chosen: dict[Any, Callable] = {}

    def seconds(run: Callable, arguments: Sequence[Any]) -> float:
        run(*arguments)
        device = _tensors(arguments)[0].device
        return min(_reading(lambda: run(*arguments), 3, device) for _ in range(3))

    def call(*arguments: Any) -> Any:
        key = _hashable(_map(arguments, Tensor, lambda t: (t.device, t.dtype, t.shape, t.stride())))
        if key not in chosen:
            spare = _map(arguments, Tensor, torch.clone)
            chosen[key] = min(runs, key=lambda run: seconds(run, spare))
        return chosen[key](*arguments)

    return call


def _bn_stats(x):  # noqa: ANN001, ANN202
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # five times faster than var_mean there
        zeros = x.new_zeros(x.shape[1])
        return torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.1)
    if x.is_cuda:
        mean, rstd = torch.batch_norm_stats(x, 0.0)
        return mean, rstd.square().reciprocal()
    var, mean = torch.var_mean(x.to(reference.accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, var


def _bn_act_squeeze(x, scale, shift, act):  # noqa: ANN001, ANN202
    return _activated(x, scale, shift, act).mean((2, 3), dtype=reference.accumulate_dtype(x.dtype))


def _slope(g: Tensor, u: Tensor, act: str) -> Tensor:
    return torch.ops.aten.hardswish_backward(g, u) if act == "hardswish" else g


def _bn_act_grad_sums(dz, x, scale, shift, mean, act):  # noqa: ANN001, ANN202
    u = _affine(x, scale, shift)
    g, slope, centered = _slope(dz, u, act), _slope(torch.ones_like(u), u, act), x - mean[:, None, None].to(x.dtype)
    z = F.hardswish(u) if act == "hardswish" else u
    acc = reference.accumulate_dtype(x.dtype)
    return torch.stack([t.sum((2, 3), dtype=acc) for t in (dz * z, g, g * centered, slope, slope * centered)])


def _bn_act_grad(dz, x, scale, shift, gate, dpool, slope, offset, act):  # noqa: ANN001, ANN202
    def vector(v: Tensor) -> Tensor:
        return v[..., None, None].to(x.dtype)

    g = dz if gate is None else dz * vector(gate)
    g = g if dpool is None else g + vector(dpool)
    dx = _slope(g, _affine(x, scale, shift), act) * vector(scale)
    if slope is not None and offset is not None:
        return dx + torch.addcmul(vector(offset), x, vector(slope))
    dx = dx if slope is None else torch.addcmul(dx, x, vector(slope))
    return dx if offset is None else dx + vector(offset)


# Where the reference already is the shortest way to say it in PyTorch, it is the rival too.
COMPOSITIONS: dict[str, Callable] = {
    **{op: getattr(reference, op) for op in OPS},
    "upsample": _interpolate,
    "upsample_adjoint": _interpolate_backward,
    "couple_": _couple_,
    "couple_adjoint": _couple_adjoint,
    "depthwise_conv": _depthwise_conv,
    "depthwise_conv_grad_input": _depthwise_conv_grad_input,
    "depthwise_conv_grad_weight": _depthwise_conv_grad_weight,
    "pointwise_conv_": _faster(_multiply_, _convolve_),
    "pointwise_conv_grad_weight": _faster(_product_grad_weight, _convolution_grad_weight),
    "bn_stats": _bn_stats,
    "bn_act": _bn_act,
    "bn_act_squeeze": _bn_act_squeeze,
    "bn_act_grad_sums": _bn_act_grad_sums,
    "bn_act_grad": _bn_act_grad,
}


def contestants(op: str, device: torch.device) -> dict[str, Callable]:
    """PyTorch's composition and every compiled implementation of ``op`` that runs on ``device``."""
    names = [n for n in dispatch.IMPLEMENTATIONS if n != "reference" and dispatch.can_run(op, n, device)]
    names = [n for n in names if not (n == "triton" and device.type == "cpu")]  # the interpreter is not a speed
    return {PYTORCH: COMPOSITIONS[op], **{n: dispatch.implementation(op, n, device) for n in names}}


# Correctness gate ---------------------------------------------------------------------------------


def _outcome(run: Callable, arguments: list[Any]) -> list[Tensor]:
    """What a call computes: its results, or what became of y."""
    arguments = [a.clone() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(arguments)]
    results = run(*arguments)
    return _tensors([arguments[0]] if results is None else results)


def disagreement(case: Case, runs: dict[str, Callable], device: torch.device) -> str:
    """Who is further from the reference in float64 than rounding explains; empty when nobody is."""
    arguments = case.make(device)
    wide = _map(arguments, Tensor, lambda t: t.double() if t.is_floating_point() else t)
    want = _outcome(getattr(reference, case.op), wide)
    is_fixed_point = case.op == "couple_" and len(arguments) > 7 and arguments[7] is not None
    step = 2.0 ** -arguments[7] if is_fixed_point else 0.0
    errors = {}
    for name, run in runs.items():
        got = _outcome(run, arguments)
        errors[name] = [(relative_error(a, b), max(ULP[a.dtype], step)) for a, b in zip(got, want, strict=True)]
    coarsest = max(step, *(ULP[t.dtype] for t in _tensors(arguments) if t.dtype in ULP))
    for name, pairs in errors.items():
        for k, (error, ulp) in enumerate(pairs):
            # Sums of many terms of either sign lose digits to cancellation, PyTorch's as much as ours.
            allowed = 2 * errors[PYTORCH][k][0] + (16 if name != PYTORCH else 4096) * max(ulp, 2**-23)
            if name == PYTORCH:
                allowed = 4096 * coarsest
            if not error <= allowed:
                return f"{name} is {error:.1e} from the reference, {allowed:.1e} allowed"
    return ""


# Timing -------------------------------------------------------------------------------------------


def _reading(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; they take turns."""
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = min(200, max(1, round(SAMPLE_SECONDS / max(_reading(call, 1, device), 1e-7))))
    return {
        name: list(values)
        for name, values in zip(
            calls,
            zip(*([_reading(calls[n], repeats[n], device) for n in calls] for _ in range(rounds)), strict=True),
            strict=True,
        )
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    x = torch.empty(1 << (25 if device.type == "cpu" else 28), device=device)
    y = torch.empty_like(x)
    seconds = measure({"copy": lambda: y.copy_(x)}, 7, device)["copy"]
    return 2 * x.numel() * x.element_size() / statistics.median(seconds)


@dataclass
class Row:
    """One contestant in one case."""

    scale: str
    op: str
    case: str
    dtype: str
    implementation: str
    calls: int
    bytes: int
    seconds: float | None = None  # median
    seconds_p20: float | None = None
    seconds_p80: float | None = None
    bytes_per_second: float | None = None
    copy_share: float | None = None
    speedup: float | None = None  # time of PyTorch's composition over this one's, paired
    note: str = ""


ROW_KEYS = ("scale", "op", "case", "dtype", "implementation")
UNITS = {
    "calls": "1",
    "bytes": "B",
    "seconds": "s",
    "seconds_p20": "s",
    "seconds_p80": "s",
    "bytes_per_second": "B/s",
    "copy_share": "1",
    "speedup": "1",
}


def bench(case: Case, dtype: str, rounds: int, device: torch.device, copy: float) -> list[Row]:
    """The rows of one case; without times where somebody disagrees with the reference."""
    runs = contestants(case.op, device)
    arguments = case.make(device)
    moved = sum(t.numel() * t.element_size() for t in _tensors([arguments, _outcome(runs[PYTORCH], arguments)]))
    rows = {n: Row(case.scale, case.op, case.label, dtype, n, case.calls, moved) for n in runs}
    red = disagreement(case, runs, device)
    if red:
        for row in rows.values():
            row.note = red
        return list(rows.values())
    calls = {name: (lambda run=run: run(*arguments)) for name, run in runs.items()}
    times = measure(calls, rounds, device)
    for name, row in rows.items():
        p20, row.seconds, p80 = (_quantile(times[name], q) for q in (0.2, 0.5, 0.8))
        row.seconds_p20, row.seconds_p80 = p20, p80
        row.bytes_per_second = moved / row.seconds
        row.copy_share = row.bytes_per_second / copy
        row.speedup = statistics.median(a / b for a, b in zip(times[PYTORCH], times[name], strict=True))
    return list(rows.values())


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


# Command ------------------------------------------------------------------------------------------


def select(found: Sequence[Case], patterns: Sequence[str], quick: bool) -> list[Case]:
    """Those whose op matches a pattern; quick: the two of each op that move most bytes in a step."""
    unknown = [p for p in patterns if not any(fnmatchcase(op, p) for op in OPS)]
    if unknown:
        raise UsageError(f"--ops: {unknown[0]!r} matches no op; choose from {', '.join(OPS)}")
    found = [c for c in found if any(fnmatchcase(c.op, p) for p in patterns)]
    if not quick:
        return found
    kept: list[Case] = []
    for op in dict.fromkeys(c.op for c in found):
        weight = {c: max(c.calls, 1) * sum(s.bytes for s in _tensors(c.arguments)) for c in found if c.op == op}
        kept += sorted(weight, key=weight.get, reverse=True)[:2]
    return kept


COLUMNS = (
    Column("op", number=False),
    Column("arguments", number=False),
    Column("calls"),
    Column("implementation", number=False),
    Column("us"),
    Column("p20-p80"),
    Column("GB/s"),
    Column("of copy"),
    Column("speed-up"),
)


def _cells(row: Row) -> list[str]:
    start = [row.op, row.case, str(row.calls or "-"), row.implementation]
    if row.seconds is None:
        return [*start, "wrong", "", "", "", ""]
    spread = f"{row.seconds_p20 * 1e6:.0f}-{row.seconds_p80 * 1e6:.0f}"
    speedup = "" if row.implementation == PYTORCH else f"{row.speedup:.2f}x"
    rate = [f"{row.bytes_per_second / 1e9:.1f}", f"{row.copy_share:.0%}"]
    return [*start, f"{row.seconds * 1e6:.1f}", spread, *rate, speedup]


def _totals(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Per op and implementation, the time of all its calls in a step."""
    for op in dict.fromkeys(row.op for row in rows):
        timed = [r for r in rows if r.op == op and r.seconds is not None and r.calls > 0]
        total = {n: sum(r.calls * r.seconds for r in timed if r.implementation == n) for n in _names(timed)}
        for name, seconds in total.items():
            speedup = "" if name == PYTORCH else f"{total[PYTORCH] / seconds:.2f}x"
            calls = sum(r.calls for r in timed if r.implementation == name)
            yield [op, "all calls of a step", str(calls), name, f"{seconds * 1e6:.0f}", "", "", "", speedup]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.implementation for row in rows))


def report(scale: str, rows: Sequence[Row], quick: bool, caption: str) -> None:
    groups = [[_cells(r) for r in rows if r.op == op] for op in dict.fromkeys(r.op for r in rows)]
    if not quick:
        groups.append(list(_totals(rows)))
    common.print_table(f"{scale.upper()}, batch {SCALES[scale]}, {rows[0].dtype}", COLUMNS, groups, caption)


def _parser() -> common.ArgumentParser:
    parser = common.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="*", help="comma list of ops or wildcards: couple_, 'depthwise*'")
    parser.add_argument("--scales", help=f"comma list of {', '.join(SCALES)} (default all; with --quick s0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=tuple(common.DTYPES), default="float32", help="of the maps; streams stay float32"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default PyTorch's choice); 1 on a shared machine")
    parser.add_argument("--rounds", type=int, help=f"turns that everybody takes (default {ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="the two heaviest shapes of each op, few rounds")
    parser.add_argument("--output", default=str(common.RESULTS), help="directory for the CSV")
    return parser


def parse(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    arguments.scales = (arguments.scales or ("s0" if arguments.quick else ",".join(SCALES))).lower().split(",")
    unknown = [s for s in arguments.scales if s not in SCALES]
    if unknown:
        raise UsageError(f"--scales: {unknown[0]!r} is unknown; choose from {', '.join(SCALES)}")
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected at least 1, got {value}")
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = common.pick_device(arguments.device)
    output = common.pick_output(arguments.output)
    if device.type == "cpu":
        dispatch.can_run("couple_", "cpp", device, raise_error=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    environment = common.environment(device)
    copy = copy_bandwidth(device)
    caption = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, "
    caption += f"copy {copy / 1e9:.1f} GB/s"
    everything: list[Row] = []
    for scale in arguments.scales:
        found = select(cases(scale, device, common.DTYPES[arguments.dtype]), arguments.ops.split(","), arguments.quick)
        rows: list[Row] = []
        for case in common.track(found, lambda c: f"{c.op} {c.label}", scale):
            rows += bench(case, arguments.dtype, arguments.rounds, device, copy)
        if rows:
            report(scale, rows, arguments.quick, caption)
        everything += rows
    name = f"kernels_{device.type}_{'-'.join(arguments.scales)}_{arguments.dtype}" + "_quick" * arguments.quick
    records = [vars(row) for row in everything]
    common.write_long_csv(output / f"{name}.csv", environment, records, ROW_KEYS, UNITS)
    print(f"wrote {output / name}.csv")
    wrong = {f"{row.op} {row.case}: {row.note}" for row in everything if row.note}
    if wrong:
        print("\n".join(["disagreements, not timed:", *sorted(wrong)]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(common.run(main))
