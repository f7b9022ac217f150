"""Triton kernels, one file per fused op; importing this needs triton.

``LAUNCHERS`` maps each op to the Python function that launches its kernel and has the op's schema.
``COMPOSED`` are the ops of which that is another op's kernel and a product of cuBLAS.
``INTERPRETED`` tells whether kernels run under Triton's interpreter, where they take CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from revkernels.registry import OPS
from revkernels.storage import checked
from revkernels.triton import bn_act, bn_fold, couple, dequantize, pointwise_conv, se_gate

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"
_LAUNCHERS: dict[str, Callable] = {
    "couple_": couple.couple_,
    "couple_adjoint": couple.couple_adjoint,
    "dequantize_": dequantize.dequantize_,
    "pointwise_conv_": pointwise_conv.pointwise_conv_,
    "pointwise_conv_grad_weight": pointwise_conv.pointwise_conv_grad_weight,
    "bn_stats": bn_act.bn_stats,
    "bn_fold": bn_fold.bn_fold,
    "bn_fold_grad": bn_fold.bn_fold_grad,
    "bn_act": bn_act.bn_act,
    "bn_act_squeeze": bn_act.bn_act_squeeze,
    "bn_act_grad_sums": bn_act.bn_act_grad_sums,
    "bn_act_grad": bn_act.bn_act_grad,
    "se_gate": se_gate.se_gate,
    "se_gate_grad": se_gate.se_gate_grad,
}
LAUNCHERS = {op: checked(OPS[op].overload._schema, launcher) for op, launcher in _LAUNCHERS.items()}
COMPOSED = {"pointwise_conv_", "pointwise_conv_grad_weight"}
