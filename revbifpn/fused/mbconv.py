"""MBConv as a branch: :mod:`revkernels`' three ops of it, one call each, with no autograd graph inside.

``mbconv`` computes ``p`` and the norms, ``mbconv_recompute`` p again from the norms, ``mbconv_backward`` the
vector-Jacobian product; the equations are in :mod:`revkernels.reference_mbconv`. The result of the branch,
``keep BN_2(p)`` with stochastic depth, is left to the coupling.

The forward saves the norms and the keep factors, nothing else: ``O(C + N)`` numbers. So the recompute has no sums over
samples and draws no random numbers: it is computed a chunk of samples at a time, as is the backward up to the
per-channel sums that batch statistics need. Only one full plane per branch exists, p, over which the gradient of the
projection's input is written.

Under autocast the planes e, d, p and their gradients are of its dtype; statistics, gates and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

import revkernels  # noqa: F401  defines the ops
from revbifpn.engine.anomaly import check_finite
from revbifpn.engine.branch import Contribution, Gradient, Pullback
from revbifpn.fused.eligible import inspected, is_constant_norm
from revbifpn.mbconv import MBConv
from revbifpn.streams import HALVES, Encoded, Values
from revkernels.precision import convolution_precision, with_products_in
from revkernels.workspace import MBConvShape, mbconv_backward_bytes, mbconv_bytes, mbconv_recompute_bytes

P = ParamSpec("P")
R = TypeVar("R")

_forward = torch.ops.revkernels.mbconv.default
_recompute = torch.ops.revkernels.mbconv_recompute.default
_backward = torch.ops.revkernels.mbconv_backward.default

# Bytes of a chunk of samples of the widest plane: a few fit a core's cache on a CPU; on a GPU, microseconds of memory.
CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 23}
LIMIT = 256  # sizes of inputs that an MBConv remembers
_chunk_bytes: ContextVar[int | None] = ContextVar("chunk_bytes", default=None)


def chunk_bytes(device: torch.device) -> int:
    """How many bytes of its widest plane a branch computes at a time."""
    return _chunk_bytes.get() or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Forwards in here, and their backwards, have chunks of ``size`` bytes on any device."""
    token = _chunk_bytes.set(size)
    try:
        yield
    finally:
        _chunk_bytes.reset(token)


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

    @property
    def convolutions(self) -> tuple[Tensor | None, ...]:
        return self[0], self[3], self[6], self[7], self[8], self[9], self[10]


class Affine(NamedTuple):
    """The last norm, ``[C']`` each: views of the norms."""

    mean: Tensor
    scale: Tensor
    shift: Tensor
    both: Tensor | None  # [2, 1, C'], scale and shift, where they are to be multiplied by keep


class FusedRecord(NamedTuple):
    """What one forward saved: ``O(C + N)`` numbers."""

    norms: Tensor  # [4, E + E + C'], see revkernels.reference_mbconv
    batch: tuple[bool, ...]  # which norms took the batch's statistics
    affine: Affine
    shape: MBConvShape
    keep: Tensor | None = None  # [N], 0 or 1 / (1 - p)
    precision: str | None = None  # of the 1x1 convolutions' products, see revkernels.precision


class Kept(NamedTuple):
    """Planes of a forward that its backward need not compute again."""

    p: Tensor | None = None  # [N, C', H', W']; the backward may write over it
    d: Tensor | None = None  # [N, E, H', W']
    e: Tensor | None = None  # [N, E, H, W]
    squeezed: Tensor | None = None


