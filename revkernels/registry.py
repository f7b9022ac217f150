"""Schemas, shape rules (fakes) and reference implementations of every op: the contract, in one place.

Each op is defined once, in Python, and its reference is registered for every device
(``CompositeExplicitAutograd``). ``_C`` then adds ``CPU`` kernels, ``_C_cuda`` and Triton add ``CUDA`` ones; the
dispatcher prefers them, and the same op works without them. Ops carry no autograd: :mod:`revkernels.functional` does.

Schemas say ``interpolation`` where functions say ``mode``: PyTorch's functionalisation of in-place ops passes arguments
by name to a function with a parameter ``mode`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from revkernels import reference, reference_mbconv
from revkernels.reference import accumulate_dtype
from revkernels.storage import checked

NAMESPACE = "revkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Op:
    """One op: its name, its schema without the name, its reference and its fake."""

    name: str
    schema: str
    reference: Callable
    fake: Callable

    @property
    def overload(self) -> OpOverload:
        """The callable that the dispatcher answers."""
        return overload_of(self.name)


def overload_of(name: str) -> OpOverload:
    return getattr(torch.ops.revkernels, name).default


OPS: dict[str, Op] = {}


def memory_check(name: str) -> Callable[..., None]:
    """What takes the arguments of an op and refuses freed storage, and memory that the op writes and another holds."""
    return checked(overload_of(name)._schema, lambda *arguments: None)


def _register(schema: str, fake: Callable) -> None:
    name, arguments = schema.split("(", 1)
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    in_chunks = name.startswith("mbconv")  # its planes may be one another's memory, chunk by chunk
    run = getattr(reference_mbconv if in_chunks else reference, name)
    run = checked(overload_of(name)._schema, run, apart=not in_chunks)
    op = Op(name, "(" + arguments, run, fake)
    LIBRARY.impl(name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    OPS[name] = op


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _sums(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _empty(x, shape, accumulate_dtype(x.dtype))


def _upsample(x: Tensor, factor: int, mode: str) -> Tensor:
    n, c, h, w = x.shape
    return _empty(x, (n, c, h * factor, w * factor))


def _upsample_adjoint(dy: Tensor, factor: int, mode: str) -> Tensor:
    n, c, h, w = dy.shape
    return _empty(dy, (n, c, h // factor, w // factor))


def _space_to_depth(x: Tensor, planes: int, block: int) -> Tensor:
    n, _, h, w = x.shape
    return _empty(x, (n, planes * block * block, h // block, w // block))


def _depth_to_space(y: Tensor, channels: int, block: int) -> Tensor:
    n, _, h, w = y.shape
    return _empty(y, (n, channels, h * block, w * block))


def _couple_adjoint(
    dy: Tensor, p: Sequence[Tensor | None], center: Sequence[Tensor | None], factors: Sequence[int], mode: str
) -> tuple[list[Tensor], list[Tensor]]:
    n, c, h, w = dy.shape
    dus = [_empty(dy, (0,) if f == 1 else (n, c, h // f, w // f)) for f in factors]
    sums = [_sums(dy, (0,) if p_k is None else (2, n, c)) for p_k in p]
    return dus, sums


def _depthwise_conv(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int) -> Tensor:
    n, c, h, w = x.shape
    return _empty(x, (n, c, -(-h // stride), -(-w // stride)), None if x.is_floating_point() else torch.float32)


def _depthwise_conv_grad_input(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    return _empty(dy, (dy.shape[0], dy.shape[1], height, width))


def _depthwise_conv_grad_weight(
    x: Tensor, dy: Tensor, scale: Tensor | None, shift: Tensor | None, kernel: int, stride: int
) -> Tensor:
    return _sums(x, (x.shape[1], 1, kernel, kernel))


_register("upsample(Tensor x, int factor, str interpolation) -> Tensor", _upsample)
_register("upsample_adjoint(Tensor dy, int factor, str interpolation) -> Tensor", _upsample_adjoint)
_register("space_to_depth(Tensor x, int planes, int block) -> Tensor", _space_to_depth)
_register("depth_to_space(Tensor y, int channels, int block) -> Tensor", _depth_to_space)
_register("space_to_depth_adjoint(Tensor dy, int channels, int block) -> Tensor", _depth_to_space)
_register(
    "couple_(Tensor(a!) y, Tensor[] p, Tensor?[] scale, Tensor?[] shift, int[] factors, str interpolation, "
    "bool subtract, int? fraction_bits=None, Tensor(b!)? overflow=None) -> ()",
    lambda y, p, scale, shift, factors, mode, subtract, fraction_bits=None, overflow=None: None,
)
_register(
    "couple_adjoint(Tensor dy, Tensor?[] p, Tensor?[] center, int[] factors, str interpolation) -> "
    "(Tensor[] du, Tensor[] sums)",
    _couple_adjoint,
)
_register("dequantize_(Tensor(a!) x, Tensor y, int fraction_bits) -> ()", lambda x, y, fraction_bits: None)
_register(
    "dual_residual_(Tensor(a!) y, Tensor? x, Tensor p, float coefficient, float beta, bool inverse, "
    "int? fraction_bits=None, Tensor(b!)? remainder=None, Tensor(c!)? overflow=None) -> ()",
    lambda y, x, p, coefficient, beta, inverse, fraction_bits=None, remainder=None, overflow=None: None,
)
_register(
    "dual_residual_adjoint_(Tensor(a!) dx, Tensor(b!) dy, Tensor? g, float coefficient, float beta) -> ()",
    lambda dx, dy, g, coefficient, beta: None,
)
_register(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride) -> Tensor",
    _depthwise_conv,
)
_register(
    "depthwise_conv_grad_input(Tensor dy, Tensor weight, int height, int width, int stride) -> Tensor",
    _depthwise_conv_grad_input,
)
_register(
    "depthwise_conv_grad_weight(Tensor x, Tensor dy, Tensor? scale, Tensor? shift, int kernel, int stride) -> Tensor",
    _depthwise_conv_grad_weight,
)
_register(
    "pointwise_conv_(Tensor(a!) y, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? gate) -> ()",
    lambda y, x, weight, scale, shift, gate: None,
)
_register(
    "pointwise_conv_grad_weight(Tensor x, Tensor dy, Tensor? scale, Tensor? shift, Tensor? gate) -> Tensor",
    lambda x, dy, scale, shift, gate: _sums(x, (dy.shape[1], x.shape[1], 1, 1)),
)
_register("bn_stats(Tensor x) -> (Tensor mean, Tensor var)", lambda x: (_sums(x, x.shape[1:2]), _sums(x, x.shape[1:2])))
_register(
    "bn_fold(Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? batches, float momentum, int count, float eps) -> (Tensor rstd, Tensor scale, Tensor shift)",
    lambda mean, *others: tuple(_empty(mean, mean.shape) for _ in range(3)),
)
_register(
    "bn_fold_grad(Tensor sums, Tensor? gate, Tensor? dpool, Tensor mean, Tensor rstd, Tensor scale, int count, "
    "bool batch) -> (Tensor dweight, Tensor dbias, Tensor slope, Tensor offset)",
    lambda sums, gate, dpool, mean, *others: tuple(_empty(mean, mean.shape) for _ in range(4)),
)
_register(
    "bn_act(Tensor x, Tensor scale, Tensor shift, Tensor? gate, str act) -> Tensor",
    lambda x, scale, shift, gate, act: _empty(x, x.shape),
)
_register(
    "bn_act_squeeze(Tensor x, Tensor scale, Tensor shift, str act) -> Tensor",
    lambda x, scale, shift, act: _sums(x, x.shape[:2]),
)
_register(
    "bn_act_grad_sums(Tensor dz, Tensor x, Tensor scale, Tensor shift, Tensor mean, str act) -> Tensor",
    lambda dz, x, scale, shift, mean, act: _sums(x, (5, *x.shape[:2])),
)
_register(
    "bn_act_grad(Tensor dz, Tensor x, Tensor scale, Tensor shift, Tensor? gate, Tensor? dpool, Tensor? slope, "
    "Tensor? offset, str act) -> Tensor",
    lambda dz, x, scale, shift, gate, dpool, slope, offset, act: _empty(x, x.shape),
)
_register(
    "se_gate(Tensor pooled, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor gate, Tensor hidden)",
    lambda pooled, w1, b1, w2, b2: (_empty(pooled, pooled.shape), _empty(pooled, (pooled.shape[0], w1.shape[0]))),
)
_register(
    "se_gate_grad(Tensor dgate, Tensor gate, Tensor hidden, Tensor pooled, Tensor w1, Tensor w2) -> "
    "(Tensor dpooled, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    lambda dgate, gate, hidden, pooled, w1, w2: (
        _empty(dgate, pooled.shape),
        _empty(dgate, w1.shape),
        _empty(dgate, w1.shape[:1]),
        _empty(dgate, w2.shape),
        _empty(dgate, w2.shape[:1]),
    ),
)

_CONVOLUTIONS = (
    "Tensor? expand, Tensor depthwise, Tensor? squeeze, Tensor? squeeze_bias, Tensor? excite, Tensor? excite_bias, "
    "Tensor project"
)


def _mbconv(
    x: Tensor,
    fraction_bits: int | None,
    expand: Tensor | None,
    gamma0: Tensor | None,
    beta0: Tensor | None,
    depthwise: Tensor,
    *others: Any,
) -> Tensor:
    columns = reference_mbconv.norm_columns(expand, depthwise, others[6])
    return _sums(others[-3], (4, sum(columns)))


def _mbconv_recompute(
    x: Tensor,
    fraction_bits: int | None,
    expand: Tensor | None,
    depthwise: Tensor,
    squeeze: Tensor | None,
    squeeze_bias: Tensor | None,
    *others: Any,
) -> Tensor:
    size = 0 if squeeze is None else x.shape[0] * (2 * squeeze.shape[1] + squeeze.shape[0])
    return _empty(others[3], (size,))


def _mbconv_backward(
    du: Tensor,
    sums: Tensor | None,
    x: Tensor,
    fraction_bits: int | None,
    expand: Tensor | None,
    depthwise: Tensor,
    squeeze: Tensor | None,
    squeeze_bias: Tensor | None,
    excite: Tensor | None,
    excite_bias: Tensor | None,
    project: Tensor,
    norms: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    none, e, c = (0,), depthwise.shape[:1], project.shape[:1]
    shapes: list[Sequence[int]] = [none] * 3 if expand is None else [expand.shape, e, e]
    shapes += [depthwise.shape, e, e]
    shapes += [none if v is None else v.shape for v in (squeeze, squeeze_bias, excite, excite_bias)]
    shapes += [project.shape, c, c]
    return tuple(_empty(norms, tuple(shape)) for shape in shapes)


_register(
    "mbconv(Tensor x, int? fraction_bits, Tensor? expand, Tensor? gamma0, Tensor? beta0, Tensor depthwise, "
    "Tensor gamma1, Tensor beta1, Tensor? squeeze, Tensor? squeeze_bias, Tensor? excite, Tensor? excite_bias, "
    "Tensor project, Tensor gamma2, Tensor beta2, Tensor(a!)? mean0, Tensor(b!)? var0, Tensor(c!)? batches0, "
    "Tensor(d!)? mean1, Tensor(e!)? var1, Tensor(f!)? batches1, Tensor(g!)? mean2, Tensor(h!)? var2, "
    "Tensor(i!)? batches2, bool[] batch, float[] momentum, float[] eps, int stride, int chunk, Tensor? norms, "
    "Tensor(j!) p, Tensor(k!)? d, Tensor(l!) workspace) -> Tensor",
    _mbconv,
)
_register(
    f"mbconv_recompute(Tensor x, int? fraction_bits, {_CONVOLUTIONS}, Tensor norms, int stride, int chunk, "
    "Tensor(a!) p, Tensor(b!)? d, Tensor(c!)? e, Tensor(d!) workspace) -> Tensor",
    _mbconv_recompute,
)
_register(
    f"mbconv_backward(Tensor du, Tensor? sums, Tensor x, int? fraction_bits, {_CONVOLUTIONS}, Tensor norms, "
    "bool[] batch, Tensor? keep, int stride, int chunk, Tensor(a!)? p, Tensor? d, Tensor? e, Tensor? squeezed, "
    "Tensor(b!)? dz, Tensor(c!)? dx, bool add, Tensor(d!) workspace) -> (Tensor expand, Tensor gamma0, Tensor beta0, "
    "Tensor depthwise, Tensor gamma1, Tensor beta1, Tensor squeeze, Tensor squeeze_bias, Tensor excite, "
    "Tensor excite_bias, Tensor project, Tensor gamma2, Tensor beta2)",
    _mbconv_backward,
)
_register(
    "mbconv_infer_(Tensor(a!)[] maps, Tensor[] weights, int[] terms, float[] eps, str interpolation, int chunk_bytes)"
    " -> ()",
    lambda maps, weights, terms, eps, mode, chunk_bytes: None,
)
