"""Operations per op, for ``torch.utils.flop_counter.FlopCounterMode``: a multiplication and an addition are two.

As there, only products are counted: convolutions, squeeze-excite's layers and their gradients, not what is done once
per element. A recompute counts whenever it happens, so a training step without stored activations counts more than one
with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from revkernels.reference_mbconv import EXPANDS, SQUEEZES, TERM_NUMBERS

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


class _Products(NamedTuple):
    """Operations of each product of an MBConv's forward."""

    expand: int
    depthwise: int
    squeeze: int
    project: int

    @classmethod
    def of(
        cls, x: Shape, expand: Shape | None, depthwise: Shape, squeeze: Shape | None, project: Shape, stride: int
    ) -> _Products:
        n, c, h, w = x
        pixels = n * -(-h // stride) * -(-w // stride)
        return cls(
            0 if expand is None else 2 * n * h * w * prod(expand),
            2 * pixels * prod(depthwise),
            0 if squeeze is None else 2 * n * 2 * prod(squeeze),
            2 * pixels * prod(project),
        )


@_counts
def mbconv(x: Shape, fraction_bits: int | None, *others: Any, **__: object) -> int:
    """Expansion, depthwise convolution, squeeze-excite and projection, ``others`` from the expansion's weight on."""
    expand, depthwise, squeeze, project, stride = (others[k] for k in (0, 3, 6, 10, 25))
    return sum(_Products.of(x, expand, depthwise, squeeze, project, stride))


@_counts
def mbconv_recompute(
    x: Shape,
    fraction_bits: int | None,
    expand: Shape | None,
    depthwise: Shape,
    squeeze: Shape | None,
    squeeze_bias: Shape | None,
    excite: Shape | None,
    excite_bias: Shape | None,
    project: Shape,
    norms: Shape,
    stride: int,
    *_: object,
    **__: object,
) -> int:
    """What the forward computes."""
    return sum(_Products.of(x, expand, depthwise, squeeze, project, stride))


@_counts
def mbconv_infer_(
    maps: Sequence[Shape], weights: Sequence[Shape], terms: Sequence[int], *_: object, **__: object
) -> int:
    """What the forward of every term computes."""
    given, total = iter(weights), 0

    def convolution() -> Shape:  # and the norm behind it
        return [next(given) for _ in range(5)][0]

    for k in range(0, len(terms), TERM_NUMBERS):
        source, stride, flags = (terms[k + i] for i in (2, 4, 6))
        expand = convolution() if flags & EXPANDS else None
        depthwise = convolution()
        squeeze = [next(given) for _ in range(4)][0] if flags & SQUEEZES else None
        n, *size = maps[source]
        x = (n, depthwise[0] if expand is None else expand[1], *size[1:])
        total += sum(_Products.of(x, expand, depthwise, squeeze, convolution(), stride))
    return total


@_counts
def mbconv_backward(
    du: Shape,
    sums: Shape | None,
    x: Shape,
    fraction_bits: int | None,
    expand: Shape | None,
    depthwise: Shape,
    squeeze: Shape | None,
    squeeze_bias: Shape | None,
    excite: Shape | None,
    excite_bias: Shape | None,
    project: Shape,
    norms: Shape,
    batch: Sequence[bool],
    keep: Shape | None,
    stride: int,
    chunk: int,
    p: Shape | None,
    d: Shape | None,
    e: Shape | None,
    squeezed: Shape | None,
    dz: Shape | None,
    dx: Shape | None,
    *_: object,
    **__: object,
) -> int:
    """Gradients of weights and inputs, and planes not given as often as a pass of ``csrc/mbconv.h`` reads them.

    The passes read: (p, d) where ``sums`` are not given; (p, d); (d, e); with an expansion (e). d comes out of e.
    """
    products = _Products.of(x, expand, depthwise, squeeze, project, stride)
    sums_passes = 1 if sums is None else 0
    of_p = sums_passes + 1 if p is None else 0
    of_d = sums_passes + 2 if d is None else 0
    of_e = max(of_d, 1) + 1 if e is None else 0
    of_gate = 1 if squeezed is None else 0
    again = (of_e, of_d, of_gate, of_p)
    inputs = (dx is not None, dx is not None or expand is not None, True, True)
    return sum(f * (1 + given + times) for f, given, times in zip(products, inputs, again, strict=True))
