"""Dual-residual networks: any pretrained network, fine-tuned reversibly.

A network of blocks ``x_i = B_i(x_{i-1})`` becomes, with two coefficients and the same weights, reversible:

    x_i = B_i(x_{i-1}) + (alpha - 1) x_{i-1} + y_{i-1},    y_i = beta x_{i-1},    y_0 = 0.

``alpha = 1, beta = 0`` is the pretrained network itself. Since ``y_{i-1} = beta x_{i-2}``, a step is one coupling of
two slots, which hold ``x_{i-2}`` and ``x_{i-1}`` before it, and ``x_i`` and ``x_{i-1}`` after it:

    forward     x_i = beta x_{i-2} + B_i(x_{i-1}) + (alpha - 1) x_{i-1}
    inverse     x_{i-2} = (x_i - B_i(x_{i-1}) - (alpha - 1) x_{i-1}) / beta
    gradients   dx_{i-1} += J_i^T dx_i + (alpha - 1) dx_i,    dx_{i-2} = beta dx_i

With an exact stream (integers X, which stand for ``2^-g X``) ``beta = 2^-k``, and the k bits that the division shifts
out are kept, so that ``X_{i-2} = ((X_i - q_i) << k) | bits_i`` is exact at every alpha and k.

=================  ====================================================================================
``step``           the coupling of two slots on kernels: one pass forward, one back, one for gradients
``sequence``       :class:`DualResidualSequence`: blocks as one reversible stack
``convert``        :func:`convert` and :func:`revert`: the runs of equal-shaped blocks of a model, in place
``precision``      the error that float streams are inverted with, predicted
``schedule``       :class:`Schedule`: alpha and beta over training
=================  ====================================================================================

Source: Zhao et al., Dr2Net, arXiv 2401.04105. The exact streams are not in it.
"""

from revbifpn.dual_residual.convert import Report, convert, revert, runs_of, set_coefficients
from revbifpn.dual_residual.precision import PrecisionWarning, error_growth, precise_beta, predicted_error
from revbifpn.dual_residual.schedule import Schedule
from revbifpn.dual_residual.sequence import DualResidualSequence, DualStreams

__all__ = [
    "DualResidualSequence",
    "DualStreams",
    "PrecisionWarning",
    "Report",
    "Schedule",
    "convert",
    "error_growth",
    "precise_beta",
    "predicted_error",
    "revert",
    "runs_of",
    "set_coefficients",
]
