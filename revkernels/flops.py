"""Operations per op, for ``torch.utils.flop_counter.FlopCounterMode``: a multiplication and an addition are two.

As there, only products are counted: convolutions, squeeze-excite's layers and their gradients, not what is done once
per element. A recompute counts whenever it happens, so a training step without stored activations counts more than one
with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def _counts(formula: Callable[..., int]) -> Callable[..., int]:
    """Register ``formula``, which takes an op's arguments with shapes for tensors, for the op of its name."""
    return register_flop_formula(getattr(torch.ops.revkernels, formula.__name__))(formula)


@_counts
def pointwise_conv_(y: Shape, x: Shape, *_: object, **__: object) -> int:
    """``[N, O, H, W]`` sums over C."""
    return 2 * prod(y) * x[1]


@_counts
def pointwise_conv_grad_weight(x: Shape, dy: Shape, *_: object, **__: object) -> int:
    """``[O, C]`` sums over N, H and W."""
    return 2 * prod(x) * dy[1]


@_counts
def depthwise_conv(x: Shape, weight: Shape, *_: object, out_shape: Shape, **__: object) -> int:
    """Sums over a kernel."""
    return 2 * prod(out_shape) * prod(weight[2:])


@_counts
def depthwise_conv_grad_input(dy: Shape, weight: Shape, *_: object, **__: object) -> int:
    """Every output's gradient goes to the inputs under a kernel."""
    return 2 * prod(dy) * prod(weight[2:])


@_counts
def depthwise_conv_grad_weight(
    x: Shape, dy: Shape, scale: Shape | None, shift: Shape | None, kernel: int, *_: object, **__: object
) -> int:
    """A kernel of sums over N, H' and W' for every channel."""
    return 2 * prod(dy) * kernel**2


@_counts
def se_gate(pooled: Shape, w1: Shape, *_: object, **__: object) -> int:
    """``[N, R]`` sums over C, and ``[N, C]`` sums over R."""
    return 2 * pooled[0] * 2 * prod(w1)


@_counts
def se_gate_grad(dgate: Shape, gate: Shape, hidden: Shape, *_: object, **__: object) -> int:
    """Both layers' weights and inputs."""
    return 2 * prod(gate) * 4 * hidden[1]
