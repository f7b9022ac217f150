"""RevBiFPN: reversible multi-scale networks that train in a fraction of the memory.

:class:`RevBiFPN` is the readable model in plain PyTorch, :class:`revbifpn.fast.RevBiFPN` the drop-in on fused kernels,
:mod:`revbifpn.reversible` the engine for networks of your own.
"""

from revbifpn.checkpoints import load_checkpoint, save_checkpoint
from revbifpn.estimate import estimate_memory
from revbifpn.graphed import GraphedModule, GraphedStep, NotCapturableError
from revbifpn.model import (
    RevBiFPN,
    RevBiFPN_S,
    revbifpn_s0,
    revbifpn_s1,
    revbifpn_s2,
    revbifpn_s3,
    revbifpn_s4,
    revbifpn_s5,
    revbifpn_s6,
)
from revbifpn.monitor import monitor_drift, range_report
from revbifpn.reversible import RevBlock, ReversibleSequence, RevSilo, check_invertible
from revbifpn.streams import StreamFormat, StreamOverflowWarning

__all__ = [
    "GraphedModule",
    "GraphedStep",
    "NotCapturableError",
    "RevBiFPN",
    "RevBiFPN_S",
    "RevBlock",
    "RevSilo",
    "ReversibleSequence",
    "StreamFormat",
    "StreamOverflowWarning",
    "check_invertible",
    "estimate_memory",
    "load_checkpoint",
    "monitor_drift",
    "range_report",
    "revbifpn_s0",
    "revbifpn_s1",
    "revbifpn_s2",
    "revbifpn_s3",
    "revbifpn_s4",
    "revbifpn_s5",
    "revbifpn_s6",
    "save_checkpoint",
]
