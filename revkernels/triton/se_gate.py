"""Squeeze-excite's two small layers and their gradients: matrix products with what surrounds them fused in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from revkernels import reference
from revkernels.triton.bn_act import activate, activation_slope, hardsigmoid
from revkernels.triton.tiles import accumulator

PLAIN, HARDSWISH, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # operands
NONE, BIAS, HARDSIGMOID, SLOPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # results
HARDSIGMOID_SLOPE = tl.constexpr(reference.HARDSIGMOID_SLOPE)


@triton.jit
def _operand(p, side, m, KIND: tl.constexpr, ACC: tl.constexpr):
    """A block of an operand: itself, its hardswish, or dgate by hardsigmoid's slope where the gate is in (0, 1)."""
    b = tl.load(p, m, 0.0).to(ACC)
    if KIND == HARDSWISH:
        b = activate(b, True)
    if KIND == GATE:
        b_gate = tl.load(side, m, 0.0)
        b = tl.where((b_gate > 0) & (b_gate < 1), b * tl.full([], HARDSIGMOID_SLOPE, ACC), 0.0)
    return b


@triton.jit
def _product_kernel(
    out, a, a_side, b, out_side, a_sum, M, N, K, a_m, a_k, b_k, b_n,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, OUT_KIND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = e(f(A) g(B))``, f and g of :func:`_operand`; ``a_sum [M] = sum_k f(A)``.

    e adds a bias ``[N]``, does so and takes hardsigmoid, or multiplies by ``h'(out_side [M, N])``. In full precision,
    as float32 weights are. ``2 M N K`` FLOPs on ``M K + K N + M N`` elements; bound by latency at these sizes.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    i_n = tl.program_id(0) % blocks_n
    o_m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_m, m_n = o_m < M, o_n < N
    b_out = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    b_sum = tl.zeros([BLOCK_M, 1], ACC)
    for k in range(0, K, BLOCK_K):
        o_ka = k + tl.arange(0, BLOCK_K)[None, :]
        o_kb = k + tl.arange(0, BLOCK_K)[:, None]
        o_a = o_m.to(tl.int64) * a_m + o_ka.to(tl.int64) * a_k
        b_a = _operand(a + o_a, a_side + o_a, m_m & (o_ka < K), A_KIND, ACC)
        o_b = o_kb.to(tl.int64) * b_k + o_n.to(tl.int64) * b_n
        b_b = _operand(b + o_b, b + o_b, (o_kb < K) & m_n, B_KIND, ACC)
        b_out = tl.dot(b_a, b_b, b_out, input_precision="ieee", out_dtype=ACC)
        if a_sum is not None:
            b_sum += tl.sum(b_a, 1, keep_dims=True)
    o_out = o_m.to(tl.int64) * N + o_n
    if OUT_KIND == SLOPE:
        b_out = b_out * activation_slope(tl.load(out_side + o_out, m_m & m_n, 0.0).to(ACC), True)
    elif OUT_KIND != NONE:
        b_out = b_out + tl.load(out_side + o_n, m_n, 0.0).to(ACC)
    if OUT_KIND == HARDSIGMOID:
        b_out = hardsigmoid(b_out)
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), m_m & m_n)
    if a_sum is not None:
        if i_n == 0:
            tl.store(a_sum + o_m, b_sum.to(a_sum.dtype.element_ty), m_m)


def _product(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    a_kind: tl.constexpr = PLAIN,
    b_kind: tl.constexpr = PLAIN,
    out_kind: tl.constexpr = NONE,
    gate: Tensor | None = None,
    out_side: Tensor | None = None,
    a_sum: Tensor | None = None,
) -> None:
    """``out = e(f(a) g(b))``, a ``[M, K]`` and b ``[K, N]`` with any strides; ``gate`` has a's."""
    m, k = a.shape
    n = b.shape[1]
    _product_kernel[(triton.cdiv(m, 16) * triton.cdiv(n, 32),)](
        out,
        a,
        gate if gate is not None else a,
        b,
        out_side,
        a_sum,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        A_KIND=a_kind,
        B_KIND=b_kind,
        OUT_KIND=out_kind,
        ACC=accumulator(out),
        BLOCK_M=16,
        BLOCK_N=32,
        BLOCK_K=32,
        num_warps=4,
        enable_fp_fusion=True,
    )


def se_gate(pooled: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Two launches, one per layer; see :func:`revkernels.reference.se_gate`."""
    gate = pooled.new_empty(pooled.shape)
    hidden = pooled.new_empty(pooled.shape[0], w1.shape[0])
    if gate.numel() > 0:
        with torch.cuda.device_of(pooled):
            _product(hidden, pooled, w1.t(), out_kind=BIAS, out_side=b1.contiguous())
            _product(gate, hidden, w2.t(), a_kind=HARDSWISH, out_kind=HARDSIGMOID, out_side=b2.contiguous())
    return gate, hidden


def se_gate_grad(
    dgate: Tensor, gate: Tensor, hidden: Tensor, pooled: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four launches, one per product; see :func:`revkernels.reference.se_gate_grad`."""
    dgate, gate, hidden, pooled = (t.contiguous() for t in (dgate, gate, hidden, pooled))
    dhidden, dpooled = torch.empty_like(hidden), torch.empty_like(pooled)
    dw1, dw2 = dgate.new_empty(w1.shape), dgate.new_empty(w2.shape)
    db1, db2 = dgate.new_empty(w1.shape[:1]), dgate.new_empty(w2.shape[:1])
    if dgate.numel() == 0:
        return dpooled, dw1.zero_(), db1.zero_(), dw2.zero_(), db2.zero_()
    with torch.cuda.device_of(dgate):
        _product(dhidden, dgate, w2, a_kind=GATE, gate=gate, out_kind=SLOPE, out_side=hidden)
        _product(dpooled, dhidden, w1)
        _product(dw1, dhidden.t(), pooled, a_sum=db1)
        _product(dw2, dgate.t(), hidden, a_kind=GATE, b_kind=HARDSWISH, gate=gate.t(), a_sum=db2)
    return dpooled, dw1, db1, dw2, db2
