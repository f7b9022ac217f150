"""Triton kernels, one file per fused op; importing this needs triton.

``LAUNCHERS`` maps each op to the Python function that launches its kernel and has the op's schema.
``INTERPRETED`` tells whether kernels run under Triton's interpreter, where they take CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

from revkernels.registry import LIBRARY, OPS
from revkernels.triton import couple, dual_residual, plan

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
LAUNCHERS: dict[str, Callable] = {
    "couple_": couple.couple_,
    "couple_adjoint": couple.couple_adjoint,
    "dual_residual_": dual_residual.dual_residual_,
    "dual_residual_adjoint_": dual_residual.dual_residual_adjoint_,
}


def register_native(module: ModuleType) -> None:
    """Have ``revkernels._C_cuda`` serve what it can launch without Python: ``couple_`` on CUDA.

    The first launch of a kind comes back to Python, through an op of its own.
    """
    if not hasattr(module, "register_couple"):  # built before it had one
        return
    schema = OPS["couple_"].schema.removesuffix(") -> ()")
    LIBRARY.define(f"couple_for_native_{schema}, bool wanted=False) -> (str recipe, str error)")
    LIBRARY.impl("couple_for_native_", couple.couple_for_native_, "CUDA")
    module.register_couple(plan.observed)
