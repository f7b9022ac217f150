"""How streams are stored: as floats, or exactly, on a fixed-point grid.

Floats lose digits when a coupling is undone, ``(x + t) - t != x``. On a grid of multiples of ``2^-g`` nothing is lost:

    y = x + 2^-g rint(2^g t),        x = y - 2^-g rint(2^g t),

at any depth, as long as t is computed again bit for bit. ``fixed32`` keeps the grid's values in float32, exact while
``|y| < 2^(24 - g)``; ``fixed16`` keeps ``2^g y`` in int16, for ``|y| < 2^(15 - g)``. There sums wrap around beyond
that, which still inverts exactly, but gives branches wrong values: such values are counted and reported. ``int32``
likewise keeps ``2^g y`` in int32, for dual-residual networks (:mod:`revbifpn.dual_residual`).

The rounding is done by the coupling (:func:`revkernels.couple_`); its gradient is taken as 1 (straight-through).
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import revkernels

FLOAT32, FIXED32, FIXED16, INT32 = "float32", "fixed32", "fixed16", "int32"
INTEGERS = {FIXED16: torch.int16, INT32: torch.int32}
DEFAULT_BITS = {FIXED32: (12,), FIXED16: (9,), INT32: (16,)}
HALVES = (torch.bfloat16, torch.float16)
MOST_BITS = {FIXED32: 24, FIXED16: 15, INT32: 31}  # significant bits of a value, without its sign


class StreamOverflowWarning(UserWarning):
    """Values of a stream left the range of its format."""


@dataclass(frozen=True)
class StreamFormat:
    """How the streams of a reversible pass are stored.

    Args:
        name: ``"float32"`` (as they come: float64 stays float64), ``"fixed32"`` or ``"fixed16"``; ``"int32"`` for
            dual-residual networks alone.
        fraction_bits: g of every level, from the highest resolution; the last one holds for all further levels.
            By default 12 for ``fixed32`` (values up to 4096 in steps of 2.4e-4), 9 for ``fixed16`` (up to 64 in
            steps of 2e-3) and 16 for ``int32`` (up to 32768 in steps of 1.5e-5).
            :func:`revbifpn.monitor.range_report` tells which range a model needs.

    Raises:
        ValueError: an unknown name, or bits outside [-8, 24] (``fixed32``, ``int32``), [-8, 15] (``fixed16``).
    """

    name: str = FLOAT32
    fraction_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in (FLOAT32, FIXED32, FIXED16, INT32):
            raise ValueError(f"stream: expected 'float32', 'fixed32' or 'fixed16', got {self.name!r}")
        bits = tuple(self.fraction_bits) or DEFAULT_BITS.get(self.name, ())
        if self.exact:
            most = min(MOST_BITS[self.name], 24)
            if not all(isinstance(g, int) and -8 <= g <= most for g in bits):
                raise ValueError(f"fraction_bits: expected integers from -8 to {most} for {self.name}, got {bits}")
        elif bits:
            raise ValueError(f"fraction_bits: float32 streams have no grid, got {bits}")
        object.__setattr__(self, "fraction_bits", bits)

    @classmethod
    def of(cls, stream: str | StreamFormat | None) -> StreamFormat | None:
        """The format that a ``stream`` argument asks for; None stays None."""
        return stream if stream is None or isinstance(stream, StreamFormat) else cls(stream)

    @property
    def exact(self) -> bool:
        return self.name != FLOAT32

    def bits(self, level: int) -> int | None:
        """g of a level; None for floats."""
        return self.fraction_bits[min(level, len(self.fraction_bits) - 1)] if self.exact else None

    def limit(self, level: int) -> float:
        """Values stay below this."""
        bits = self.bits(level)
        return float("inf") if bits is None else 2.0 ** (MOST_BITS[self.name] - bits)

    def check(self, x: Tensor) -> None:
        """Refuse inputs that this format, which holds float32 values, would not keep.

        Raises:
            ValueError: x is float64.
        """
        if self.exact and x.dtype == torch.float64:
            raise ValueError(
                f"stream: {self.name} holds float32 values, got an input of {x.dtype}; use float32, or "
                "stream='float32', which keeps the input's dtype"
            )

    def encode(self, x: Tensor, level: int, overflow: Tensor | None = None) -> Tensor:
        """x on the grid, in a tensor of its own; ``overflow`` as in :func:`revkernels.couple_`."""
        if not self.exact:
            return x.detach().clone(memory_format=torch.contiguous_format)
        y = torch.zeros(x.shape, dtype=INTEGERS.get(self.name, torch.float32), device=x.device)
        if self.name == INT32:
            return revkernels.dual_residual_(y, None, x.detach(), fraction_bits=self.bits(level), overflow=overflow)
        revkernels.couple_(as_map(y), [as_map(x.detach())], [1], fraction_bits=self.bits(level), overflow=overflow)
        return y

    def decode(self, y: Tensor, level: int) -> Values:
        """The values of a stored stream: itself, or a view that gives them where they are read."""
        bits = self.bits(level) if self.name in INTEGERS else None
        return y if bits is None else Encoded(y, bits)


def float_and_rest(y: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """``x = 2^-bits y`` of integers in float32, and the int8 ``y - 2^bits x`` that float32 loses of an int32."""
    x = Encoded(y, bits).to(torch.float32)
    if y.dtype != torch.int32:
        return x, None
    return x, (y - (x * 2.0**bits).to(torch.int64)).to(torch.int8)


def integers_of(x: Tensor, rest: Tensor | None, bits: int) -> Tensor:
    """The integers that :func:`float_and_rest` was called with."""
    whole = (x * 2.0**bits).to(torch.int64)
    return whole.to(torch.int16) if rest is None else (whole + rest).to(torch.int32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def reduced_dtype(x: Tensor) -> torch.dtype | None:
    """The 16 bits that a network on x computes in: autocast's, or those of x itself; None in full precision."""
    if x.dtype == torch.float64:
        return None
    return autocast_dtype(x.device) or (x.dtype if x.dtype in HALVES else None)


