"""A network in eval mode as a program: one call of :func:`torch.ops.revkernels.mbconv_infer_` for all its couplings.

At inference a small batch takes as long as Python needs to walk through blocks, couplings and branches. Nothing of that
depends on the images: which MBConv adds to which map, with which stride and upsampling, is written down once. What the
weights and statistics hold is read in every call, so that nothing can be out of date but the structure, which is
compared with what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
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

_op = torch.ops.revkernels.mbconv_infer_.default

_dtype = attrgetter("dtype")
_ORDINARY = {Tensor, nn.Parameter}

GROUP_BYTES = 1 << 23  # of all maps of the samples that are computed together


class Created(NamedTuple):
    """A map that starts from zero: of a map's size over a stride."""

    source: int
    stride: int
    channels: int


class Program:
    """Couplings whose transforms are MBConvs, upsampled or not, on maps of which the first one is given.

    Args:
        couplings: in order; those that create a map make the next one.
        channels: of the map that is given.

    Raises:
        NotFusedError: a coupling or transform is not of the kind.
    """

    def __init__(self, couplings: Iterable[Coupling], channels: int) -> None:
        self.channels, self.created = [channels], list[Created]()
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
        found: list[Any] = list(map(getitem, *self._columns))
        return found if set(map(type, found)) <= _ORDINARY and set(map(_dtype, found)) == {x.dtype} else None

    def is_evaluated(self) -> bool:
        """Whether all norms take running statistics and nothing is random."""
        return not any(m.training for m in self.branches) and not any(n is not None and n.training for n in self.norms)

    def shapes(self, h: int, w: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of all maps, for one map that is given, of ``h x w`` pixels."""
        found = [(self.channels[0], h, w)]
        for source, stride, channels in self.created:
            _, h, w = found[source]
            found.append((channels, -(-h // stride), -(-w // stride)))
        return found

    def __call__(
        self,
        images: Tensor,
        enter: Callable[[Tensor], Tensor],
        size: tuple[int, int],
        tensors: list[Tensor],
        keep: Sequence[int],
    ) -> list[Tensor]:
        """The maps ``keep`` at the end; of the others there are some samples at a time.

        Args:
            images: ``[N, ...]``, N > 0.
            enter: the map that is given, from some of the images.
            size: its height and width.
            tensors: :meth:`tensors`.
        """
        shapes, n = self.shapes(*size), len(images)
        group = max(1, GROUP_BYTES // (images.itemsize * sum(map(prod, shapes))))
        kept = {i: images.new_empty((n, *shapes[i])) for i in keep}
        for start in range(0, n, group):
            rows = slice(start, start + group)
            places = [kept[i][rows] if i in kept else None for i in range(len(shapes))]
            self._run(places, enter(images[rows]), shapes, tensors)
        return [kept[i] for i in keep]

    def _run(
        self,
        places: Sequence[Tensor | None],
        entered: Tensor,
        shapes: Sequence[tuple[int, int, int]],
        tensors: list[Tensor],
    ) -> None:
        """Compute the maps from the first one; those that have no place are given up."""
        maps = [
            entered.new_empty((len(entered), *shape)) if place is None else place
            for place, shape in zip(places[1:], shapes[1:], strict=True)
        ]
        first = entered if places[0] is None else places[0].copy_(entered)
        eps = [0.0 if norm is None else norm.eps for norm in self.norms]
        mode = next(iter(self._modes), "nearest")
        _op([first, *maps], tensors, self.terms, eps, mode, chunk_bytes(entered.device))


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
