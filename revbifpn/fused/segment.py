"""Neck and head as recomputed segments, one per level, from the highest resolution down.

    o_h = neck_h(y_h) + m_{h-1},    m_h = merge_h(o_h)

Each segment keeps its stream (which the tape has anyway) and the small map m of the level above. In the backward, the
only full plane of the highest level is o, computed again: its gradient is written over it, chunk by chunk, the
gradients on the way to y over that, and so it becomes y's own gradient in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from revbifpn.engine.branch import Contribution, Gradient, Pullback, indifferent_to_gradients
from revbifpn.fused.mbconv import FusedMBConv, FusedRecord, Kept, Weights, explicit
from revbifpn.streams import Values, values

_couple_ = torch.ops.revkernels.couple_.default


@indifferent_to_gradients
class Segment(nn.Module):
    """``merge(neck(y) + m)``; without ``merge`` the sum itself, without m just the neck's map."""

    def __init__(self, neck: nn.Module, merge: nn.Module | None = None) -> None:
        super().__init__()
        self.neck, self.merge = neck, merge

    def forward(self, y: Tensor, *merged: Tensor) -> Tensor:
        out = self.neck(y)
        if merged:
            out = out + merged[0]
        return out if self.merge is None else self.merge(out)


def _add(out: Tensor, contribution: Contribution) -> Tensor:
    """``out <- out + scale p + shift``."""
    _couple_(out, [contribution.p], [contribution.scale], [contribution.shift], [1], "nearest", False)
    return out


def _sum(contribution: Contribution, onto: Tensor | None) -> Tensor:
    """``onto + scale p + shift`` as a new tensor; ``onto = None`` is zero."""
    out = torch.zeros_like(contribution.p) if onto is None else onto.clone(memory_format=torch.contiguous_format)
    return _add(out, contribution)


def _normalized_(p: Tensor | None, mbconv: FusedMBConv, record: FusedRecord) -> Tensor:
    """``scale p + shift``, in place."""
    assert p is not None
    found = mbconv.contribution(p, record)
    assert found.scale is not None and found.shift is not None
    return p.mul_(found.scale[..., None, None]).add_(found.shift[..., None, None])