def resolve(stream: StreamFormat | None, x: Tensor) -> StreamFormat:
    """What ``stream=None`` means for inputs like x: where branches compute in 16 bits ``fixed32``, else floats."""
    if stream is not None:
        return stream
    return StreamFormat(FLOAT32 if reduced_dtype(x) is None else FIXED32)


class Encoded:
    """Values ``2^-bits y`` of a stream of integers, decoded where they are read."""

    dtype = torch.float32

    def __init__(self, y: Tensor, bits: int) -> None:
        self.y, self.bits = y, bits

    @property
    def unit(self) -> float:
        """What an integer of y stands for."""
        return 2.0**-self.bits

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def device(self) -> torch.device:
        return self.y.device

    def to(self, dtype: torch.dtype) -> Tensor:
        x = torch.empty(self.y.shape, dtype=dtype, device=self.y.device)
        if self.y.dtype == torch.int32:
            return torch.mul(self.y, self.unit, out=x)
        torch.ops.revkernels.dequantize_(as_map(x), as_map(self.y), self.bits)
        return x

    def __getitem__(self, rows: slice) -> Encoded:
        return Encoded(self.y[rows], self.bits)

    def clone(self) -> Encoded:
        return Encoded(self.y.clone(), self.bits)


Values = Tensor | Encoded
"""What a branch reads."""


def as_map(x: Tensor) -> Tensor:
    """x of any number of dimensions, ``[N, C, ...]``, as kernels take it, ``[N, C, H, W]``: a view of a stream."""
    if x.dim() == 4:
        return x
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1) if x.dim() > 1 else x.reshape(*x.shape, 1, 1, 1)


def values(x: Values) -> Tensor:
    """A branch's input as a tensor."""
    return x.to(x.dtype) if isinstance(x, Encoded) else x


class _Capture(threading.local):
    """What a thread is recording."""

    rehearsed = False
    counters: list[OverflowCounter] | None = None


