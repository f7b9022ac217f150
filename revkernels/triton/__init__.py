"""Triton kernels, one file per fused op; importing this needs triton.

``LAUNCHERS`` maps each op to the Python function that launches its kernel and has the op's schema.
``INTERPRETED`` tells whether kernels run under Triton's interpreter, where they take CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from revkernels.triton import couple, dual_residual

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
LAUNCHERS: dict[str, Callable] = {
    "couple_": couple.couple_,
    "couple_adjoint": couple.couple_adjoint,
    "dual_residual_": dual_residual.dual_residual_,
    "dual_residual_adjoint_": dual_residual.dual_residual_adjoint_,
}
