"""The dual-residual step, its inverse and its adjoint: one pass over flat memory each."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels.registry import memory_check
from revkernels.triton.plan import Guard, Plan, Planned, on_device_of, seen
from revkernels.triton.tiles import accumulator, ceil_div

GROUPS = 256  # of 8 elements, whose bits of one place are a byte
# Arguments that no kernel is specialised on: neither another size nor another step of a schedule compiles anything.
NUMBERS = ("size", "c_high", "c_low", "beta_high", "beta_low")


@triton.jit
def _rint(x):
    """To the nearest integer, ties to even: a sum from ``2^23`` on has no bits for a fraction."""
    size = tl.abs(x)
    size = tl.where(size < 2.0**23, (size + 2.0**23) - 2.0**23, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def _scalar(high, low, ACC: tl.constexpr):
    """A number from its :func:`_parts`."""
    out = tl.full([], high, ACC)
    if ACC == tl.float64:
        out = out + tl.full([], low, ACC)
    return out


@triton.jit(do_not_specialize=NUMBERS)
def _dual_residual_kernel(
    y,
    x,
    p,
    c_high,
    c_low,
    beta_high,
    beta_low,
    size,
    INVERSE: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``y <- beta y + (p + c x)``, or ``y <- (y - (p + c x)) / beta``.

    Bytes per element: read y, p, x, write y. FLOPs: 4. Bound: memory bandwidth.
    """
    o = tl.program_id(0).to(tl.int64) * (GROUPS * 8) + tl.arange(0, GROUPS * 8)
    m = o < size // VEC * VEC
    b_t = tl.load(p + o, m, 0.0).to(ACC)
    beta = _scalar(beta_high, beta_low, ACC)
    if x is not None:
        b_t = b_t + _scalar(c_high, c_low, ACC) * tl.load(x + o, m, 0.0).to(ACC)
    b_y = tl.load(y + o, m, 0.0).to(ACC)
    if INVERSE:
        b_y = (b_y - b_t) / beta
    else:
        b_y = beta * b_y + b_t
    tl.store(y + o, b_y.to(y.dtype.element_ty), m)


