"""How exactly float streams are inverted."""

from __future__ import annotations

import math
import warnings

import torch

USELESS = 0.1  # predicted relative error of the gradient


class PrecisionWarning(UserWarning):
    """Float streams would be inverted too inexactly to train on."""


def error_growth(alpha: float, beta: float) -> float:
    """By how much an error grows from one inverted block to the next: the largest root of ``L^2 + (a/b) L - 1/b = 0``.

    In magnitude; with ``alpha + beta = 1`` it is ``1 / beta``.
    """
    half = alpha / beta / 2
    root = math.sqrt(half * half + 1 / beta) if half * half + 1 / beta >= 0 else math.sqrt(1 / abs(beta))
    return max(abs(-half - root), abs(-half + root))


def predicted_error(alpha: float, beta: float, depth: int, dtype: torch.dtype = torch.float32) -> float:
    """``eps growth^(depth - 1)``, at most 1: the relative error of a float stream of ``depth`` inverted blocks.

    The last block's input is kept, so that ``depth - 1`` blocks are inverted.
    """
    growth = max(error_growth(alpha, beta), 1.0)
    log = math.log(torch.finfo(dtype).eps) + (depth - 1) * math.log(growth)
    return math.exp(min(log, 0.0))


def precise_beta(depth: int, error: float, dtype: torch.dtype = torch.float32) -> float:
    """The smallest beta, with ``alpha = 1 - beta``, at which :func:`predicted_error` is at most ``error``.

    ``(eps / error)^(1 / (depth - 1))``, and no less than ``2^-7``, where a network is the pretrained one for practical
    purposes; 1 where no beta is precise enough.
    """
    if depth < 2:
        return 2.0**-7
    return min(max((torch.finfo(dtype).eps / error) ** (1 / (depth - 1)), 2.0**-7), 1.0)


def warn_if_useless(alpha: float, beta: float, depth: int, dtype: torch.dtype, name: str) -> None:
    """Say what error to expect where float streams of ``dtype`` are inverted too inexactly to train on."""
    error = predicted_error(alpha, beta, depth, dtype)
    if error > USELESS:
        warnings.warn(
            f"{name}: inverting {depth} blocks at alpha = {alpha:g}, beta = {beta:g} in {dtype} multiplies an error by "
            f"{error_growth(alpha, beta):.3g} a block; the predicted relative error of gradients is "
            f"{'1 or more' if error >= 1 else f'{error:.1g}'}. Use exact streams, convert(model, exact=True), which "
            "invert bit for bit at any alpha and beta = 2^-k, or coefficients nearer to (0, 1)",
            PrecisionWarning,
            stacklevel=3,
        )
