"""Fused kernels for reversible multi-scale networks: Triton and CUDA C++ on the GPU, C++ on the CPU.

:mod:`revkernels.functional` holds the public functions (checked, differentiable),
:mod:`revkernels.registry` the schema of each op, :mod:`revkernels.reference` its plain-PyTorch truth, and
``python -m revkernels.env`` says which implementations are in use and why.
"""

from revkernels import dispatch, flops, functional, reference
from revkernels.functional import (
    couple,
    couple_,
    couple_adjoint,
    depth_to_space,
    depthwise_conv,
    dual_residual,
    dual_residual_,
    dual_residual_adjoint_,
    space_to_depth,
    upsample,
)

__all__ = [
    "couple",
    "couple_",
    "couple_adjoint",
    "depth_to_space",
    "depthwise_conv",
    "dispatch",
    "dual_residual",
    "dual_residual_",
    "dual_residual_adjoint_",
    "flops",
    "functional",
    "reference",
    "space_to_depth",
    "upsample",
]
__version__ = "0.2.0"
