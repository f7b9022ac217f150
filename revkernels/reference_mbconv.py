"""The truth of the ops of an MBConv: compositions of :mod:`revkernels.reference`, on whole batches.

With ``h`` hardswish, ``BN_k(x) = scale_k x + shift_k`` (``scale = gamma rstd``, ``shift = beta - mean scale``):

    e = W_e x                    (only with expansion)        [N, E, H, W]
    d = dw(h(BN_0(e)))           or dw(x)                     [N, E, H', W']
    gate = SE(mean_hw h(BN_1(d)))                             [N, E]
    p = W_p (gate h(BN_1(d)))                                 [N, C', H', W']
    result = keep BN_2(p)        left to the coupling         keep [N], stochastic depth

Planes (e, d, p and their gradients) have one dtype, that of p; norms, gates, sums and gradients of parameters have its
``accumulate_dtype``. x has any float dtype, or is int16 with ``fraction_bits``: values ``2^-fraction_bits x``.

``norms [4, K]``: mean, rstd, scale and shift of BN_0 (only with expansion), BN_1 and BN_2, their channels side by
side. ``squeezed``: gate ``[N, E]``, hidden ``[N, R]`` and pooled ``[N, E]``, one after another; empty without
squeeze-excite. ``chunk``: samples that an implementation computes at a time, in ``workspace``
(:mod:`revkernels.workspace`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revkernels import reference as ref
from revkernels.reference import accumulate_dtype


class Norm(NamedTuple):
    """A BatchNorm as an affine map; ``[C]`` each."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


class SqueezeExcite(NamedTuple):
    """Its matrices and biases."""

    w1: Tensor  # [R, E]
    b1: Tensor  # [R]
    w2: Tensor  # [E, R]
    b2: Tensor  # [E]


def _values(x: Tensor, fraction_bits: int | None) -> Tensor:
    return x if fraction_bits is None else x.to(torch.float32) * 2.0**-fraction_bits


def _matrices(
    squeeze: Tensor | None, squeeze_bias: Tensor | None, excite: Tensor | None, excite_bias: Tensor | None
) -> SqueezeExcite | None:
    if squeeze is None or squeeze_bias is None or excite is None or excite_bias is None:
        return None
    return SqueezeExcite(squeeze.flatten(1), squeeze_bias, excite.flatten(1), excite_bias)


def norm_columns(expand: Tensor | None, depthwise: Tensor, project: Tensor) -> list[int]:
    """How many columns of ``norms`` each norm has."""
    return [0 if expand is None else depthwise.shape[0], depthwise.shape[0], project.shape[0]]


def _split(norms: Tensor, expand: Tensor | None, depthwise: Tensor, project: Tensor) -> list[Norm]:
    return [Norm(*columns) for columns in norms.split(norm_columns(expand, depthwise, project), 1)]


