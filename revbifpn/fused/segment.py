"""Neck and head as recomputed segments, one per level, from the highest resolution down.

    o_h = neck_h(y_h) + m_{h-1},    m_h = merge_h(o_h)

Each segment keeps its stream (which the tape has anyway) and the small map m of the level above. In the backward, the
only full plane of the highest level is the gradient of o: o itself is computed again, chunk by chunk, wherever it is
read, and the gradients on the way to y are written over that plane, which becomes y's own gradient in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revbifpn.engine.branch import Contribution, Gradient, Pullback
from revbifpn.fused.mbconv import Emit, FusedMBConv, FusedRecord, Replay, Weights, adder, explicit, join, rows
from revbifpn.streams import Encoded


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


def add_contribution(contribution: Contribution, onto: Tensor | None) -> Tensor:
    """``onto + a p + b`` as a new tensor; ``onto = None`` is zero."""
    out = torch.zeros_like(contribution.p) if onto is None else onto.clone(memory_format=torch.contiguous_format)
    torch.ops.revkernels.couple_(
        out, [contribution.p], [contribution.scale], [contribution.shift], [1], "nearest", False
    )
    return out


class FusedSegment:
    """The branch of a :class:`Segment` of fused MBConvs."""

    def __init__(self, module: Segment, dtype: torch.dtype) -> None:
        self.module = module
        self.neck = FusedMBConv(module.neck, dtype)
        self.merge = None if module.merge is None else FusedMBConv(module.merge, dtype)

    def parameters(self) -> list[Tensor]:
        return self.neck.parameters() + ([] if self.merge is None else self.merge.parameters())

    @explicit
    def evaluate(self, y: Tensor | Encoded, *merged: Tensor, update: bool = True) -> Contribution:
        chunks = [slice(0, y.shape[0])]
        if self.merge is not None and self.neck.is_frozen() and self.merge.is_frozen():
            chunks = self.neck.chunks(y.shape, y.device)  # samples on their own: the neck's map only for some at a time
        return Contribution(
            join([self._map(rows(y, chunk), *(rows(m, chunk) for m in merged), update=update) for chunk in chunks])
        )

    def _map(self, y: Tensor | Encoded, *merged: Tensor, update: bool) -> Tensor:
        out = add_contribution(self.neck.evaluate(y, update=update), merged[0] if merged else None)
        return out if self.merge is None else add_contribution(self.merge.evaluate(out, update=update), None)

    @explicit
    def _run(
        self, inputs: Sequence[Tensor | Encoded], planes: list | None = None
    ) -> tuple[Contribution, list[FusedRecord]]:
        """The segment's map and the records of its parts, whose d and p are added to ``planes`` if wanted."""
        y, *merged = inputs
        records = []

        def run(branch: FusedMBConv, x: Tensor | Encoded) -> Contribution:
            contribution, record, d = branch.compute(x)
            records.append(record)
            if planes is not None:
                planes.append((d, contribution.p))
            return contribution

        out = add_contribution(run(self.neck, y), merged[0] if merged else None)
        return Contribution(out if self.merge is None else add_contribution(run(self.merge, out), None)), records

    def record(self, *inputs: Tensor | Encoded) -> tuple[Contribution, list[FusedRecord]]:
        """The segment's map, and what its recompute needs."""
        return self._run(inputs)

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor | Encoded]) -> tuple[Contribution, Pullback]:
        """As :meth:`recompute`, on what the forward computes, which is kept."""
        planes = []
        contribution, records = self._run(inputs, planes)
        y, merged = inputs[0].clone(), inputs[1:]

        def pullback(*arguments: Any) -> list[Tensor | None]:
            copies = [(d, p.clone()) for d, p in planes]  # a pull writes over p, and the graph may be retained
            neck = self._replay_neck(y, records, parameters)
            neck.put(*copies[0])
            return self._pullback(neck, records, parameters, merged, copies)(*arguments)

        return contribution, pullback

    def _replay_neck(self, y: Tensor | Encoded, records: list[FusedRecord], parameters: Sequence[Tensor]) -> Replay:
        return self.neck.replay(y, records[0], self.neck.named(parameters[: len(self.neck.parameters())]))

    @explicit
    def recompute(
        self,
        records: list[FusedRecord],
        parameters: Sequence[Tensor],
        inputs: Sequence[Tensor | Encoded],
        needs: Sequence[bool],
    ) -> tuple[None, Pullback]:
        """The vector-Jacobian product; the map itself is not formed again. See :meth:`Branch.recompute`."""
        y, *merged = inputs
        neck = self._replay_neck(y, records, parameters)
        if merged:  # below the highest level p is small and kept, rather than computed in every pass
            neck.keep()
        return None, self._pullback(neck, records, parameters, merged)

    def _pullback(
        self,
        neck: Replay,
        records: list[FusedRecord],
        parameters: Sequence[Tensor],
        merged: Sequence[Tensor],
        planes: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Pullback:
        @explicit
        def pullback(du: Tensor, _: None, into: Sequence[Gradient | None]) -> list[Tensor | None]:
            if self.merge is None:
                dout, sums, dmerge, dz = du, neck.sums(du), [], None
            else:
                weights = self.merge.named(parameters[len(self.neck.parameters()) :])
                dout, sums, dmerge = self._pull_merge(neck, records[1], weights, merged, du, planes[1:])
                dz = dout if neck.expanded == neck.channels else None
            if merged and into[1] is not None:
                into[1].tensor().add_(dout)
            adopt = dz is not None and into[0] is not None and into[0].adopts(dz)
            dneck = neck.pull(dout, sums, _writer(dz) if adopt else _emit(into[0]), dz)
            if adopt:
                into[0].adopt(dz)
            return dneck + dmerge

        return pullback

    def _pull_merge(
        self,
        neck: Replay,
        record: FusedRecord,
        weights: Weights,
        merged: Sequence[Tensor],
        du: Tensor,
        planes: Sequence[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """``do``, its sums for the neck's last norm, and the merge's parameter gradients."""
        latest: dict[str, Tensor] = {}

        def out(chunk: slice) -> Tensor:
            latest["p"] = p = neck.p_of(chunk)
            return add_contribution(Contribution(p, *neck.affine2), rows(merged[0], chunk) if merged else None)

        shape = (neck.n, neck.channels, *neck.out_size)
        dout = du.new_empty(shape, dtype=neck.dtype)
        sums = []

        def emit(chunk: slice, do: Tensor) -> None:
            rows(dout, chunk).copy_(do)
            sums.append(neck.chunk_sums(do, latest["p"]))

        merge = Replay(self.merge, shape, du.device, out, record, weights)
        if planes:
            merge.put(*planes[0])
        else:
            merge.keep(d=True)
        dmerge = merge.pull(du, merge.sums(du), emit)
        return dout, join(sums, 1), dmerge


def _emit(gradient: Gradient | None) -> Emit | None:
    return None if gradient is None else adder(gradient.tensor())


def _writer(plane: Tensor) -> Emit:
    """Overwrite ``plane``: a chunk of it was read for the last time when its gradient comes."""

    def emit(chunk: slice, dx: Tensor) -> None:
        rows(plane, chunk).copy_(dx)

    return emit
