"""The network's own MBConv, neck and head on :mod:`revkernels`: branches with a vector-Jacobian product written out.

``eligible`` says which transforms fit, ``mbconv`` and ``segment`` are their branches, ``coupling`` adds what they
compute to a stream, upsampling on the way.
"""

from revbifpn.fused.coupling import FusedCoupler
from revbifpn.fused.eligible import why_not_fused
from revbifpn.fused.mbconv import chunk_bytes, chunks_of

__all__ = ["FusedCoupler", "chunk_bytes", "chunks_of", "why_not_fused"]