def _first(merged: Sequence[Values]) -> Tensor | None:
    """The map of the level above, where there is one."""
    return values(merged[0]) if merged else None


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class FusedSegment:
    """The branch of a :class:`Segment` of fused MBConvs."""

    def __init__(self, module: Segment, dtype: torch.dtype) -> None:
        self.module = module
        self.neck = FusedMBConv(module.neck, dtype)
        self.merge = None if module.merge is None else FusedMBConv(module.merge, dtype)

    def parameters(self) -> list[Tensor]:
        return self.neck.parameters() + ([] if self.merge is None else self.merge.parameters())

    def _named(self, parameters: Sequence[Tensor]) -> list[Weights]:
        count = len(self.neck.parameters())
        neck = self.neck.named(parameters[:count])
        return [neck] if self.merge is None else [neck, self.merge.named(parameters[count:])]

    @explicit
    def evaluate(self, *inputs: Values, update: bool = True) -> Contribution:
        y, *merged = inputs
        size = y.shape[0]
        if self.merge is not None and self.neck.is_frozen() and self.merge.is_frozen():
            size = self.neck.chunk(y)  # samples on their own: the neck's map only for some at a time
        maps = [self._map(y[rows], *(m[rows] for m in merged), update=update) for rows in _chunks(y.shape[0], size)]
        return Contribution(maps[0] if len(maps) == 1 else torch.cat(maps))

    def _map(self, y: Values, *merged: Values, update: bool) -> Tensor:
        out = _sum(self.neck.evaluate(y, update=update), _first(merged))
        return out if self.merge is None else _sum(self.merge.evaluate(out, update=update), None)

    @explicit
    def _run(self, inputs: Sequence[Values], *, keep: bool) -> tuple[Contribution, list[FusedRecord], list[Kept]]:
        """The segment's map, the records of its parts, and what they keep."""
        y, *merged = inputs
        contribution, record, d = self.neck.compute(y, keep_d=keep)
        records, kept = [record], [Kept(contribution.p, d)] if keep else []
        out = _sum(contribution, _first(merged))
        if self.merge is not None:
            del contribution  # and p, where it is not kept
            contribution, record, d = self.merge.compute(out, keep_d=keep)
            del out
            records.append(record)
            if keep:
                kept.append(Kept(contribution.p, d))
            out = _sum(contribution, None)
        return Contribution(out), records, kept

    def record(self, *inputs: Values) -> tuple[Contribution, list[FusedRecord]]:
        """The segment's map, and what its recompute needs."""
        return self._run(inputs, keep=False)[:2]

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Values]) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, on what the forward computes, which is kept."""
        contribution, records, kept = self._run(inputs, keep=True)
        y, merged = inputs[0].clone(), inputs[1:]

        def pullback(
            du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None], *, spare: bool = False
        ) -> Sequence[Tensor | None]:
            # A pull writes over p, and the graph may be retained.
            copies = [k._replace(p=None if k.p is None else k.p.clone()) for k in kept]
            return self._pullback(y, merged, records, self._named(parameters), copies)(du, sums, into, spare=spare)

        return contribution, pullback

    @explicit
    def repeat(self, records: list[FusedRecord], parameters: Sequence[Tensor], inputs: Sequence[Values]) -> Tensor:
        """The segment's map once more, as new memory, but for rounding."""
        y, *merged = inputs
        weights = self._named(parameters)
        if self.merge is None and not merged:
            return _normalized_(self.neck.again(y, records[0], weights[0]).p, self.neck, records[0])
        out = self._out(y, merged, records[0], weights[0], Kept())
        if self.merge is None:
            return out
        return _normalized_(self.merge.again(out, records[1], weights[1]).p, self.merge, records[1])

    @explicit
    def recompute(
        self,
        records: list[FusedRecord],
        parameters: Sequence[Tensor],
        inputs: Sequence[Values],
        needs: Sequence[bool],
    ) -> tuple[None, Pullback]:
        """The vector-Jacobian product; the map itself is not formed again. See :class:`Branch`."""
        y, *merged = inputs
        return None, self._pullback(y, merged, records, self._named(parameters), [Kept()])

    def _pullback(
        self,
        y: Values,
        merged: Sequence[Values],
        records: Sequence[FusedRecord],
        weights: Sequence[Weights],
        kept: list[Kept],
    ) -> Pullback:
        @explicit
        def pullback(
            du: Tensor, sums: Tensor | None, into: Sequence[Gradient | None], *, spare: bool = False
        ) -> list[Tensor | None]:
            dout = du
            dz = du if spare and self.merge is None and self._is_inner(du) else None
            dmerge: list[Tensor | None] = []
            if self.merge is not None:
                dout = self._out(y, merged, records[0], weights[0], kept[0])
                # At the highest level, where memory peaks, d is computed again in every pass.
                again = kept[1] if len(kept) > 1 else self.merge.again(dout, records[1], weights[1], d=bool(merged))
                dmerge = self.merge.pull(dout, records[1], weights[1], again, du, None, dout, add=False)
                del again
                dz = dout if self._is_inner(dout) else None
            of_y, of_map = into[0], into[1] if merged else None
            if of_map is not None:
                if dz is None and self.merge is not None and of_map.adopts(dout):
                    of_map.adopt(dout)  # it is read, and not written over
                else:
                    of_map.tensor().add_(dout)
            if dz is None and kept[0].p is None and self._is_inner(dout):
                dz = torch.empty_like(dout, memory_format=torch.contiguous_format)
            adopt = dz is not None and of_y is not None and of_y.adopts(dz)
            dy = dz if adopt else None if of_y is None else of_y.tensor()
            dneck = self._pull_neck(y, records[0], weights[0], kept[0], dout, dy, not adopt, dz)
            if adopt and of_y is not None and dy is not None:
                of_y.adopt(dy)
            return dneck + dmerge

        return pullback

    def _pull_neck(
        self,
        y: Values,
        record: FusedRecord,
        weights: Weights,
        kept: Kept,
        du: Tensor,
        dy: Tensor | None,
        add: bool,
        dz: Tensor | None,
    ) -> list[Tensor | None]:
        """:meth:`FusedMBConv.pull` of the neck; some samples at a time, where they are computed on their own."""
        if kept.p is not None or True in record.batch:
            if kept.p is None and dz is None:
                dz = self.neck.plane(y, self.neck.expanded, self.neck.out_size(y))
            return self.neck.pull(y, record, weights, kept, du, None, dy, add=add, dz=dz)
        total: list[Tensor | None] = []
        for rows in _chunks(y.shape[0], record.shape.chunk):
            some = y[rows]
            plane = self.neck.plane(some, self.neck.expanded, self.neck.out_size(y)) if dz is None else dz[rows]
            own = record if record.keep is None else record._replace(keep=record.keep[rows])
            into = None if dy is None else dy[rows]
            found = self.neck.pull(some, own, weights, kept, du[rows], None, into, add=add, dz=plane)
            for gradient, more in zip(total, found, strict=False):
                if gradient is not None and more is not None:
                    gradient += more
            total = total or found
        return total

    def _is_inner(self, plane: Tensor) -> bool:
        """Whether a plane of the neck's result has the shape and dtype of the projection's input."""
        return self.neck.expanded == self.neck.channels and plane.dtype == self.neck.dtype

    def _out(self, y: Values, merged: Sequence[Values], record: FusedRecord, weights: Weights, kept: Kept) -> Tensor:
        """o again, a chunk of samples at a time where p is not kept."""
        if kept.p is not None:
            return _sum(self.neck.contribution(kept.p, record), _first(merged))
        size = self.neck.out_size(y)
        if merged:
            out = values(merged[0]).clone(memory_format=torch.contiguous_format)
        else:
            out = self.neck.plane(y, self.neck.channels, size).zero_()
        for rows in _chunks(y.shape[0], record.shape.chunk):
            p = self.neck.again(y[rows], record, weights).p
            assert p is not None
            keep = None if record.keep is None else record.keep[rows]
            _add(out[rows], self.neck.contribution(p, record, keep))
        return out
