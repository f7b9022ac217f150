"""The drop-in: the same network, constructor, parameters and state dict as :mod:`revbifpn.model`, on fused kernels.

    >>> from revbifpn.fast import RevBiFPN, revbifpn_s3
    >>> model = revbifpn_s3(classes=10)

Couplings run in place on kernels that upsample while they add (:mod:`revbifpn.fused`). Neck and head are recomputed
together, level by level from the highest resolution, so that the end of the forward pass keeps one small map per level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

import revkernels
from revbifpn import model, parts
from revbifpn.engine.coupling import Coupling, Part
from revbifpn.engine.tape import Stored, Tape
from revbifpn.engine.traced import is_traced
from revbifpn.fused import FusedCoupler
from revbifpn.fused.eligible import has_hooks
from revbifpn.fused.program import NotFusedError, Program, Programs
from revbifpn.fused.segment import Segment
from revbifpn.model import ByArch, factory
from revbifpn.reversible import PerLevel, RevBlock, ReversibleSequence, RevSilo
from revbifpn.streams import autocast_dtype, resolve


class Stem(parts.Stem):
    """:class:`revbifpn.parts.Stem` by the space-to-depth kernel, plane repetition built in."""

    def forward(self, x: Tensor) -> Tensor:
        if is_traced():
            return super().forward(x)
        return revkernels.space_to_depth(x, self.planes, self.block)

    def inverse(self, y: Tensor) -> Tensor:
        return revkernels.depth_to_space(y, self.in_chans, self.block)


class RevBiFPN(model.RevBiFPN):
    __doc__ = model.RevBiFPN.__doc__

    _segments: tuple[Segment, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stem = Stem(self.stem.planes, self.stem.block, self.stem.in_chans)
        self.rev_stack.coupler = FusedCoupler()

    def _forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.head is None or not _is_plain(self.head, parts.Head):
            return super()._forward(x)
        return self.head.classify(self.head.features(self._last(x)))

    def _maps(self, x: Tensor, levels: Sequence[int]) -> list[Tensor]:
        maps = self._evaluated(x, levels) if self.head is None else None
        return super()._maps(x, levels) if maps is None else maps

    def _last(self, x: Tensor) -> Tensor:
        maps = self._evaluated(x, self.out_levels[-1:])
        return super()._last(x) if maps is None else maps[-1]

    def _evaluated(self, x: Tensor, levels: Sequence[int]) -> list[Tensor] | None:
        """What the head merges into its last map, or the maps of these levels, by one op; None where that cannot be.

        It can at inference, in eval mode, with ordinary streams, where no one looks on.
        """
        stack = self.rev_stack
        if (
            torch.is_grad_enabled()
            or is_traced()
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.shape[0] == 0
            or autocast_dtype(x.device) is not None
            or torch.is_anomaly_enabled()
            or torch.nn.modules.module._has_any_global_hook()
            or resolve(stack.stream, x).exact
            or stack.observer is not None
            or type(stack.coupler) is not FusedCoupler
        ):
            return None
        program = _programs.of(self)
        tensors = None if program is None else program.tensors(x)
        if program is None or tensors is None:
            return None
        made = list(range(self.levels) if self.neck is None else sorted(self.neck.transforms))
        last = len(program.channels) - 1
        keep = [last] if self.head else [last - made[::-1].index(level) for level in levels]

        def enter(images: Tensor) -> Tensor:
            return torch.ops.revkernels.space_to_depth(images, self.stem.planes, self.stem.block)

        size = x.shape[2] // self.stem.block, x.shape[3] // self.stem.block
        return program(x, enter, size, tensors, keep)

    def _pyramid(self, levels: Sequence[int], tape: Tape | Stored) -> list[Tensor]:
        neck = self.neck
        if not _is_plain(neck, parts.Neck):
            return super()._pyramid(levels, tape)
        segments = self._segments_of({level: (transform, None) for level, transform in neck.transforms.items()})
        maps = {level: tape.read(level, segments[level], stored=self.disable_recomp) for level in sorted(levels)}
        return [maps[level] for level in levels]

    def _merged(self, tape: Tape | Stored) -> Tensor:
        neck, head = self.neck, self.head
        if not _is_plain(neck, parts.Neck) or not _is_plain(head, parts.Head):
            return super()._merged(tape)
        merges = [*head.pyramid_heads, None]
        segments = self._segments_of({level: (f, merges[level]) for level, f in neck.transforms.items()})
        merged: tuple[Tensor, ...] = ()
        for level, segment in segments.items():
            merged = (tape.read(level, segment, *merged, stored=self.disable_recomp),)
        return merged[0]

    def _segments_of(self, parts: Mapping[int, tuple[nn.Module, nn.Module | None]]) -> Mapping[int, Segment]:
        """One per level, made again where a module was replaced; in a tuple, so that they are no children of self."""
        pairs = list(parts.values())
        if [(id(s.neck), id(s.merge)) for s in self._segments] != [(id(neck), id(merge)) for neck, merge in pairs]:
            self._segments = tuple(Segment(*pair) for pair in pairs)
        return dict(zip(parts, self._segments, strict=True))


def _program(network: RevBiFPN) -> Program:
    """The couplings of stack, neck and head: the last maps are the neck's, with the head merged into one another."""
    stack, neck, head = network.rev_stack, network.neck, network.head
    blocks = [block for part in stack.blocks for block in (part.blocks if type(part) is PerLevel else [part])]
    plain = type(stack) is ReversibleSequence and all(type(block) in (RevBlock, RevSilo) for block in blocks)
    if not (plain and type(network.stem) is Stem and type(neck) in (type(None), parts.Neck)):
        raise NotFusedError("a part is not the network's own")
    if type(head) not in (type(None), parts.Head):
        raise NotFusedError("the head is not the network's own")
    transforms = {} if neck is None else dict(sorted(neck.transforms.items()))
    merges = [] if head is None else list(head.pyramid_heads)
    couplings = list(stack.couplings())
    first = network.levels if transforms else 0  # of the maps that are merged
    for place, (level, transform) in enumerate(transforms.items(), first):
        terms = [(Part(level), transform)]
        if merges and level > 0:
            terms.append((Part(place - 1), merges[level - 1]))
        couplings.append(Coupling(Part(place), tuple(terms), creates=True))
    if not transforms:
        couplings += [Coupling(Part(level + 1), ((Part(level), merge),)) for level, merge in enumerate(merges)]
    return Program(couplings, network.stem.planes * network.stem.block**2)


_programs = Programs(_program)

M = TypeVar("M", bound=nn.Module)


def _is_plain(module: nn.Module | None, cls: type[M]) -> TypeGuard[M]:
    """Whether the parts of ``module`` may be called instead of it."""
    return not is_traced() and type(module) is cls and not has_hooks([module])


class RevBiFPN_S(ByArch, RevBiFPN):  # noqa: N801 (published name)
    """A published scale of :class:`RevBiFPN`, by name; see :class:`revbifpn.model.ByArch`."""


revbifpn_s0 = factory(RevBiFPN_S, "revbifpn_s0", __name__)
revbifpn_s1 = factory(RevBiFPN_S, "revbifpn_s1", __name__)
revbifpn_s2 = factory(RevBiFPN_S, "revbifpn_s2", __name__)
revbifpn_s3 = factory(RevBiFPN_S, "revbifpn_s3", __name__)
revbifpn_s4 = factory(RevBiFPN_S, "revbifpn_s4", __name__)
revbifpn_s5 = factory(RevBiFPN_S, "revbifpn_s5", __name__)
revbifpn_s6 = factory(RevBiFPN_S, "revbifpn_s6", __name__)