def explicit(method: Callable[P, R]) -> Callable[P, R]:
    """Without autograd and autocast: every gradient and every cast is written out."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        casts = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if not casts and not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return method(*args, **kwargs)

    return run


def stored(x: Values) -> tuple[Tensor, int | None]:
    """x as the ops take it: a tensor, and what makes its integers values."""
    return (x.y, x.bits) if isinstance(x, Encoded) else (x, None)


Place = tuple[dict[str | None, Any], str | None]
"""Where a module keeps a tensor: a dict of its own, and the name there."""

_ABSENT: Place = ({None: None}, None)


def _found(places: Sequence[Place]) -> list[Tensor | None]:
    """What is there now: a name may stand for another tensor than in the last pass."""
    return [place[name] for place, name in places]


class NormCall(NamedTuple):
    """How the three norms of an MBConv are called in a mode, as the forward takes it."""

    batch: tuple[bool, ...]  # which take the batch's statistics
    momentum: list[float]
    eps: list[float]
    running: list[Place]  # mean, variance and count of each: to be updated, or used where it takes no statistics


class Layers:
    """What is the same of one MBConv for as long as it is made of the same parts with the same settings."""

    def __init__(self, modules: dict[str, Any]) -> None:
        self.stride: int = modules["dw_conv"]._modules["conv"].stride[0]
        self.norms: tuple[Any, ...] = ()  # BatchNorm2d, FrozenBatchNorm2d or None
        self.shapes: dict[Hashable, tuple[MBConvShape, MBConvShape]] = {}
        self._calls: dict[Hashable, NormCall] = {}
        places: list[Place] = []
        for name in ("exp_conv", "dw_conv", "project_conv"):
            if name == "project_conv":
                places += self._squeeze_excite(modules.get("se"))
            layer = modules.get(name)
            if layer is None:
                self.norms += (None,)
                places += [_ABSENT] * 3
                continue
            norm = layer._modules["norm"]
            self.norms += (norm,)
            affine = norm._buffers if is_constant_norm(norm) else norm._parameters
            places += [(layer._modules["conv"]._parameters, "weight"), (affine, "weight"), (affine, "bias")]
        self._places = places
        self._moded = [n for n in self.norms if n is not None]

    @staticmethod
    def _squeeze_excite(se: nn.Module | None) -> list[Place]:
        if se is None:
            return [_ABSENT] * 4
        layers: dict[str, Any] = se._modules["se"]._modules  # type: ignore[union-attr]
        return [(layers[k]._parameters, name) for k in ("1", "3") for name in ("weight", "bias")]

    def weights(self) -> Weights:
        """The parameters now."""
        return Weights._make(_found(self._places))

    def norm_call(self, update: bool) -> NormCall:
        """In the mode that the norms are in; ``update``: their running statistics are to move."""
        mode = (update, *[n.training for n in self._moded])
        found = self._calls.get(mode)
        if found is None:
            found = self._calls[mode] = self._norm_call(update)
        return found

    def _norm_call(self, update: bool) -> NormCall:
        batch = tuple(
            n is not None and not is_constant_norm(n) and (n.training or n._buffers["running_mean"] is None)
            for n in self.norms
        )
        running: list[Place] = []
        for norm, from_batch in zip(self.norms, batch, strict=True):
            if norm is None or (from_batch and not (update and norm.training and norm.track_running_stats)):
                running += [_ABSENT] * 3
            else:
                running += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]
                running += [(norm._buffers, "num_batches_tracked") if from_batch else _ABSENT]
        return NormCall(
            batch,
            [n.momentum if from_batch else 0.0 for n, from_batch in zip(self.norms, batch, strict=True)],
            [0.0 if n is None else n.eps for n in self.norms],
            running,
        )


class FusedMBConv:
    """The branch of an :class:`revbifpn.mbconv.MBConv` that :func:`revbifpn.fused.eligible.why_not_fused` let pass.

    Args:
        module: an MBConv.
        dtype: of the planes.
        lean: its planes are the network's largest: compute d again in every pass of the backward instead of keeping it.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, lean: bool = False) -> None:
        self.module, self.dtype, self.lean = cast(MBConv, module), dtype, lean
        found = inspected(module)
        layers: Layers | None = found.kept.get(Layers)
        if layers is None:  # attributes of modules cost ten times as much as their dicts, and this runs in every step
            layers = found.kept[Layers] = Layers(cast(dict[str, Any], module._modules))
        self.layers, self.stride = layers, layers.stride
        self.reduced = found.reduced  # parameters or statistics are to be read as float32
        self.weights = layers.weights()
        self._parameters = [w for w in self.weights if w is not None]
        self.expanded: int = self.weights.depthwise.shape[0]
        self.channels: int = self.weights.project.shape[0]

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def named(self, parameters: Sequence[Tensor]) -> Weights:
        """:meth:`parameters` by name, for other values of them, as ops take them."""
        given = iter(map(_single, parameters) if self.reduced else parameters)
        return Weights._make([None if w is None else next(given) for w in self.weights])

    def out_size(self, x: Values) -> tuple[int, int]:
        """Height and width of d and p."""
        return -(-x.shape[2] // self.stride), -(-x.shape[3] // self.stride)

    def chunk(self, x: Values, planes: int = 1) -> int:
        """Samples of x that are computed at a time; ``planes``: how many times the usual size."""
        _, _, h, w = x.shape
        plane = self.expanded * h * w * self.dtype.itemsize
        return max(1, planes * chunk_bytes(x.device) // max(1, plane))

    def _shapes(self, x: Values) -> tuple[MBConvShape, MBConvShape]:
        """The sizes with the chunks of the backward, and with those of a forward without sums over samples."""
        encoded = isinstance(x, Encoded)
        key = (x.shape, x.dtype, encoded, self.dtype, x.device.type, chunk_bytes(x.device))
        shapes = self.layers.shapes
        found = shapes.get(key)
        if found is None:
            if len(shapes) >= LIMIT:
                shapes.clear()
            shape = self._shape(x, encoded)
            # All planes of a chunk come at once then. cuBLAS wants the chunks of the backward.
            found = shape, shape if x.device.type != "cpu" else shape._replace(chunk=self.chunk(x, 4))
            shapes[key] = found
        return found

    def _shape(self, x: Values, encoded: bool) -> MBConvShape:
        w, on_cpu = self.weights, x.device.type == "cpu"
        samples, channels, height, width = x.shape
        return MBConvShape(
            samples,
            channels,
            height,
            width,
            self.expanded,
            self.channels,
            0 if w.squeeze is None else w.squeeze.shape[0],
            w.depthwise.shape[-1],
            self.stride,
            self.chunk(x),
            w.expand is not None,
            self.dtype.itemsize,
            max(4, w.project.dtype.itemsize),
            scaled=encoded and on_cpu,
            converted=not on_cpu and (encoded or x.dtype != self.dtype),
        )

    @staticmethod
    def _of(record: FusedRecord, x: Values) -> MBConvShape:
        """The recorded shape, or that of some of its samples."""
        shape, samples = record.shape, x.shape[0]
        return shape if shape.n == samples else shape._replace(n=samples)

    def plane(self, x: Values, channels: int, size: Sequence[int]) -> Tensor:
        return torch.empty((x.shape[0], channels, *size), dtype=self.dtype, device=x.device)

    # Forward ------------------------------------------------------------------------------------

    def evaluate(self, *inputs: Values, update: bool = True) -> Contribution:
        """The contribution with the module as it is now; ``update``: running statistics move, once."""
        return self.compute(*inputs, update=update)[0]

    def record(self, *inputs: Values) -> tuple[Contribution, FusedRecord]:
        """The contribution and what its recompute needs; running statistics are updated here, once."""
        contribution, record, _ = self.compute(*inputs)
        return contribution, record

    def is_frozen(self) -> bool:
        """Running statistics everywhere and nothing random: every sample is computed on its own."""
        return True not in self.layers.norm_call(False).batch and not self._drops()

    def _drops(self) -> bool:
        return self.module.training and self.module.stochastic_depth > 0

    @explicit
    def compute(
        self, x: Values, *, update: bool = True, keep_d: bool = False
    ) -> tuple[Contribution, FusedRecord, Tensor | None]:
        """The contribution, its record, and d if it is to be kept."""
        call, size = self.layers.norm_call(update), self.out_size(x)
        shape, once = self._shapes(x)
        if True in call.batch:
            self._expect_several(x, size, call.batch)
            once = shape
        precision = convolution_precision(x.device, self.dtype)
        p = self.plane(x, self.channels, size)
        d = self.plane(x, self.expanded, size) if keep_d else None
        buffers = _found(call.running)
        weights, running = self.weights, buffers
        if self.reduced:
            weights = self.named(self.parameters())
            running = [None if b is None else _single(b) for b in buffers]
        norms = self._norms(precision, weights, call, running, None, x, once, p, d)
        if self.reduced:  # what the op updated is kept in the buffers' own dtype
            for i, (b, single) in enumerate(zip(buffers, running, strict=True)):
                if b is not None and single is not None and call.batch[i // 3]:
                    b.copy_(single)
        keep = self._draw_keep(x) if self._drops() else None
        affine = self._affine(norms, scaled=keep is not None)
        record = FusedRecord(norms, call.batch, affine, shape, keep, precision)
        contribution = self.contribution(p, record)
        check_finite(self.module, p, contribution.scale, contribution.shift)
        return contribution, record, d

    def _norms(
        self,
        precision: str | None,
        weights: Weights,
        call: NormCall,
        running: Sequence[Tensor | None],
        norms: Tensor | None,
        x: Values,
        shape: MBConvShape,
        p: Tensor,
        d: Tensor | None,
    ) -> Tensor:
        """The forward into p and d; returns the norms."""
        size = mbconv_bytes(shape, batch=True in call.batch, d=d is not None)
        tail = (call.batch, call.momentum, call.eps, self.stride, shape.chunk, norms, p, d, _workspace(size, p))
        return with_products_in(precision, _forward, *stored(x), *weights, *running, *tail)

    def _expect_several(self, x: Values, size: tuple[int, int], batch: tuple[bool, ...]) -> None:
        """As PyTorch's BatchNorm: one value per channel has no variance."""
        n, _, h, w = x.shape
        if n * size[0] * size[1] > 1:
            return
        shapes = (n, self.expanded, h, w), (n, self.expanded, *size), (n, self.channels, *size)
        for from_batch, shape in zip(batch, shapes, strict=True):
            if from_batch and shape[0] * shape[2] * shape[3] == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {shape}; take a larger "
                    "batch or image, or running statistics with model.freeze_norms()"
                )

    def _draw_keep(self, x: Values) -> Tensor:
        drop = self.module.stochastic_depth
        keep = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
        return keep.bernoulli_(1 - drop).div_(1 - drop)

    def _affine(self, norms: Tensor, *, scaled: bool) -> Affine:
        last = norms.narrow(1, norms.shape[1] - self.channels, self.channels)
        mean, _, scale, shift = last.unbind()
        return Affine(mean, scale, shift, last.narrow(0, 2, 2).unsqueeze(1) if scaled else None)

    @staticmethod
    def contribution(p: Tensor, record: FusedRecord, keep: Tensor | None = None) -> Contribution:
        """``keep BN_2(p)`` as the coupling's affine: ``[C']``, or ``[N, C']`` with stochastic depth."""
        mean, scale, shift, both = record.affine
        keep = record.keep if keep is None else keep
        if keep is not None and both is not None:
            scale, shift = (keep.unsqueeze(1) * both).unbind()
        return Contribution(p, scale, shift, mean)

    # Backward -----------------------------------------------------------------------------------

    @explicit
    def recompute(
        self, record: FusedRecord, parameters: Sequence[Tensor], inputs: Sequence[Values], needs: Sequence[bool]
    ) -> tuple[Contribution, Pullback]:
        """The contribution again (without reductions, except in float64) and its vector-Jacobian product."""
        (x,) = inputs
        weights = self.named(parameters)
        if x.dtype == torch.float64:
            record = self._renew(record, weights, x)
        kept = self.again(x, record, weights, d=not self.lean, e=not self.lean)
        assert kept.p is not None
        return self.contribution(kept.p, record), self._pullback(x, record, weights, kept)

    def _renew(self, record: FusedRecord, weights: Weights, x: Values) -> FusedRecord:
        """The record with batch statistics of the recovered x: norms then cancel part of its error, as usual.

        Worth its reductions in float64 alone, which is there to be exact.
        """
        if True not in record.batch:
            return record
        p = self.plane(x, self.channels, self.out_size(x))
        call = self.layers.norm_call(False)._replace(batch=record.batch)
        norms = self._norms(record.precision, weights, call, [None] * 9, record.norms, x, record.shape, p, None)
        return record._replace(norms=norms, affine=self._affine(norms, scaled=record.keep is not None))

    def again(self, x: Values, record: FusedRecord, weights: Weights, *, d: bool = False, e: bool = False) -> Kept:
        """p, and d and e if they are to be kept, from the norms of the forward."""
        size = self.out_size(x)
        e = e and weights.expand is not None
        planes = (
            self.plane(x, self.channels, size),
            self.plane(x, self.expanded, size) if d else None,
            self.plane(x, self.expanded, x.shape[2:]) if e else None,
        )
        shape = self._of(record, x)
        workspace = _workspace(mbconv_recompute_bytes(shape, d=d, e=e), planes[0])
        tail = (record.norms, self.stride, shape.chunk, *planes, workspace)
        squeezed = with_products_in(record.precision, _recompute, *stored(x), *weights.convolutions, *tail)
        return Kept(*planes, squeezed)

    @explicit
    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Values]) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, on what the forward computes, which is kept."""
        x = inputs[0].clone()
        contribution, record, d = self.compute(x, keep_d=True)
        return contribution, self._pullback(x, record, self.named(parameters), Kept(contribution.p, d))

    @explicit
    def restore(
        self, record: FusedRecord, parameters: Sequence[Tensor], x: Values, d: Tensor, p: Tensor
    ) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, from a stored d and p; p is overwritten."""
        return self.contribution(p, record), self._pullback(x, record, self.named(parameters), Kept(p, d))

    def _pullback(self, x: Values, record: FusedRecord, weights: Weights, kept: Kept) -> Pullback:
        def pullback(
            du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None], *, spare: bool = False
        ) -> list[Tensor | None]:
            dx = None if into[0] is None else into[0].tensor()
            return self.pull(x, record, weights, kept, du, sums, dx)

        return pullback

    @explicit
    def pull(
        self,
        x: Values,
        record: FusedRecord,
        weights: Weights,
        kept: Kept,
        du: Tensor,
        sums: Tensor | None,
        dx: Tensor | None,
        *,
        add: bool = True,
        dz: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of the parameters that want one; the input's is added to dx, or written over it without ``add``.

        Args:
            kept: what need not be computed again.
            du: gradient of ``keep BN_2(p)``, ``[N, C', H', W']``.
            sums: ``[2, N, C']``, ``sum_hw du`` and ``sum_hw du (p - mean)``; None: computed here.
            dx: ``[N, C, H, W]``; None where it is not wanted. To be written over, it may be x, dz or du itself.
            dz: memory for the gradient of the projection's input, ``[N, E, H', W']``; du itself is allowed. By default
                over p, which is done with then, where it has that shape.
        """
        shape = self._of(record, x)
        size = mbconv_backward_bytes(
            shape,
            sums=sums is not None,
            p=kept.p is not None,
            d=kept.d is not None,
            e=kept.e is not None,
            squeezed=kept.squeezed is not None,
            dz=dz is not None,
            dx=dx is not None,
            add=add,
        )
        middle = (record.norms, record.batch, record.keep, self.stride, shape.chunk)
        tail = (*kept, dz, dx, add, _workspace(size, du))
        arguments = (du, sums, *stored(x), *weights.convolutions, *middle, *tail)
        gradients = with_products_in(record.precision, _backward, *arguments)
        return [g if w.requires_grad else None for g, w in zip(gradients, weights, strict=True) if w is not None]


def _single(weight: Tensor) -> Tensor:
    """A weight of 16 bits as float32, which wants a gradient where it does."""
    return weight.detach().float().requires_grad_(weight.requires_grad) if weight.dtype in HALVES else weight


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)
