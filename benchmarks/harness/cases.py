"""Every call of an op in a training step, recorded on fake tensors with its shapes, strides and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import revbifpn.fast
from revbifpn.configs import CONFIGS
from revkernels import reference, reference_mbconv
from revkernels.registry import OPS

BATCHES = {"s0": 8, "s3": 4, "s6": 2}  # of the training step, by scale
LARGEST_INTEGER = 4096  # in an integer argument
GRAD_INPUT = "depthwise_conv_grad_input"


@dataclass(frozen=True)
class Spec:
    """A tensor argument: what is needed to make another one like it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def shell(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

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
        maps = [a for a in tensors(self.arguments) if len(a.shape) == 4]
        main = maps[0] if maps else tensors(self.arguments)[0]
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
        elif self.op.startswith("mbconv"):
            named = named_arguments(self.op, self.arguments)
            depthwise, project = named["depthwise"].shape, named["project"].shape
            words += [f"by {depthwise[0]} to {project[0]} k{depthwise[-1]} s{named['stride']}"]
            words += ["se"] * isinstance(named["squeeze"], Spec)
        elif self.op.startswith("upsample"):
            words += [f"f{self.arguments[1]}"]
        elif self.op in ("bn_act", "bn_act_grad"):
            words += ["gate"] * isinstance(self.arguments[3 if self.op == "bn_act" else 4], Spec)
        dtypes = dict.fromkeys(str(a.dtype).removeprefix("torch.") for a in maps or tensors(self.arguments))
        words += ["+".join(dtypes)] * (len(dtypes) > 1) + [f"#{self.twin}"] * (self.twin > 1)
        return " ".join(words)

    def make(self, device: torch.device) -> list[Any]:
        """Arguments with random values, the same for the same case."""
        generator = torch.Generator().manual_seed(0)
        made = list(map_nested(self.arguments, Spec, lambda spec: spec.make(device, generator)))
        if self.op == "bn_fold":
            made[1].abs_()  # a variance
        return made


def map_nested(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_nested(v, kind, change) for v in value)
    return value


def tensors(value: Any) -> list[Any]:
    """All tensors (or their specs) within nested lists."""
    if isinstance(value, (Tensor, Spec)):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


class Recorder(TorchDispatchMode):
    """Counts the calls of registered ops by their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[Any, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "revkernels":
            specs = map_nested(args, Tensor, lambda t: Spec(t.dtype, tuple(t.shape), tuple(t.stride())))
            self.calls[func.name().split("::")[1], hashable(specs)] += 1
        return func(*args, **(kwargs or {}))


def hashable(value: Any) -> Any:
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


def named_arguments(op: str, arguments: Sequence[Any]) -> dict[str, Any]:
    return {a.name: value for a, value in zip(OPS[op].overload._schema.arguments, arguments, strict=True)}


@contextmanager
def passes_by(passes: Any) -> Iterator[None]:
    """The ops of an MBConv are compositions of ``passes``, which has an attribute for each op."""
    before = reference_mbconv.ref
    reference_mbconv.ref = passes
    try:
        yield
    finally:
        reference_mbconv.ref = before


class _RecordedPasses:
    """The reference's passes; ``calls`` counts them by their arguments."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, tuple[Any, ...]]] = Counter()

    def __getattr__(self, op: str) -> Callable:
        run = getattr(reference, op)

        def call(*arguments: Any) -> Any:
            specs = map_nested(arguments, Tensor, lambda t: Spec(t.dtype, tuple(t.shape), tuple(t.stride())))
            self.calls[op, hashable(specs)] += 1
            return run(*arguments)

        return call


def _passes(case: Case) -> Iterator[Case]:
    """The ops that an MBConv's op is composed of, as its reference calls them for the whole batch."""
    recorded = _RecordedPasses()
    with passes_by(recorded):
        OPS[case.op].reference(*map_nested(case.arguments, Spec, Spec.shell))
    for (op, arguments), calls in recorded.calls.items():
        yield Case(case.scale, op, arguments, calls * case.calls)


def cases(scale: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Case]:
    """Every call in a training step of ``revbifpn.fast`` at its native resolution, and the ops that none makes.

    An MBConv is one op, and so are the passes that it is composed of: both are there.
    With a 16-bit ``dtype`` the same calls with maps in it, the streams, their gradients and the weights in float32.
    """
    config = CONFIGS[f"revbifpn_{scale}"]
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = getattr(revbifpn.fast, config.arch)().train()
        images = torch.empty(BATCHES[scale], 3, config.resolution, config.resolution)
        with recorder:
            model(images).sum().backward()
    called = [Case(scale, op, _narrowed(op, args, dtype), calls) for (op, args), calls in recorder.calls.items()]
    called += [each for case in called if case.op.startswith("mbconv") for each in _passes(case)]
    total: Counter[Case] = Counter()
    for case in called:
        total[case] += case.calls
    found = [replace(case, calls=calls) for case, calls in total.items()]
    found += dict.fromkeys(_public_ops(found))
    order = list(OPS)
    found.sort(key=lambda c: (order.index(c.op), -sum(s.bytes for s in tensors(c.arguments))))
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


PLANES = ("p", "d", "e", "dz")  # of an MBConv


def _narrowed(op: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def narrow(spec: Spec) -> Spec:
        return replace(spec, dtype=dtype) if len(spec.shape) == 4 else spec

    if op.startswith("mbconv"):
        named = named_arguments(op, arguments)
        return tuple(map_nested(a, Spec, narrow) if name in PLANES else a for name, a in named.items())
    kept = FLOAT32.get(op)
    return tuple(a if i == kept else map_nested(a, Spec, narrow) for i, a in enumerate(arguments))


def _public_ops(found: Sequence[Case]) -> Iterator[Case]:
    """Ops that a fused step replaces, or that undo the stem, on the shapes they would have in it."""

    def dense(like: Spec, shape: Sequence[int]) -> Spec:
        return Spec(like.dtype, tuple(shape), torch.empty(tuple(shape), device="meta").stride())

    for case in found:
        if case.op == "couple_":
            _, maps, _, _, factors, mode, *_ = case.arguments
            for p, f in zip(maps, factors, strict=True):
                n, c, h, w = p.shape
                if f == 1:  # a dual-residual step on a stream of this size
                    y = dense(p, p.shape)
                    yield Case(case.scale, "dual_residual_", (y, y, y, -0.5, 0.5, False, None, None, None), 0)
                    yield Case(case.scale, "dual_residual_adjoint_", (y, y, y, -0.5, 0.5), 0)
                if f > 1:
                    yield Case(case.scale, "upsample", (p, f, mode), 0)
                    yield Case(case.scale, "upsample_adjoint", (dense(p, (n, c, h * f, w * f)), f, mode), 0)
        if case.op == "space_to_depth":
            x, planes, block = case.arguments
            n, c, h, w = x.shape
            y = dense(x, (n, planes * block * block, h // block, w // block))
            yield Case(case.scale, "depth_to_space", (y, c, block), 0)
            yield Case(case.scale, "space_to_depth_adjoint", (y, c, block), 0)