_capture = _Capture()


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread launches on a device becomes a CUDA graph, or is checked for that by the capture lint.

    The host can read nothing then: no value is there before the graph is replayed.
    """
    if _capture.rehearsed:
        return True
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextmanager
def rehearsed_capture() -> Iterator[None]:
    """Let :func:`is_capturing` say so in this thread, on any device."""
    before, _capture.rehearsed = _capture.rehearsed, True
    try:
        yield
    finally:
        _capture.rehearsed = before


@contextmanager
def captured_counters() -> Iterator[list[OverflowCounter]]:
    """The counters of the passes captured in the block; :meth:`OverflowCounter.report` them after a replay."""
    before, _capture.counters = _capture.counters, []
    try:
        yield _capture.counters
    finally:
        _capture.counters = before


@dataclass(frozen=True, eq=False)
class _Copied:
    """Counts of a pass on their way to the host, there once the event has passed."""

    event: torch.cuda.Event
    stream: StreamFormat
    counts: dict[int, Tensor]
    steps: Sequence[str]


class OverflowCounter:
    """Numbers of values that left the range of their format in one pass, per level.

    Args:
        stream: the format.
        steps: names of the couplings that the pass takes in turn, for the message; without them it names levels.

    On a CPU they are read at the end of the forward. On CUDA that would stall it: they are copied to the host in the
    background and read by a later pass.
    """

    _on_their_way: list[_Copied] = []
    _lock = threading.Lock()  # passes of several threads share the list

    def __init__(self, stream: StreamFormat, steps: Sequence[str] = ()) -> None:
        self.stream, self.steps = stream, steps
        self.counts: dict[int, Tensor] = {}

    def of(self, level: int, device: torch.device, position: int = 0) -> Tensor | None:
        """What :func:`revkernels.couple_` adds to at a position of the pass; None for floats."""
        if not self.stream.exact:
            return None
        last = max(len(self.steps) - 1, 0)
        if level not in self.counts:
            self.counts[level] = torch.zeros(last + 1, dtype=torch.int64, device=device)
        counts = self.counts[level]
        return counts.narrow(0, min(position, last), 1) if last else counts

    def report(self) -> None:
        """Warn of what has been counted, now or once it is there."""
        if not self.counts or not all(map(has_values, self.counts.values())):
            return
        device = next(iter(self.counts.values())).device  # of all levels: a pass lives on one
        if is_capturing(device):
            if _capture.counters is not None:
                _capture.counters.append(self)
        elif device.type != "cuda":
            _warn(self.stream, self.counts, self.steps)
        else:
            for copied in self._exchange(self._copy(device)):
                _warn(copied.stream, copied.counts, copied.steps)

    def _copy(self, device: torch.device) -> _Copied:
        with torch.cuda.device(device):  # whose current stream computes the counts: the event belongs there
            counts = {
                level: torch.empty(count.shape, dtype=torch.int64, pin_memory=True).copy_(count, non_blocking=True)
                for level, count in self.counts.items()
            }
            event = torch.cuda.Event()
            event.record()
        return _Copied(event, self.stream, counts, self.steps)

    @classmethod
    def _exchange(cls, copied: _Copied) -> list[_Copied]:
        """Counts that have arrived, each for one caller; the others wait with ``copied`` for the next."""
        with cls._lock:
            waiting: list[_Copied] = []
            arrived: list[_Copied] = []
            for entry in [*cls._on_their_way, copied]:
                (arrived if entry.event.query() else waiting).append(entry)
            cls._on_their_way[:] = waiting
        return arrived


def has_values(x: Tensor) -> bool:
    """Whether x is computed at all, rather than simulated."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def _warn(stream: StreamFormat, counts: dict[int, Tensor], steps: Sequence[str]) -> None:
    found = [level for level, count in sorted(counts.items()) if count.any()]
    if found:
        levels = ", ".join(f"level {level} (|y| < {stream.limit(level):g})" for level in found)
        if steps:
            names = [name for i, name in enumerate(steps) if any(counts[level][i] for level in found)]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            levels = f"{', '.join(names[:3])}{more} (|x| < {stream.limit(found[0]):g})"
        consequence = (
            "branches read wrong values there" if stream.name in INTEGERS else "its inversion is not exact there"
        )
        warnings.warn(
            f"values of a {stream.name} stream left its range or were not finite, in {levels}: {consequence}. Choose "
            "fewer fraction_bits, see revbifpn.range_report; torch.autograd.detect_anomaly() names a transform whose "
            "result is not finite",
            StreamOverflowWarning,
            stacklevel=2,
        )
