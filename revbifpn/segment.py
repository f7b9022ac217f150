"""Neck and head as recomputed segments, one per level, from the highest resolution down.

    o_h = neck_h(y_h) + m_{h-1},    m_h = merge_h(o_h)

Each segment keeps its stream (which the tape has anyway) and the small map m of the level above. In the backward, the
only full plane of the highest level is the gradient of o: o itself is computed again, chunk by chunk, wherever it is
read, and the gradients on the way to y are written over that plane, which becomes y's own gradient in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import revkernels
from revbifpn.branch import Gradient, Pullback, Term
from revbifpn.fused import Emit, FusedMBConv, FusedRecord, Replay, _adder


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
    return revkernels.couple_(out, [term.p], [1], scale=[term.scale], shift=[term.shift])


class FusedSegment:
    """The branch of a :class:`Segment` of fused MBConvs."""

    def __init__(self, module: Segment) -> None:
        self.module = module
        self.neck = FusedMBConv(module.neck)
        self.merge = None if module.merge is None else FusedMBConv(module.merge)

    def parameters(self) -> list[Tensor]:
        return self.neck.parameters() + ([] if self.merge is None else self.merge.parameters())

    def __call__(self, y: Tensor, *merged: Tensor) -> Term:
        out = add_term(self.neck(y), merged[0] if merged else None)
        return Term(out if self.merge is None else add_term(self.merge(out), None))

    @torch.no_grad()
    def forward(self, y: Tensor, *merged: Tensor) -> tuple[Term, tuple[FusedRecord, FusedRecord | None]]:
        """The segment's map, and what its recompute needs."""
        term, record = self.neck.forward(y)
        out = add_term(term, merged[0] if merged else None)
        if self.merge is None:
            return Term(out), (record, None)
        del term
        term, merge_record = self.merge.forward(out)
        return Term(add_term(term, None)), (record, merge_record)

    def recompute(
        self,
        records: tuple[FusedRecord, FusedRecord | None],
        parameters: Sequence[Tensor],
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[None, Pullback]:
        """The vector-Jacobian product; the map itself is not formed again. See :meth:`Branch.recompute`."""
        y, *merged = inputs
        count = len(self.neck.parameters())
        neck = Replay(self.neck, y.shape, y.__getitem__, records[0], self.neck.weights(parameters[:count]), y)
        if merged:  # below the highest level p is small and kept, rather than computed in every pass
            neck.keep()

        def pullback(du: Tensor, _: None, into: Sequence[Gradient | None]) -> list[Tensor | None]:
            if self.merge is None:
                dout, sums, dmerge, dz = du, neck.sums(du), [], None
            else:
                weights = self.merge.weights(parameters[count:])
                dout, sums, dmerge = self._pull_merge(neck, records[1], weights, merged, du)
                dz = dout if neck.expanded == neck.channels else None
            if merged and into[1] is not None:
                into[1].tensor().add_(dout)
            adopt = dz is not None and into[0] is not None and into[0].adopts(dz)
            dneck = neck.pull(dout, sums, _writer(dz) if adopt else _emit(into[0]), dz)
            if adopt:
                into[0].adopt(dz)
            return dneck + dmerge

        return None, pullback

    def _pull_merge(
        self,
        neck: Replay,
        record: FusedRecord,
        weights,
        merged: Sequence[Tensor],
        du: Tensor,  # noqa: ANN001
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """``do``, its sums for the neck's last norm, and the merge's parameter gradients."""
        latest: dict[str, Tensor] = {}

        def out(chunk: slice) -> Tensor:
            latest["p"] = p = neck.p_of(chunk)
            return add_term(Term(p, *neck.affine2), merged[0][chunk] if merged else None)

        shape = (neck.n, neck.channels, *neck.out_size)
        dout = neck.like.new_empty(shape)
        sums = neck.like.new_empty((2, *shape[:2]))

        def emit(chunk: slice, do: Tensor) -> None:
            dout[chunk] = do
            sums[:, chunk] = neck.chunk_sums(do, latest["p"])

        merge = Replay(self.merge, shape, out, record, weights, du)
        merge.keep(d=True)
        return dout, sums, merge.pull(du, merge.sums(du), emit)


def _emit(gradient: Gradient | None) -> Emit | None:
    return None if gradient is None else _adder(gradient.tensor())


def _writer(plane: Tensor) -> Emit:
    """Overwrite ``plane``: a chunk of it was read for the last time when its gradient comes."""

    def emit(chunk: slice, dx: Tensor) -> None:
        plane[chunk] = dx

    return emit
