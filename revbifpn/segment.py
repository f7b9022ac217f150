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

from revbifpn.branch import Gradient, Pullback, Term
from revbifpn.fused import Emit, FusedMBConv, FusedRecord, Replay, Weights, _adder, explicit, join, rows
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


def add_term(term: Term, onto: Tensor | None) -> Tensor:
    """``onto + a p + b`` as a new tensor; ``onto = None`` is zero."""
    out = torch.zeros_like(term.p) if onto is None else onto.clone(memory_format=torch.contiguous_format)
    torch.ops.revkernels.couple_(out, [term.p], [term.scale], [term.shift], [1], "nearest", False)
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
    def __call__(self, y: Tensor | Encoded, *merged: Tensor) -> Term:
        chunks = [slice(0, y.shape[0])]
        if self.merge is not None and self.neck.is_frozen() and self.merge.is_frozen():
            chunks = self.neck.chunks(y.shape, y.device)  # samples on their own: the neck's map only for some at a time
        return Term(join([self._map(rows(y, chunk), *(rows(m, chunk) for m in merged)) for chunk in chunks]))

    def _map(self, y: Tensor | Encoded, *merged: Tensor) -> Tensor:
        out = add_term(self.neck(y), merged[0] if merged else None)
        return out if self.merge is None else add_term(self.merge(out), None)

    @explicit
    def _run(self, inputs: Sequence[Tensor | Encoded], planes: list | None = None) -> tuple[Term, list[FusedRecord]]:
        """The segment's map and the records of its parts, whose d and p are added to ``planes`` if wanted."""
        y, *merged = inputs
        records = []

        def run(branch: FusedMBConv, x: Tensor | Encoded) -> Term:
            term, record, d = branch.compute(x)
            records.append(record)
            if planes is not None:
                planes.append((d, term.p))
            return term

        out = add_term(run(self.neck, y), merged[0] if merged else None)
        return Term(out if self.merge is None else add_term(run(self.merge, out), None)), records

    def forward(self, *inputs: Tensor | Encoded) -> tuple[Term, list[FusedRecord]]:
        """The segment's map, and what its recompute needs."""
        return self._run(inputs)

    def store(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor | Encoded]) -> tuple[Term, Pullback]:
        """As :meth:`recompute`, on what the forward computes, which is kept."""
        planes = []
        term, records = self._run(inputs, planes)
        y, merged = inputs[0].clone(), inputs[1:]

        def pullback(*arguments: Any) -> list[Tensor | None]:
            copies = [(d, p.clone()) for d, p in planes]  # a pull writes over p, and the graph may be retained
            neck = self._replay_neck(y, records, parameters)
            neck.put(*copies[0])
            return self._pullback(neck, records, parameters, merged, copies)(*arguments)

        return term, pullback

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
            return add_term(Term(p, *neck.affine2), rows(merged[0], chunk) if merged else None)

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
    return None if gradient is None else _adder(gradient.tensor())


def _writer(plane: Tensor) -> Emit:
    """Overwrite ``plane``: a chunk of it was read for the last time when its gradient comes."""

    def emit(chunk: slice, dx: Tensor) -> None:
        rows(plane, chunk).copy_(dx)

    return emit