@triton.jit(do_not_specialize=NUMBERS)
def _dual_residual_integer_kernel(
    y, x, p, remainder, overflow, c_high, size, STEPS: tl.constexpr, BITS: tl.constexpr, INVERSE: tl.constexpr,
    HALF: tl.constexpr, VEC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """``y <- (y >> k) + q``, packing the k bits that go, or ``y <- ((y - q) << k) | bits``; sums wrap around.

    Bytes per element: read y, p, x, write y, k / 8 of remainders. Bound: memory bandwidth.
    """
    o_g = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    o_e = tl.arange(0, 8)[None, :]
    o = o_g * 8 + o_e
    m = o < size // VEC * VEC
    m_g = o_g * 8 < size
    b_t = tl.load(p + o, m, 0.0).to(tl.float32) * STEPS
    if x is not None:
        b_t = b_t + _scalar(c_high, 0.0, tl.float32) * tl.load(x + o, m, 0).to(tl.float32)
    fits = tl.abs(b_t) < 2147483648.0
    b_q = tl.where(fits, _rint(b_t), 0.0).to(tl.int64)
    b_y = tl.load(y + o, m, 0).to(tl.int64)
    if INVERSE:
        b_y = (b_y - b_q) << BITS
        for j in tl.static_range(BITS):
            b_plane = tl.load(remainder + o_g * BITS + j, m_g, 0).to(tl.int64)
            b_y = b_y | (((b_plane >> o_e) & 1) << j)
    else:
        if remainder is not None:
            for j in tl.static_range(BITS):
                b_plane = tl.sum(((b_y >> j) & 1) << o_e, 1, keep_dims=True)
                tl.store(remainder + o_g * BITS + j, b_plane.to(tl.uint8), m_g)
        b_y = (b_y >> BITS) + b_q
        if overflow is not None:
            wrong = m & ((fits == 0) | (b_y < -HALF) | (b_y >= HALF))
            tl.atomic_add(overflow, tl.sum(wrong.to(tl.int64)))
    b_y = ((b_y + HALF) & (2 * HALF - 1)) - HALF
    tl.store(y + o, b_y.to(y.dtype.element_ty), m)


@triton.jit(do_not_specialize=NUMBERS)
def _dual_residual_adjoint_kernel(
    dx, dy, g, c_high, c_low, beta_high, beta_low, size, ACC: tl.constexpr, VEC: tl.constexpr, GROUPS: tl.constexpr
):
    """``dx <- dx + g + c dy``, ``dy <- beta dy``.

    Bytes per element: read and write dx and dy, read g. FLOPs: 4. Bound: memory bandwidth.
    """
    o = tl.program_id(0).to(tl.int64) * (GROUPS * 8) + tl.arange(0, GROUPS * 8)
    m = o < size // VEC * VEC
    b_dy = tl.load(dy + o, m, 0.0).to(ACC)
    b_t = _scalar(c_high, c_low, ACC) * b_dy
    if g is not None:
        b_t += tl.load(g + o, m, 0.0).to(ACC)
    tl.store(dx + o, (tl.load(dx + o, m, 0.0).to(ACC) + b_t).to(dx.dtype.element_ty), m)
    tl.store(dy + o, (b_dy * _scalar(beta_high, beta_low, ACC)).to(dy.dtype.element_ty), m)


def _parts(name: str, value: float) -> dict[str, float]:
    """A number in two arguments of a kernel, which are float32: their sum has 48 of its bits."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return {f"{name}_high": high, f"{name}_low": value - high}


def _vector(y: Tensor) -> int:
    """Elements that the number of elements is a multiple of: a mask of whole groups is loaded 16 bytes at a time."""
    return 8 if y.numel() % 8 == 0 else 1


def _check_flat(**tensors: Tensor | None) -> None:
    for name, v in tensors.items():
        if v is not None and not v.is_contiguous():
            raise RuntimeError(f"{name}: expected contiguous memory; call .contiguous()")


def dual_residual_(
    y: Tensor,
    x: Tensor | None,
    p: Tensor,
    coefficient: float,
    beta: float,
    inverse: bool,
    fraction_bits: int | None = None,
    remainder: Tensor | None = None,
    overflow: Tensor | None = None,
) -> None:
    """One launch; see :func:`revkernels.reference.dual_residual_`."""
    tensors = (y, remainder, overflow, x, p)
    bits = 0 if fraction_bits is None else round(-math.log2(beta))
    key = (y.get_device(), *map(seen, tensors), inverse, fraction_bits, bits, coefficient, beta)
    _guard(key, tensors, y, x, p, coefficient, beta, inverse, fraction_bits, remainder, overflow)
    _check_flat(y=y, x=x, p=p, remainder=remainder)
    if y.numel() == 0:
        return
    programs = ceil_div(y.numel(), GROUPS * 8)

    def float_plan() -> Plan:
        constants = dict(size=y.numel(), INVERSE=inverse, ACC=accumulator(y), VEC=_vector(y), GROUPS=GROUPS)
        return Plan(programs, _parts("c", coefficient) | _parts("beta", beta) | constants, num_warps=8)

    def integer_plan() -> Plan:
        half = 2**15 if y.dtype == torch.int16 else 2**31
        constants = dict(size=y.numel(), STEPS=2.0 ** (fraction_bits or 0), BITS=bits, INVERSE=inverse, HALF=half)
        return Plan(programs, dict(c_high=coefficient) | constants | dict(VEC=_vector(y), GROUPS=GROUPS), num_warps=8)

    with on_device_of(y):
        if fraction_bits is None:
            _float(key, float_plan, y, x, p)
        else:
            _integer(key, integer_plan, y, x, p, remainder if bits else None, None if inverse else overflow)


def dual_residual_adjoint_(dx: Tensor, dy: Tensor, g: Tensor | None, coefficient: float, beta: float) -> None:
    """One launch; see :func:`revkernels.reference.dual_residual_adjoint_`."""
    tensors = (dx, dy, g)
    key = (dy.get_device(), *map(seen, tensors), coefficient, beta)
    _adjoint_guard(key, tensors, dx, dy, g, coefficient, beta)
    _check_flat(dx=dx, dy=dy, g=g)
    if dy.numel() == 0:
        return

    def plan() -> Plan:
        constants = _parts("c", coefficient) | _parts("beta", beta)
        constants |= dict(size=dy.numel(), ACC=accumulator(dy), VEC=_vector(dy), GROUPS=GROUPS)
        return Plan(ceil_div(dy.numel(), GROUPS * 8), constants, num_warps=8)

    with on_device_of(dy):
        _adjoint(key, plan, dx, dy, g)


_float, _integer = Planned(_dual_residual_kernel), Planned(_dual_residual_integer_kernel)
_adjoint = Planned(_dual_residual_adjoint_kernel)
_guard = Guard(memory_check("dual_residual_"), written=3)
_adjoint_guard = Guard(memory_check("dual_residual_adjoint_"), written=2)
