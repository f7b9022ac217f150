"""MBConv with an explicit forward and vector-Jacobian product, on :mod:`revkernels`: no autograd graph inside.

With ``h`` hardswish, ``BN_k(x) = scale_k x + shift_k`` (``scale = gamma rstd``, ``shift = beta - mean scale``):

    e = W_e x                    (only with expansion)        [N, E, H, W]
    d = dw(h(BN_0(e)))           or dw(x)                     [N, E, H', W']
    gate = SE(mean_hw h(BN_1(d)))                             [N, E]
    p = W_p (gate h(BN_1(d)))                                 [N, C', H', W']
    result = keep BN_2(p)        left to the coupling         keep [N], stochastic depth

The forward saves the norms and the keep factors, nothing else: ``O(C + N)`` numbers. So the recompute has no sums over
samples and draws no random numbers: it is computed sample by sample, as is the backward up to the per-channel sums
that batch statistics need. Only one full plane per branch exists, p, over which the gradient of the projection's input
is written; everything else lives for a chunk of samples at a time.

Under autocast the planes e, d, p and their gradients are of its dtype; statistics, gates and sums are float32. Forward
and recompute call the same kernels, on the same chunks where results could depend on them (cuBLAS's), so that p comes
out the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import revkernels
from revbifpn.engine.anomaly import check_finite
from revbifpn.engine.branch import Contribution, Gradient, Pullback
from revbifpn.mbconv import ConvNormAct, MBConv, SqueezeExcite
from revbifpn.streams import Encoded

_ops = torch.ops.revkernels

Affine = tuple[Tensor | None, Tensor | None]  # scale and shift [C] of a prologue, or no prologue
NO_PROLOGUE: Affine = (None, None)

# Bytes of a chunk of samples of the widest plane: about a core's cache on a CPU; on a GPU, enough to fill it.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


class Weights(NamedTuple):
    """Parameters of an MBConv in the order of :meth:`FusedMBConv.parameters`; None where a part is absent."""

    expand: Tensor | None  # [E, C, 1, 1]
    gamma0: Tensor | None  # [E]
    beta0: Tensor | None
    depthwise: Tensor  # [E, 1, k, k]
    gamma1: Tensor  # [E]
    beta1: Tensor
    squeeze: Tensor | None  # [R, E, 1, 1]
    squeeze_bias: Tensor | None  # [R]
    excite: Tensor | None  # [E, R, 1, 1]
    excite_bias: Tensor | None  # [E]
    project: Tensor  # [C', E, 1, 1]
    gamma2: Tensor  # [C']
    beta2: Tensor


class Norm(NamedTuple):
    """``scale x + shift``, what a BatchNorm was in the forward; ``batch``: its statistics are the batch's own."""

    mean: Tensor  # [C]
    rstd: Tensor  # [C]
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    batch: bool

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.shift

    def gradient(
        self, sums: Tensor, count: int, gate: Tensor | None = None, dpool: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Parameter gradients, and slope and offset of ``dx = scale g + slope x + offset``, None for zero.

        From the sums over ``count`` positions; see :func:`revkernels.reference.bn_fold_grad`.
        """
        fold = (sums, gate, dpool, self.mean, self.rstd, self.scale, count, self.batch)
        dweight, dbias, slope, offset = _ops.bn_fold_grad(*fold)
        return (dweight, dbias, slope, offset) if self.batch else (dweight, dbias, None, None)


class FusedRecord(NamedTuple):
    """What one forward saved: ``O(C + N)`` numbers."""

    norms: tuple[Norm | None, Norm, Norm]
    keep: Tensor | None = None  # [N], 0 or 1 / (1 - p)


def _pointwise(weight: Tensor, x: Tensor | Encoded, affine: Affine, gate: Tensor | None, out: Tensor) -> Tensor:
    """1x1 convolution through its prologue, ``[O, I, 1, 1], [N, I, H, W] -> [N, O, H, W]``, into ``out``."""
    if isinstance(x, Encoded):  # its integers, with their unit in the weight
        x, weight = x.y, weight * x.unit
    _ops.pointwise_conv_(out, x, weight, *affine, gate)
    return out


def _pointwise_grad_weight(x: Tensor | Encoded, dy: Tensor) -> Tensor:
    if isinstance(x, Encoded):
        return _ops.pointwise_conv_grad_weight(x.y, dy, *NO_PROLOGUE, None).mul_(x.unit)
    return _ops.pointwise_conv_grad_weight(x, dy, *NO_PROLOGUE, None)


def explicit(method: Callable) -> Callable:
    """Without autograd and autocast: every gradient and every cast is written out."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            if not any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                return method(*args, **kwargs)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return method(*args, **kwargs)

    return run


def _plus(total: Tensor | None, addend: Tensor) -> Tensor:
    return addend if total is None else total.add_(addend)


def _depthwise(x: Tensor | Encoded, weight: Tensor, affine: Affine, stride: int) -> Tensor:
    """The depthwise convolution through its prologue."""
    if isinstance(x, Encoded):
        return _ops.depthwise_conv(x.y, weight * x.unit, *affine, stride)
    return _ops.depthwise_conv(x, weight, *affine, stride)


def _depthwise_grad_weight(x: Tensor | Encoded, dy: Tensor, affine: Affine, kernel: int, stride: int) -> Tensor:
    if isinstance(x, Encoded):
        return _ops.depthwise_conv_grad_weight(x.y, dy, *affine, kernel, stride).mul_(x.unit)
    return _ops.depthwise_conv_grad_weight(x, dy, *affine, kernel, stride)


def rows(v: Any, chunk: slice) -> Any:
    """``v[chunk]`` of a map, an encoded one or None; itself where that is all of it."""
    return v if v is None or chunk.stop - chunk.start == v.shape[0] else v[chunk]


def join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """What was computed chunk by chunk."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Squeezed(NamedTuple):
    """Squeeze-excite's vectors; None where there is none."""

    gate: Tensor | None  # [N, E]
    hidden: Tensor | None  # [N, R]
    pooled: Tensor | None  # [N, E]


def _squeeze(d: Tensor, norm1: Norm, weights: Weights) -> Squeezed:
    """``gate = SE(pooled)``, ``pooled = mean_hw h(BN_1(d))``."""
    if weights.squeeze is None:
        return Squeezed(None, None, None)
    pooled = _ops.bn_act_squeeze(d, *norm1.affine, "hardswish")
    matrices = (weights.squeeze.flatten(1), weights.squeeze_bias, weights.excite.flatten(1), weights.excite_bias)
    return Squeezed(*_ops.se_gate(pooled, *matrices), pooled)


def _observe(x: Tensor, norm: nn.BatchNorm2d, update: bool) -> Norm:
    """What ``norm`` does to x; in training its running statistics are updated once, as PyTorch does."""
    if not norm.training and norm.running_mean is not None:
        return _running(norm, norm.running_mean.clone())
    n, c, h, w = x.shape
    count = n * h * w
    if norm.training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    mean, var = _ops.bn_stats(x)
    tracked = (None, None, None)
    if update and norm.training and norm.track_running_stats:
        tracked = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    fold = _ops.bn_fold(mean, var, norm.weight, norm.bias, *tracked, norm.momentum, count, norm.eps)
    return Norm(mean, *fold, True)


def _running(norm: nn.BatchNorm2d, mean: Tensor) -> Norm:
    fold = _ops.bn_fold(mean, norm.running_var, norm.weight, norm.bias, None, None, None, 0.0, 1, norm.eps)
    return Norm(mean, *fold, False)


def _parameters(layer: ConvNormAct) -> tuple[Tensor, Tensor, Tensor]:
    norm = layer.norm
    return layer.conv.weight, norm.weight, norm.bias


def _se_parameters(se: SqueezeExcite) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, squeeze, _, excite, _ = se.se
    return squeeze.weight, squeeze.bias, excite.weight, excite.bias


class FusedMBConv:
    """The branch of an :class:`revbifpn.mbconv.MBConv` that :func:`why_not_fused` has nothing against.

    Args:
        module: the MBConv.
        dtype: of the planes.
        lean: its planes are the network's largest: compute d again in every pass of the backward instead of keeping it.
    """

    def __init__(self, module: MBConv, dtype: torch.dtype, *, lean: bool = False) -> None:
        self.module, self.dtype, self.lean = module, dtype, lean
        expand, depthwise, project = module.exp_conv, module.dw_conv, module.project_conv
        self.stride = depthwise.conv.stride[0]
        self.norms = (None if expand is None else expand.norm, depthwise.norm, project.norm)
        self.weights = Weights(
            *((None,) * 3 if expand is None else _parameters(expand)),
            *_parameters(depthwise),
            *((None,) * 4 if module.se is None else _se_parameters(module.se)),
            *_parameters(project),
        )

    def parameters(self) -> list[Tensor]:
        return [w for w in self.weights if w is not None]

    def named(self, parameters: Sequence[Tensor]) -> Weights:
        """:meth:`parameters` by name, for other values of them."""
        given = iter(parameters)
        return Weights(*(None if w is None else next(given) for w in self.weights))

    def chunks(self, shape: Sequence[int], device: torch.device, planes: int = 1) -> list[slice]:
        """The chunks of samples of an input that everything is computed in, the same in forward and backward.

        ``planes``: how many times :data:`CHUNK_BYTES` a chunk of the widest plane takes.
        """
        n, _, h, w = shape
        plane = self.weights.depthwise.shape[0] * h * w * self.dtype.itemsize
        size = max(1, planes * CHUNK_BYTES.get(device.type, 1 << 28) // max(1, plane))
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def forward_chunks(self, shape: Sequence[int], device: torch.device) -> list[slice]:
        """Likewise of the forward. The C++ convolutions need no memory and are the same bits in any chunks: one."""
        return [slice(0, shape[0])] if device.type == "cpu" else self.chunks(shape, device)

    def read(self, x: Tensor | Encoded, chunk: slice | None = None) -> Tensor | Encoded:
        """Samples of the input as the first convolution takes them: in C++ that converts while it reads."""
        converts = self.weights.expand is not None or self.dtype == torch.float32
        x = x if chunk is None else rows(x, chunk)
        return x if converts and x.device.type == "cpu" else x.to(self.dtype)

    # Forward ------------------------------------------------------------------------------------

    def evaluate(self, x: Tensor | Encoded, update: bool = True) -> Contribution:
        """The contribution with the module as it is now; ``update``: running statistics move, once."""
        return self.infer(x) if self.is_frozen() else self.compute(x, update)[0]

    def is_frozen(self) -> bool:
        """Running statistics everywhere and nothing random: every sample is computed on its own."""
        m = self.module
        random = m.training and m.stochastic_depth > 0
        return not random and not any(n.training or n.running_mean is None for n in self.norms if n is not None)

    @explicit
    def infer(self, x: Tensor | Encoded) -> Contribution:
        """The contribution from running statistics, by chunks of samples: planes stay in cache, norms are folded."""
        weights = self.weights
        norm0, norm1, norm2 = (None if n is None else _running(n, n.running_mean) for n in self.norms)
        affine0 = NO_PROLOGUE if norm0 is None else norm0.affine
        n, _, h, w = x.shape
        p = self._plane(n, weights.project.shape[0], -(-h // self.stride), -(-w // self.stride))
        for chunk in self.chunks(x.shape, x.device, planes=4):
            source = self.read(x, chunk)
            if weights.expand is not None:
                e = self._plane(source.shape[0], weights.depthwise.shape[0], h, w)
                source = _pointwise(weights.expand, source, NO_PROLOGUE, None, e)
            d = _depthwise(source, weights.depthwise, affine0, self.stride)
            _pointwise(weights.project, d, norm1.affine, _squeeze(d, norm1, weights).gate, rows(p, chunk))
        contribution = self._contribution(p, FusedRecord((norm0, norm1, norm2)))
        check_finite(self.module, contribution.p, contribution.scale, contribution.shift)
        return contribution

    def record(self, x: Tensor | Encoded) -> tuple[Contribution, FusedRecord]:
        """The contribution and what its recompute needs; running statistics are updated here, once."""
        contribution, record, _ = self.compute(x)
        return contribution, record

    @explicit
    def compute(self, x: Tensor | Encoded, update: bool = True) -> tuple[Contribution, FusedRecord, Tensor]:
        """The contribution, its record and d."""
        weights, norms = self.weights, self.norms
        p, record, d = self._run(x, weights, lambda k, plane: _observe(plane, norms[k], update))
        record = record._replace(keep=self._draw_keep(x))
        contribution = self._contribution(p, record)
        check_finite(self.module, contribution.p, contribution.scale, contribution.shift)
        return contribution, record, d

    def _run(
        self, x: Tensor, weights: Weights, observe: Callable[[int, Tensor], Norm]
    ) -> tuple[Tensor, FusedRecord, Tensor]:
        """``p``, the record without keep, and d; ``observe(k, plane)`` gives what ``BN_k`` applies to a plane."""
        chunks, norm0, affine0 = self.forward_chunks(x.shape, x.device), None, NO_PROLOGUE
        if weights.expand is None:
            source = self.read(x)
        else:
            source = self._plane(x.shape[0], weights.depthwise.shape[0], *x.shape[2:])
            for chunk in chunks:
                _pointwise(weights.expand, self.read(x, chunk), NO_PROLOGUE, None, rows(source, chunk))
            norm0 = observe(0, source)
            affine0 = norm0.affine
        d = _depthwise(source, weights.depthwise, affine0, self.stride)
        del source
        norm1 = observe(1, d)
        p = self._plane(x.shape[0], weights.project.shape[0], *d.shape[2:])
        for chunk in chunks:
            chunk_d = rows(d, chunk)
            gate = _squeeze(chunk_d, norm1, weights).gate
            _pointwise(weights.project, chunk_d, norm1.affine, gate, rows(p, chunk))
        return p, FusedRecord((norm0, norm1, observe(2, p))), d

    def _plane(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.weights.depthwise.device)

    def _renew(self, record: FusedRecord, weights: Weights, x: Tensor) -> FusedRecord:
        """The record with batch statistics of the recovered x: norms then cancel part of its error, as usual.

        Worth its reductions in float64 alone, which is there to be exact.
        """
        norms = self.norms

        def observe(k: int, plane: Tensor) -> Norm:
            if not record.norms[k].batch:
                return record.norms[k]
            mean, var = _ops.bn_stats(plane)
            weight, bias = ((weights.gamma0, weights.beta0), (weights.gamma1, weights.beta1), weights[-2:])[k]
            fold = _ops.bn_fold(mean, var, weight, bias, None, None, None, 0.0, 1, norms[k].eps)
            return Norm(mean, *fold, True)

        return self._run(x, weights, observe)[1]._replace(keep=record.keep)

    def _draw_keep(self, x: Tensor) -> Tensor | None:
        drop = self.module.stochastic_depth
        if not self.module.training or drop == 0.0:
            return None
        keep = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
        return keep.bernoulli_(1 - drop).div_(1 - drop)[:, 0, 0, 0]

    @staticmethod
    def _contribution(p: Tensor, record: FusedRecord) -> Contribution:
        """``keep BN_2(p)`` as the coupling's affine: ``[C']``, or ``[N, C']`` with stochastic depth."""
        norm = record.norms[2]
        scale, shift = norm.affine
        if record.keep is not None:
            scale, shift = record.keep[:, None] * scale, record.keep[:, None] * shift
        return Contribution(p, scale, shift, norm.mean)

    # Backward -----------------------------------------------------------------------------------

    @explicit
    def recompute(
        self, record: FusedRecord, parameters: Sequence[Tensor], inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Contribution, Pullback]:
        """The contribution again (without reductions, except in float64) and its vector-Jacobian product."""
        (x,) = inputs
        weights = self.named(parameters)
        if x.dtype == torch.float64:
            record = self._renew(record, weights, x)
        replay = self.replay(x, record, weights)
        replay.keep(d=not self.lean, e=not self.lean)
        return self._contribution(replay.p, record), self._pullback(replay)

    def replay(self, x: Tensor | Encoded, record: FusedRecord, weights: Weights) -> Replay:
        """The backward on a given input."""
        return Replay(self, x.shape, x.device, lambda chunk: self.read(x, chunk), record, weights)

    @explicit
    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, on what the forward computes, which is kept."""
        x = inputs[0].clone()
        contribution, record, d = self.compute(x)
        return self.restore(record, parameters, x, d, contribution.p)

    @explicit
    def restore(
        self, record: FusedRecord, parameters: Sequence[Tensor], x: Tensor, d: Tensor, p: Tensor
    ) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, from a stored d and p; p is overwritten."""
        replay = self.replay(x, record, self.named(parameters))
        replay.put(d, p)
        return self._contribution(p, record), self._pullback(replay)

    @staticmethod
    def _pullback(replay: Replay) -> Pullback:
        def pullback(du: Tensor, sums: Tensor, into: Sequence[Gradient | None]) -> list[Tensor | None]:
            return replay.pull(du, sums, None if into[0] is None else adder(into[0].tensor()))

        return pullback


Emit = Callable[[slice, Tensor], None]  # takes the input's gradient, a chunk of samples at a time


def adder(total: Tensor) -> Emit:
    def emit(chunk: slice, dx: Tensor) -> None:
        rows(total, chunk).add_(dx)

    return emit


class Replay:
    """The backward of one MBConv, in passes over chunks of samples.

    Args:
        shape, device: of the input x, ``[N, C, H, W]``.
        source: gives a chunk of the input x; it may compute it.
        record, weights: of the forward.

    Attributes:
        squeezed: squeeze-excite's vectors of the chunks seen so far, by their first sample.
        e, d: chunks of the expanded map and of the depthwise output, likewise, where they are kept.
        p: the projection's output for all samples, where it is kept. What is not is computed again in every pass.
    """

    def __init__(
        self,
        branch: FusedMBConv,
        shape: Sequence[int],
        device: torch.device,
        source: Callable[[slice], Tensor],
        record: FusedRecord,
        weights: Weights,
    ) -> None:
        self.x, self.record, self.w = source, record, weights
        self.dtype, self.device, self.chunks = branch.dtype, device, branch.chunks(shape, device)
        self.n, _, self.height, self.width = shape
        self.stride = branch.stride
        self.out_size = (-(-self.height // self.stride), -(-self.width // self.stride))
        self.expanded, self.channels = weights.depthwise.shape[0], weights.project.shape[0]
        norm0, norm1, norm2 = record.norms
        self.affine0 = NO_PROLOGUE if norm0 is None else norm0.affine
        self.affine1, self.affine2 = norm1.affine, norm2.affine
        self.squeezed: dict[int, Squeezed] = {}
        self.e: dict[int, Tensor] = {}
        self.d: dict[int, Tensor] = {}
        self.p: Tensor | None = None

    def _source(self, chunk: slice) -> Tensor | Encoded:
        """``e`` or ``x``: what the depthwise convolution reads (through its prologue)."""
        if chunk.start in self.e:
            return self.e[chunk.start]
        x = self.x(chunk)
        if self.w.expand is None:
            return x
        e = self._plane(self.expanded, (self.height, self.width), x.shape[0])
        return _pointwise(self.w.expand, x, NO_PROLOGUE, None, e)

    def _d(self, chunk: slice, source: Tensor | None = None) -> Tensor:
        if chunk.start in self.d:
            return self.d[chunk.start]
        source = self._source(chunk) if source is None else source
        return _depthwise(source, self.w.depthwise, self.affine0, self.stride)

    def _gate(self, d: Tensor, chunk: slice) -> Tensor | None:
        if chunk.start not in self.squeezed:
            self.squeezed[chunk.start] = _squeeze(d, self.record.norms[1], self.w)
        return self.squeezed[chunk.start].gate

    def p_of(self, chunk: slice, d: Tensor | None = None) -> Tensor:
        """A chunk of p."""
        if self.p is not None:
            return rows(self.p, chunk)
        d = self._d(chunk) if d is None else d
        return self._project(d, chunk, self._plane(self.channels, samples=d.shape[0]))

    def _project(self, d: Tensor, chunk: slice, p: Tensor) -> Tensor:
        return _pointwise(self.w.project, d, self.affine1, self._gate(d, chunk), p)

    def put(self, d: Tensor, p: Tensor) -> None:
        """Keep d and p of the forward; p will be overwritten."""
        self.d = {chunk.start: rows(d, chunk) for chunk in self.chunks}
        self.p = p

    def keep(self, *, d: bool = False, e: bool = False) -> None:
        """Compute and keep p for all samples, and d and e if asked for."""
        p = self._plane(self.channels)
        for chunk in self.chunks:
            source = self._source(chunk)
            chunk_d = self._d(chunk, source)
            if d:
                self.d[chunk.start] = chunk_d
            if e and self.w.expand is not None:
                self.e[chunk.start] = source
            self._project(chunk_d, chunk, rows(p, chunk))
        self.p = p

    def _plane(self, channels: int, size: tuple[int, int] | None = None, samples: int | None = None) -> Tensor:
        shape = (self.n if samples is None else samples, channels, *(size or self.out_size))
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def sums(self, du: Tensor) -> Tensor:
        """``[2, N, C']``: ``sum_hw du`` and ``sum_hw du (p - mean)``, what the coupling's adjoint gives along."""
        return join([self.chunk_sums(rows(du, chunk), self.p_of(chunk)) for chunk in self.chunks], 1)

    def chunk_sums(self, du: Tensor, p: Tensor) -> Tensor:
        return revkernels.couple_adjoint(du, [1], p=[p], center=[self.record.norms[2].mean])[1][0]

    @explicit
    def pull(self, du: Tensor, sums: Tensor, emit: Emit | None, dz: Tensor | None = None) -> list[Tensor | None]:
        """Gradients of the parameters that want one; the input's goes to ``emit``.

        Args:
            du: gradient of ``keep BN_2(p)``, ``[N, C', H', W']``.
            sums: see :meth:`sums`.
            emit: takes the input's gradient; None where it is not wanted.
            dz: where the gradient of the projection's input may be written, ``[N, E, H', W']``; du itself is allowed.
                By default over p, which is done with then, where it has that shape.
        """
        w, record = self.w, self.record
        n, positions = self.n, self.n * self.out_size[0] * self.out_size[1]
        norm0, norm1, norm2 = record.norms

        # result = keep BN_2(p)
        gate2 = None
        if record.keep is not None:
            gate2 = record.keep[:, None].expand(n, self.channels)
        dgamma2, dbeta2, slope2, offset2 = norm2.gradient(sums, positions, gate2)

        # p = W_p z, z = gate h(BN_1(d))
        if dz is None:
            dz = self.p if self.p is not None and self.channels == self.expanded else self._plane(self.expanded)
        dproject, sums1 = None, []
        for chunk in self.chunks:
            d, chunk_dz = self._d(chunk), rows(dz, chunk)
            dp = _ops.bn_act_grad(
                *(rows(du, chunk), self.p_of(chunk, d), *self.affine2),
                *(rows(gate2, chunk), None, slope2, offset2, "identity"),
            )
            dw = _ops.pointwise_conv_grad_weight(d, dp, *self.affine1, self._gate(d, chunk))
            dproject = _plus(dproject, dw)
            _pointwise(w.project.transpose(0, 1), dp, NO_PROLOGUE, None, chunk_dz)
            sums1.append(_ops.bn_act_grad_sums(chunk_dz, d, *self.affine1, norm1.mean, "hardswish"))
        self.p, sums1 = None, join(sums1, 1)

        # gate = SE(mean_hw h(BN_1(d))): every pixel of h gets dpool on top of gate dz
        dpool, dse, gate = None, (None,) * 4, None
        if w.squeeze is not None:
            gate, hidden, pooled = map(join, zip(*self.squeezed.values(), strict=True))
            dpool, dw1, db1, dw2, db2 = _ops.se_gate_grad(
                sums1[0], gate, hidden, pooled, w.squeeze.flatten(1), w.excite.flatten(1)
            )
            dpool.div_(self.out_size[0] * self.out_size[1])
            dse = (dw1.view_as(w.squeeze), db1, dw2.view_as(w.excite), db2)
        dgamma1, dbeta1, slope1, offset1 = norm1.gradient(sums1, positions, gate, dpool)

        # d = dw(v), v = h(BN_0(e)) or x
        kernel = w.depthwise.shape[-1]
        ddepthwise, dv, sums0 = None, [], []
        plane = None  # for dv, where it comes in several chunks
        if w.expand is not None and len(self.chunks) > 1:
            plane = dz if self.stride == 1 else self._plane(self.expanded, (self.height, self.width))
        for chunk in self.chunks:
            source = self._source(chunk)
            dd = _ops.bn_act_grad(
                *(rows(dz, chunk), self._d(chunk, source), *self.affine1),
                *(rows(gate, chunk), rows(dpool, chunk), slope1, offset1, "hardswish"),
            )
            product = _depthwise_grad_weight(source, dd, self.affine0, kernel, self.stride)
            ddepthwise = _plus(ddepthwise, product)
            if w.expand is None and emit is None:
                continue
            dsource = _ops.depthwise_conv_grad_input(dd, w.depthwise, self.height, self.width, self.stride)
            if w.expand is None:
                emit(chunk, dsource)
                continue
            dv.append(dsource if plane is None else plane[chunk].copy_(dsource))
            sums0.append(_ops.bn_act_grad_sums(dsource, source, *self.affine0, norm0.mean, "hardswish"))
        self.d.clear()
        del dz, plane
        dexpand = (None,) * 3 if w.expand is None else self._pull_expand(dv, join(sums0, 1), emit)
        gradients = (*dexpand, ddepthwise, dgamma1, dbeta1, *dse, dproject, dgamma2, dbeta2)
        return [g if v.requires_grad else None for g, v in zip(gradients, w, strict=True) if v is not None]

    def _pull_expand(self, dv: Sequence[Tensor], sums0: Tensor, emit: Emit | None) -> tuple[Tensor, Tensor, Tensor]:
        """``v = h(BN_0(e))``, ``e = W_e x``; dv in chunks."""
        w, norm0 = self.w, self.record.norms[0]
        dgamma0, dbeta0, slope0, offset0 = norm0.gradient(sums0, self.n * self.height * self.width)
        dexpand = None
        for chunk, chunk_dv in zip(self.chunks, dv, strict=True):
            x = self.x(chunk)
            e = self._source(chunk)
            de = _ops.bn_act_grad(chunk_dv, e, *self.affine0, None, None, slope0, offset0, "hardswish")
            dexpand = _plus(dexpand, _pointwise_grad_weight(x, de))
            if emit is not None:
                dx = self._plane(x.shape[1], (self.height, self.width), x.shape[0])
                emit(chunk, _pointwise(w.expand.transpose(0, 1), de, NO_PROLOGUE, None, dx))
        self.e.clear()
        return dexpand, dgamma0, dbeta0