def _expand(v: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    e = v.new_empty((v.shape[0], weight.shape[0], *v.shape[2:]), dtype=dtype)
    ref.pointwise_conv_(e, v, weight, None, None, None)
    return e


def _depthwise(source: Tensor, weight: Tensor, norm0: Norm | None, stride: int, dtype: torch.dtype) -> Tensor:
    scale, shift = (None, None) if norm0 is None else (norm0.scale, norm0.shift)
    return ref.depthwise_conv(source, weight, scale, shift, stride).to(dtype)


def _squeeze(d: Tensor, norm1: Norm, se: SqueezeExcite | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """gate, hidden, pooled."""
    if se is None:
        return None, None, None
    pooled = ref.bn_act_squeeze(d, norm1.scale, norm1.shift, "hardswish")
    return *ref.se_gate(pooled, *se), pooled


def mbconv(
    x: Tensor,  # [N, C, H, W]
    fraction_bits: int | None,
    expand: Tensor | None,  # [E, C, 1, 1]
    gamma0: Tensor | None,  # [E]
    beta0: Tensor | None,  # [E]
    depthwise: Tensor,  # [E, 1, k, k]
    gamma1: Tensor,  # [E]
    beta1: Tensor,  # [E]
    squeeze: Tensor | None,  # [R, E, 1, 1]
    squeeze_bias: Tensor | None,  # [R]
    excite: Tensor | None,  # [E, R, 1, 1]
    excite_bias: Tensor | None,  # [E]
    project: Tensor,  # [C', E, 1, 1]
    gamma2: Tensor,  # [C']
    beta2: Tensor,  # [C']
    mean0: Tensor | None,  # running statistics: updated with the batch's, used without
    var0: Tensor | None,
    batches0: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    batches1: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    batches2: Tensor | None,
    batch: Sequence[bool],  # which norms take the batch's statistics
    momentum: Sequence[float],
    eps: Sequence[float],
    stride: int,
    chunk: int,
    norms: Tensor | None,  # given: norms that do not take the batch's statistics are as they are here
    p: Tensor,  # [N, C', H', W'], overwritten
    d: Tensor | None,  # [N, E, H', W'], overwritten: where to keep d
    workspace: Tensor,
) -> Tensor:
    """``p``, and ``norms [4, K]``."""
    acc = accumulate_dtype(p.dtype)
    running = ((mean0, var0, batches0), (mean1, var1, batches1), (mean2, var2, batches2))
    given = None if norms is None else _split(norms, expand, depthwise, project)

    def observe(k: int, plane: Tensor, gamma: Tensor, beta: Tensor) -> Norm:
        if batch[k]:
            mean, var = ref.bn_stats(plane)
            count = plane.numel() // plane.shape[1]
            fold = ref.bn_fold(mean, var, gamma, beta, *running[k], momentum[k], count, eps[k])
        elif given is not None:
            return given[k]
        else:
            mean, var = (v.to(acc) for v in running[k][:2] if v is not None)
            fold = ref.bn_fold(mean, var, gamma, beta, None, None, None, 0.0, 1, eps[k])
        return Norm(mean.clone(), *fold)

    source, found = _values(x, fraction_bits), []
    if expand is not None and gamma0 is not None and beta0 is not None:
        source = _expand(source, expand, p.dtype)
        found.append(observe(0, source, gamma0, beta0))
    plane = _depthwise(source, depthwise, found[0] if found else None, stride, p.dtype)
    norm1 = observe(1, plane, gamma1, beta1)
    gate, _, _ = _squeeze(plane, norm1, _matrices(squeeze, squeeze_bias, excite, excite_bias))
    ref.pointwise_conv_(p, plane, project, norm1.scale, norm1.shift, gate)
    if d is not None:
        d.copy_(plane)
    found += [norm1, observe(2, p, gamma2, beta2)]
    return torch.cat([torch.stack(norm) for norm in found], 1)


def mbconv_recompute(
    x: Tensor,
    fraction_bits: int | None,
    expand: Tensor | None,
    depthwise: Tensor,
    squeeze: Tensor | None,
    squeeze_bias: Tensor | None,
    excite: Tensor | None,
    excite_bias: Tensor | None,
    project: Tensor,
    norms: Tensor,  # [4, K]
    stride: int,
    chunk: int,
    p: Tensor,  # [N, C', H', W'], overwritten
    d: Tensor | None,  # [N, E, H', W'], overwritten, where it is to be kept
    e: Tensor | None,  # [N, E, H, W], likewise
    workspace: Tensor,
) -> Tensor:
    """``p`` again from its norms, and ``squeezed``."""
    norm0, norm1, _ = _split(norms, expand, depthwise, project)
    source = _values(x, fraction_bits)
    if expand is not None:
        source = _expand(source, expand, p.dtype)
    plane = _depthwise(source, depthwise, None if expand is None else norm0, stride, p.dtype)
    squeezed = _squeeze(plane, norm1, _matrices(squeeze, squeeze_bias, excite, excite_bias))
    ref.pointwise_conv_(p, plane, project, norm1.scale, norm1.shift, squeezed[0])
    for kept, found in ((d, plane), (e, source)):
        if kept is not None:
            kept.copy_(found)
    return norms.new_empty(0) if squeeze is None else torch.cat([v.flatten() for v in squeezed if v is not None])


def mbconv_backward(
    du: Tensor,  # [N, C', H', W']: gradient of keep BN_2(p)
    sums: Tensor | None,  # [2, N, C']: sum_hw du, sum_hw du (p - mean), if they are known
    x: Tensor,
    fraction_bits: int | None,
    expand: Tensor | None,
    depthwise: Tensor,
    squeeze: Tensor | None,
    squeeze_bias: Tensor | None,
    excite: Tensor | None,
    excite_bias: Tensor | None,
    project: Tensor,
    norms: Tensor,  # [4, K]
    batch: Sequence[bool],
    keep: Tensor | None,  # [N]
    stride: int,
    chunk: int,
    p: Tensor | None,  # of the forward, overwritten; it, d, e and squeezed are computed again where they are not given
    d: Tensor | None,
    e: Tensor | None,
    squeezed: Tensor | None,
    dz: Tensor | None,  # [N, E, H', W'], overwritten: memory for the gradient of the projection's input; may be du
    dx: Tensor | None,  # [N, C, H, W]: grows by the gradient of x
    add: bool,  # otherwise dx is overwritten, and may be x, dz or du itself
    workspace: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of the parameters, in the order of ``mbconv``; empty where there is no parameter."""
    like = dz if p is None else p
    assert like is not None, "without p, dz is given"
    dtype = like.dtype
    n, count = x.shape[0], du.numel() // du.shape[1]
    norm0, norm1, norm2 = _split(norms, expand, depthwise, project)
    se = _matrices(squeeze, squeeze_bias, excite, excite_bias)
    v = _values(x, fraction_bits)

    # the planes
    source = v if expand is None else _expand(v, expand, dtype) if e is None else e
    if d is None:
        d = _depthwise(source, depthwise, None if expand is None else norm0, stride, dtype)
    gate, hidden, pooled = _squeeze(d, norm1, se)
    if se is not None and squeezed is not None:
        widths = [d.shape[1], se.w1.shape[0], d.shape[1]]
        gate, hidden, pooled = (w.view(n, -1) for w in squeezed.split([n * width for width in widths]))
    if p is None:
        p = torch.empty(du.shape, dtype=dtype, device=du.device)
        ref.pointwise_conv_(p, d, project, norm1.scale, norm1.shift, gate)

    # result = keep BN_2(p)
    if sums is None:
        (sums,) = ref.couple_adjoint(du, [p], [norm2.mean], [1], "nearest")[1]
    keep = None if keep is None else keep[:, None].expand(n, project.shape[0])
    dgamma2, dbeta2, slope, offset = _fold_grad(norm2, batch[2], sums, keep, None, count)
    dp = ref.bn_act_grad(du, p, norm2.scale, norm2.shift, keep, None, slope, offset, "identity")

    # p = W_p z, z = gate h(BN_1(d)), gate = SE(mean_hw h(BN_1(d))): every pixel of h gets dpool on top of gate dz
    dproject = ref.pointwise_conv_grad_weight(d, dp, norm1.scale, norm1.shift, gate)
    gradient = _expand(dp, project.transpose(0, 1), dtype)
    sums = ref.bn_act_grad_sums(gradient, d, norm1.scale, norm1.shift, norm1.mean, "hardswish")
    none = norms.new_empty(0)
    dpool, dse = None, [none] * 4
    if se is not None and gate is not None and hidden is not None and pooled is not None:
        dpool, dw1, db1, dw2, db2 = ref.se_gate_grad(sums[0], gate, hidden, pooled, se.w1, se.w2)
        dpool = dpool / (d.shape[2] * d.shape[3])
        dse = [dw1.view(*dw1.shape, 1, 1), db1, dw2.view(*dw2.shape, 1, 1), db2]
    dgamma1, dbeta1, slope, offset = _fold_grad(norm1, batch[1], sums, gate, dpool, count)
    dd = ref.bn_act_grad(gradient, d, norm1.scale, norm1.shift, gate, dpool, slope, offset, "hardswish")

    # d = dw(v), v = h(BN_0(e)) or x
    scale0, shift0 = (None, None) if expand is None else (norm0.scale, norm0.shift)
    ddepthwise = ref.depthwise_conv_grad_weight(source, dd, scale0, shift0, depthwise.shape[-1], stride)
    dv = ref.depthwise_conv_grad_input(dd, depthwise, x.shape[2], x.shape[3], stride)
    dexpand = [none] * 3
    if expand is not None:
        sums = ref.bn_act_grad_sums(dv, source, norm0.scale, norm0.shift, norm0.mean, "hardswish")
        dgamma0, dbeta0, slope, offset = _fold_grad(norm0, batch[0], sums, None, None, x.numel() // x.shape[1])
        de = ref.bn_act_grad(dv, source, norm0.scale, norm0.shift, None, None, slope, offset, "hardswish")
        dexpand = [ref.pointwise_conv_grad_weight(v, de, None, None, None), dgamma0, dbeta0]
        dv = _expand(de, expand.transpose(0, 1), accumulate_dtype(dtype))
    if dz is not None:
        dz.copy_(gradient)
    if dx is not None:
        dx.add_(dv) if add else dx.copy_(dv)
    return (*dexpand, ddepthwise, dgamma1, dbeta1, *dse, dproject, dgamma2, dbeta2)


# The numbers of a term of `mbconv_infer_`: y = maps[target][:, first : first + C'], x = maps[source][:, source_first :
# source_first + C], the strides of the depthwise convolution and of the upsampling, and a sum of flags.
TERM_NUMBERS = 7
ASSIGN, EXPANDS, SQUEEZES = 1, 2, 4  # y is overwritten; there is an expansion; there is squeeze-excite


def mbconv_infer_(
    maps: Sequence[Tensor],  # [N, C_i, H_i, W_i], updated
    weights: Sequence[Tensor],  # of every term, those of a part that is absent left out
    terms: Sequence[int],  # TERM_NUMBERS for each
    eps: Sequence[float],  # of the three norms of each
    mode: str,
    chunk_bytes: int,  # of the widest plane, that an implementation computes at a time
) -> None:
    """``y <- y + up_f(BN_2(p))`` of one MBConv after another, with running statistics.

    The weights of a term, in order: ``expand [E, C, 1, 1]`` and the norm behind it; ``depthwise [E, 1, k, k]`` and its
    norm; ``squeeze``, its bias, ``excite``, its bias; ``project [C', E, 1, 1]`` and its norm. A norm is gamma, beta,
    mean and variance.
    """
    given = iter(weights)

    def norm(epsilon: float) -> Norm:
        gamma, beta, mean, var = (next(given) for _ in range(4))
        return Norm(mean, *ref.bn_fold(mean, var, gamma, beta, None, None, None, 0.0, 1, epsilon))

    for k in range(len(terms) // TERM_NUMBERS):
        target, first, source, source_first, stride, factor, flags = terms[TERM_NUMBERS * k : TERM_NUMBERS * (k + 1)]
        eps0, eps1, eps2 = eps[3 * k : 3 * k + 3]
        v, norm0, se, dtype = maps[source][:, source_first:], None, None, maps[source].dtype
        if flags & EXPANDS:
            expand = next(given)
            v = _expand(v[:, : expand.shape[1]], expand, dtype)
            norm0 = norm(eps0)
        depthwise = next(given)
        d = _depthwise(v[:, : depthwise.shape[0]], depthwise, norm0, stride, dtype)
        norm1 = norm(eps1)
        if flags & SQUEEZES:
            se = _matrices(*(next(given) for _ in range(4)))
        project = next(given)
        norm2 = norm(eps2)
        gate, _, _ = _squeeze(d, norm1, se)
        p = d.new_empty((d.shape[0], project.shape[0], *d.shape[2:]))
        ref.pointwise_conv_(p, d, project, norm1.scale, norm1.shift, gate)
        y = maps[target].narrow(1, first, project.shape[0])
        if flags & ASSIGN:
            y.zero_()
        ref.couple_(y, [p], [norm2.scale], [norm2.shift], [factor], mode, False)


def _fold_grad(
    norm: Norm, batch: bool, sums: Tensor, gate: Tensor | None, dpool: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    folded = ref.bn_fold_grad(sums, gate, dpool, norm.mean, norm.rstd, norm.scale, count, batch)
    return folded if batch else (*folded[:2], None, None)
