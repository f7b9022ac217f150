"""A network in eval mode as a program: one call of :func:`torch.ops.revkernels.mbconv_infer_` for all its couplings.

At inference a small batch takes as long as Python needs to walk through blocks, couplings and branches. Nothing of that
depends on the images: which MBConv adds to which map, with which stride and upsampling, is written down once. What the
weights and statistics hold is read in every call, so that nothing can be out of date but the structure, which is
compared with what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, getitem
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from revbifpn.engine.coupling import Coupling, Part
from revbifpn.fused.coupling import taken_apart
from revbifpn.fused.eligible import Inspected, is_constant_norm, why_not_built_so
from revbifpn.fused.mbconv import chunk_bytes
from revkernels.reference_mbconv import ASSIGN, EXPANDS, SQUEEZES

_run = torch.ops.revkernels.mbconv_infer_.default

_dtype = attrgetter("dtype")
_ORDINARY = {Tensor, nn.Parameter}

CHUNKS = 4  # without sums over samples all planes of a chunk come at once


class Created(NamedTuple):
    """A map that starts from zero: of a map's size over a stride."""

    source: int
    stride: int
    channels: int


class Program:
    """Couplings whose transforms are MBConvs, upsampled or not, on maps of which the first ones are given.

    Args:
        couplings: in order; those that create a map make the next one.
        channels: of the maps that are given.

    Raises:
        NotFusedError: a coupling or transform is not of the kind.
    """

    def __init__(self, couplings: Iterable[Coupling], channels: Sequence[int]) -> None:
        self.channels, self.created = list(channels), list[Created]()
        self.terms, self.norms, self.branches = list[int](), list[Any](), list[nn.Module]()
        self._places: list[tuple[dict[str, Any], str]] = []  # of weights and statistics, as the op takes them
        self._modes = set[str]()
        for coupling in couplings:
            self._add(coupling)
        if len(self._modes) > 1:
            raise NotFusedError("upsampling is bilinear and nearest")
        self._columns = list(zip(*self._places, strict=True))

    def _add(self, coupling: Coupling) -> None:
        if coupling.linear or coupling.scale != 1:
            raise NotFusedError("a coupling has coefficients")
        target, assign = coupling.target, coupling.creates
        for source, transform in coupling.terms:
            mbconv, factor, mode = taken_apart(transform)
            reason = why_not_built_so(mbconv)
            if reason:
                raise NotFusedError(reason)
            layers: dict[str, Any] = mbconv._modules
            stride, channels = layers["dw_conv"].conv.stride[0], layers["project_conv"].conv.out_channels
            if assign:
                if target.level != len(self.channels):
                    raise NotFusedError("a map is created that is not the next one")
                self.channels.append(channels)
                self.created.append(Created(source.level, stride, channels))
            flags = assign * ASSIGN
            if layers.get("exp_conv") is None:
                self.norms.append(None)
            else:
                flags += EXPANDS
                self._take(layers["exp_conv"])
            self._take(layers["dw_conv"])
            if layers.get("se") is not None:
                flags += SQUEEZES
                inner = layers["se"]._modules["se"]._modules
                self._places += [(inner[k]._parameters, name) for k in ("1", "3") for name in ("weight", "bias")]
            self._take(layers["project_conv"])
            where = target.level, self._first(target), source.level, self._first(source)
            self.terms += [*where, stride, factor, flags]
            self.branches.append(mbconv)
            if factor > 1:
                self._modes.add(mode)
            assign = False

    def _first(self, part: Part) -> int:
        """The first channel of a part."""
        return self.channels[part.level] - self.channels[part.level] // 2 if part.half == 1 else 0

    def _take(self, layer: nn.Module) -> None:
        """A convolution's weight, and its norm's gamma, beta, mean and variance."""
        modules: dict[str, Any] = layer._modules
        norm = modules["norm"]
        affine = norm._buffers if is_constant_norm(norm) else norm._parameters
        self._places += [(modules["conv"]._parameters, "weight"), (affine, "weight"), (affine, "bias")]
        self._places += [(norm._buffers, "running_mean"), (norm._buffers, "running_var")]
        self.norms.append(norm)

    def tensors(self, x: Tensor) -> list[Tensor] | None:
        """All weights and statistics; None where they are not ordinary tensors of the dtype of x."""
        found = list(map(getitem, *self._columns))
        return found if set(map(type, found)) <= _ORDINARY and set(map(_dtype, found)) == {x.dtype} else None

    def is_evaluated(self) -> bool:
        """Whether all norms take running statistics and nothing is random."""
        return not any(m.training for m in self.branches) and not any(n is not None and n.training for n in self.norms)

    def __call__(self, maps: Sequence[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        """All maps at the end; those given are updated. ``tensors``: :meth:`tensors`."""
        found = list(maps)
        for source, stride, channels in self.created:
            n, _, h, w = found[source].shape
            found.append(found[0].new_empty((n, channels, -(-h // stride), -(-w // stride))))
        eps = [0.0 if norm is None else norm.eps for norm in self.norms]
        mode = next(iter(self._modes), "nearest")
        _run(found, tensors, self.terms, eps, mode, CHUNKS * chunk_bytes(found[0].device))
        return found


class NotFusedError(Exception):
    """There is no program for these couplings."""


class Programs:
    """The programs of networks, each kept as long as its network lives and is built so.

    Args:
        build: the program of a network; may raise :class:`NotFusedError`.
    """

    def __init__(self, build: Callable[[Any], Program]) -> None:
        self.build = build
        self._inspected: WeakKeyDictionary[nn.Module, Inspected] = WeakKeyDictionary()
        self._programs: WeakKeyDictionary[Inspected, Program | None] = WeakKeyDictionary()

    def of(self, network: nn.Module) -> Program | None:
        """The program that stands for the parts of ``network`` in eval mode; None where there is none."""
        inspected = self._inspected.get(network)
        if inspected is None or not inspected.is_same():
            inspected = self._inspected[network] = Inspected(network, itself=False)
        if not inspected.is_bare():
            return None
        if inspected not in self._programs:
            self._programs[inspected] = self._built(network)
        program = self._programs[inspected]
        return program if program is not None and program.is_evaluated() else None

    def _built(self, network: nn.Module) -> Program | None:
        try:
            return self.build(network)
        except NotFusedError:
            return None
