"""The public functions: arguments checked, gradients attached, every error naming the argument.

The functions that end in an underscore and the adjoints are the bare ops, for engines that do their own
backward; the others are differentiable (once: none of them supports a second derivative through the kernels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revkernels import registry  # noqa: F401  (defines the ops)
from revkernels.reference import accumulate_dtype

FACTORS = (1, 2, 4, 8)
MODES = ("bilinear", "nearest")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FIXED_POINT_DTYPES = (torch.float32, torch.float64, torch.int16)
FRACTION_BITS = range(-8, 25)
MOST_REMAINDER_BITS = 15

_ops = torch.ops.revkernels


def forbid_double_backward(name: str, why: str = "as its kernels have no second derivative") -> None:
    """Raise inside a backward that is itself being differentiated: a wrong second derivative would be silent."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once: double backward (create_graph=True) is not supported, {why}"
        )


def _check_map(
    name: str, x: Tensor, device: torch.device | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {[str(d) for d in dtypes]}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def _check_factor(name: str, factor: int, mode: str) -> None:
    if factor not in FACTORS:
        raise ValueError(f"{name}: expected an upsampling factor in {FACTORS}, got {factor!r}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")


def _check_vector(name: str, v: Tensor | None, n: int, c: int, device: torch.device) -> None:
    if v is None:
        return
    if tuple(v.shape) not in ((c,), (n, c)):
        raise ValueError(f"{name}: expected shape ({c},) or ({n}, {c}), got {tuple(v.shape)}")
    if v.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {v.device}")


def _check_finite(name: str, v: Tensor | None) -> None:
    """Refuse NaN and infinity where there are values to look at, and looking does not synchronise."""
    if torch.compiler.is_compiling() or v is None or v.device.type != "cpu":
        return
    finite = torch.isfinite(v)
    if type(finite) is Tensor and not finite.all():  # a fake tensor has no values
        raise ValueError(f"{name}: expected finite values, got {v[~finite][0].item()}")


def _optional_list(name: str, values: Sequence[Tensor | None] | None, count: int) -> list[Tensor | None]:
    values = [None] * count if values is None else list(values)
    if len(values) != count:
        raise ValueError(f"{name}: expected one entry (or None) per contribution, {count}, got {len(values)}")
    return values


def _is_overlapping(y: Tensor) -> bool:
    """Whether two indices of y share memory (an expanded tensor, say), which an in-place op cannot update."""
    extent = sorted((stride, size) for stride, size in zip(y.stride(), y.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in extent:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check_contributions(y: Tensor, p: Sequence[Tensor], factors: Sequence[int], mode: str) -> None:
    if len(factors) != len(p):
        raise ValueError(f"factors: expected one per contribution, {len(p)}, got {len(factors)}")
    n, c, h, w = y.shape
    for k, (p_k, f_k) in enumerate(zip(p, factors, strict=True)):
        _check_factor(f"factors[{k}]", f_k, mode)
        _check_map(f"p[{k}]", p_k, y.device)
        if h % f_k or w % f_k or tuple(p_k.shape) != (n, c, h // f_k, w // f_k):
            raise ValueError(
                f"p[{k}]: expected shape {(n, c)} + y's {(h, w)} / {f_k} so that it upsamples to y, "
                f"got {tuple(p_k.shape)}"
            )


def _check_fixed_point(y: Tensor, fraction_bits: int | None, overflow: Tensor | None) -> None:
    if fraction_bits is None:
        if y.dtype == torch.int16:
            raise TypeError("fraction_bits: expected an int, as y is int16 and holds y * 2^fraction_bits, got None")
        if overflow is not None:
            raise ValueError("overflow: expected None without fraction_bits, as only fixed-point streams have a range")
        return
    if not isinstance(fraction_bits, int) or isinstance(fraction_bits, bool):
        raise TypeError(f"fraction_bits: expected an int or None, got {type(fraction_bits).__name__}")
    if fraction_bits not in FRACTION_BITS:
        wanted = f"{FRACTION_BITS.start} to {FRACTION_BITS.stop - 1}"
        raise ValueError(f"fraction_bits: expected {wanted}, got {fraction_bits}")
    if y.dtype not in FIXED_POINT_DTYPES:
        dtypes = [str(d) for d in FIXED_POINT_DTYPES]
        raise TypeError(f"y: expected one of {dtypes}, as fraction_bits is given, got {y.dtype}")
    if overflow is None:
        return
    if not isinstance(overflow, Tensor):
        raise TypeError(f"overflow: expected a Tensor or None, got {type(overflow).__name__}")
    if overflow.dtype != torch.int64:
        raise TypeError(f"overflow: expected torch.int64, got {overflow.dtype}")
    if overflow.numel() != 1:
        raise ValueError(f"overflow: expected one element, got shape {tuple(overflow.shape)}")
    if overflow.device != y.device:
        raise ValueError(f"overflow: expected a tensor on {y.device}, got one on {overflow.device}")


def couple_(
    y: Tensor,
    p: Sequence[Tensor],
    factors: Sequence[int],
    *,
    scale: Sequence[Tensor | None] | None = None,
    shift: Sequence[Tensor | None] | None = None,
    mode: str = "bilinear",
    subtract: bool = False,
    fraction_bits: int | None = None,
    overflow: Tensor | None = None,
) -> Tensor:
    """Additive coupling in place: ``y <- y +/- t, t = sum_k up_{f_k}(a_k p_k + b_k)``, in one pass over y.

    The sum is kept in float32 (float64 for float64) and rounded to y once, the same way for both signs.

    With ``fraction_bits = g`` the stream is fixed-point, and the inverse exact: t becomes ``q 2^-g`` with
    ``q = rint(t 2^g)``, half to even. A float y on the grid of multiples of ``2^-g`` becomes ``y +/- q 2^-g``, without
    rounding while it is below ``2^(24 - g)`` (``2^(53 - g)`` in float64). An int16 y holds ``y 2^g`` and becomes
    ``wrap16(y +/- q)``, which inverts bit for bit whatever t is: q saturates at ``2^31``, and NaN counts as 0.

    Args:
        y: ``[N, C, H, W]``, float, updated in place; any strides without overlap. With ``fraction_bits`` int16, float32
            or float64.
        p: contributions ``p_k [N, C, H / f_k, W / f_k]``, float, any strides, not necessarily y's dtype.
        factors: ``f_k`` in {1, 2, 4, 8}, one per contribution.
        scale: ``a_k``, ``[C]`` or ``[N, C]`` each, or None for 1.
        shift: ``b_k``, likewise, or None for 0.
        mode: ``"bilinear"`` (``align_corners=False``) or ``"nearest"``.
        subtract: the inverse operation.
        fraction_bits: g, in -8 .. 24; None for a floating-point stream.
        overflow: int64, one element on y's device, updated in place: grows by the number of elements whose result left
            the range of its exactness, or whose t is not finite. None: they are not counted.

    Returns:
        y.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it. On the
            CPU, scale and shift must be finite; on CUDA that is not looked at, as it would synchronise.
        RuntimeError: a tensor's storage was freed, or y or overflow shares memory with another argument.
    """
    _check_map("y", y, dtypes=(*DTYPES, torch.int16))
    _check_fixed_point(y, fraction_bits, overflow)
    if _is_overlapping(y):
        raise ValueError(f"y: expected memory without overlap for an in-place update, got strides {y.stride()}")
    _check_contributions(y, p, factors, mode)
    scale = _optional_list("scale", scale, len(p))
    shift = _optional_list("shift", shift, len(p))
    for k in range(len(p)):
        _check_vector(f"scale[{k}]", scale[k], y.shape[0], y.shape[1], y.device)
        _check_vector(f"shift[{k}]", shift[k], y.shape[0], y.shape[1], y.device)
        _check_finite(f"scale[{k}]", scale[k])
        _check_finite(f"shift[{k}]", shift[k])
    _ops.couple_(y, list(p), scale, shift, list(factors), mode, subtract, fraction_bits, overflow)
    return y


def couple_adjoint(
    dy: Tensor,
    factors: Sequence[int],
    *,
    p: Sequence[Tensor | None] | None = None,
    center: Sequence[Tensor | None] | None = None,
    mode: str = "bilinear",
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Transpose of :func:`couple_`: ``du_k = up_{f_k}^T(dy)`` for every k from one read of dy, without atomics.

    Args:
        dy: ``[N, C, H, W]``, float, any strides.
        factors: ``f_k`` in {1, 2, 4, 8}; they must divide H and W.
        p: raw contributions ``p_k [N, C, H / f_k, W / f_k]`` of which the sums are wanted, or None.
        center: ``m_k [C]``, subtracted from p_k in the second sum (BatchNorm's mean), or None for 0.
        mode: as in the forward.

    Returns:
        ``du``: one tensor per factor in dy's dtype; for ``f_k = 1`` it is dy itself, not a copy.
        ``sums``: ``[2, N, C] = (sum_hw du_k, sum_hw du_k (p_k - m_k))`` in float32 (float64), None where p_k is None.

    Raises:
        ValueError, TypeError: as :func:`couple_`.
    """
    _check_map("dy", dy)
    p = _optional_list("p", p, len(factors))
    center = _optional_list("center", center, len(factors))
    n, c, h, w = dy.shape
    for k, f_k in enumerate(factors):
        _check_factor(f"factors[{k}]", f_k, mode)
        if h % f_k or w % f_k:
            raise ValueError(f"factors[{k}]: expected a divisor of dy's size {(h, w)}, got {f_k}")
        p_k = p[k]
        if p_k is not None:
            _check_contributions(dy, [p_k], [f_k], mode)
        _check_vector(f"center[{k}]", center[k], n, c, dy.device)
    du, sums = _ops.couple_adjoint(dy, p, center, list(factors), mode)
    du = [dy if f_k == 1 else du_k for f_k, du_k in zip(factors, du, strict=True)]
    return du, [None if p_k is None else s_k for p_k, s_k in zip(p, sums, strict=True)]


class _Couple(torch.autograd.Function):
    """``z = y + sum_k up_{f_k}(p_k)``; ``dy = dz``, ``dp_k = up_{f_k}^T(dz)``."""

    @staticmethod
    def forward(y: Tensor, factors: tuple[int, ...], mode: str, *p: Tensor) -> Tensor:
        return couple_(y.clone(), p, factors, mode=mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factors, ctx.mode, *p = inputs
        ctx.dtypes = [p_k.dtype for p_k in p]

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("couple")
        du, _ = couple_adjoint(dz, ctx.factors, mode=ctx.mode)
        return dz, None, None, *(du_k.to(dtype) for du_k, dtype in zip(du, ctx.dtypes, strict=True))


def couple(y: Tensor, p: Sequence[Tensor], factors: Sequence[int], *, mode: str = "bilinear") -> Tensor:
    """Differentiable, out-of-place :func:`couple_` with ``a_k = 1``, ``b_k = 0``; y is left as it was.

    Args, Raises: as :func:`couple_`.

    Returns:
        ``z [N, C, H, W] = y + sum_k up_{f_k}(p_k)`` in y's dtype.
    """
    return _Couple.apply(y, tuple(factors), mode, *p)


def remainder_bytes(size: int, beta: float) -> int:
    """Bytes that :func:`dual_residual_` keeps of ``size`` integers divided by ``1 / beta = 2^k``: k bits each."""
    return -(-size // 8) * _shift_of(beta)


def _shift_of(beta: float) -> int:
    """k of ``beta = 2^-k``."""
    mantissa, exponent = math.frexp(beta)
    if mantissa != 0.5 or not 0 <= 1 - exponent <= MOST_REMAINDER_BITS:
        raise ValueError(
            f"beta: expected 2^-k with k from 0 to {MOST_REMAINDER_BITS} for an integer stream, whose division by 2^k "
            f"has a remainder of k bits, got {beta}"
        )
    return 1 - exponent


def _check_like(name: str, v: Tensor, y: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(v).__name__}")
    if v.shape != y.shape:
        raise ValueError(f"{name}: expected shape {tuple(y.shape)}, got {tuple(v.shape)}")
    if v.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {[str(d) for d in dtypes]}, got {v.dtype}")
    if v.device != y.device:
        raise ValueError(f"{name}: expected a tensor on {y.device}, got one on {v.device}")


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, v in tensors.items():
        if v is not None and not v.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, as it is updated in place, got {v.stride()}")


def _check_coefficients(coefficient: float, beta: float) -> None:
    for name, value in (("coefficient", coefficient), ("beta", beta)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    if beta == 0:
        raise ValueError("beta: expected a number other than 0, which has no inverse")


def dual_residual_(
    y: Tensor,
    x: Tensor | None,
    p: Tensor,
    *,
    coefficient: float = 0.0,
    beta: float = 1.0,
    inverse: bool = False,
    fraction_bits: int | None = None,
    remainder: Tensor | None = None,
    overflow: Tensor | None = None,
) -> Tensor:
    """The step of a dual-residual network in place: ``y <- beta y + p + c x``, in one pass.

    The sum is kept in float32 (float64 for float64) and rounded to y once. Its inverse: ``y <- (y - p - c x) / beta``.

    With ``fraction_bits = g`` y and x are integers, which stand for ``2^-g y`` and ``2^-g x``, and the inverse
    is exact: ``q = rint(2^g p + c x)``, half to even, ``y <- (y >> k) + q`` with ``beta = 2^-k``, while the k bits that
    are shifted out are packed into ``remainder``; ``y <- ((y - q) << k) | bits`` undoes that whatever p is. Sums wrap
    around, and q is 0 where it is no int32: both are counted in ``overflow``.

    Args:
        y: any shape, float, or int16 or int32 with ``fraction_bits``; contiguous, updated in place.
        x: of y's shape and dtype; None for 0.
        p: of y's shape, float, any strides.
        coefficient: c.
        beta: not 0; with ``fraction_bits`` ``2^-k``, k in 0 .. 15.
        inverse: undo the step.
        fraction_bits: g, in -8 .. 24; None for floats.
        remainder: uint8, ``remainder_bytes(y.numel(), beta)`` of them: written by the step, read by its inverse. None:
            they are not kept, or there are none (k = 0).
        overflow: int64, one element: grows by the number of elements whose result left the integers' range.

    Returns:
        y.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or value; the message names it.
        RuntimeError: a tensor's storage was freed, or y, remainder or overflow shares memory with another argument.
    """
    integer = fraction_bits is not None
    _check_like("y", y, y, (torch.int16, torch.int32) if integer else DTYPES)
    _check_like("p", p, y, DTYPES)
    if x is not None:
        _check_like("x", x, y, (y.dtype,))
    _check_contiguous(y=y, x=x, remainder=remainder)
    _check_coefficients(coefficient, beta)
    if integer:
        if fraction_bits not in FRACTION_BITS:
            wanted = f"{FRACTION_BITS.start} to {FRACTION_BITS.stop - 1}"
            raise ValueError(f"fraction_bits: expected {wanted}, got {fraction_bits}")
        size = remainder_bytes(y.numel(), beta)
        if remainder is not None and (remainder.dtype != torch.uint8 or remainder.numel() != size):
            raise ValueError(
                f"remainder: expected {size} elements of torch.uint8, got {remainder.numel()} of {remainder.dtype}"
            )
        if inverse and size and remainder is None:
            raise ValueError(f"remainder: expected the {size} bytes that the forward step kept, got None")
        if overflow is not None and (overflow.dtype != torch.int64 or overflow.numel() != 1):
            raise ValueError(f"overflow: expected one int64, got {overflow.numel()} of {overflow.dtype}")
    elif remainder is not None or overflow is not None:
        raise ValueError("remainder, overflow: expected None without fraction_bits, as only integers have them")
    _ops.dual_residual_(y, x, p.contiguous(), coefficient, beta, inverse, fraction_bits, remainder, overflow)
    return y


def dual_residual_adjoint_(
    dx: Tensor, dy: Tensor, g: Tensor | None, *, coefficient: float = 0.0, beta: float = 1.0
) -> None:
    """Transpose of :func:`dual_residual_` in place: ``dx <- dx + g + c dy``, then ``dy <- beta dy``, in one pass.

    Args:
        dx, dy: gradients of x and of the step's result, float, of one shape and dtype; contiguous, updated in place;
            dy becomes the gradient of the y that the step found.
        g: ``J_p^T dy``, what dy is pulled back to through p; of their shape, float, any strides; None for 0.
        coefficient, beta: of the step.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dual_residual_`.
    """
    _check_like("dy", dy, dy, DTYPES)
    _check_like("dx", dx, dy, (dy.dtype,))
    if g is not None:
        _check_like("g", g, dy, DTYPES)
    _check_contiguous(dx=dx, dy=dy)
    _check_coefficients(coefficient, beta)
    _ops.dual_residual_adjoint_(dx, dy, None if g is None else g.contiguous(), coefficient, beta)


class _DualResidual(torch.autograd.Function):
    """``z = beta y + p + c x``; ``dp = dz``, ``dx = c dz``, ``dy = beta dz``."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, p: Tensor, coefficient: float, beta: float) -> Tensor:
        z = y.clone(memory_format=torch.contiguous_format)
        return dual_residual_(z, x.contiguous(), p, coefficient=coefficient, beta=beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, p, ctx.coefficient, ctx.beta = inputs
        ctx.dtype = p.dtype

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("dual_residual")
        dx, dy = torch.zeros_like(dz, memory_format=torch.contiguous_format), dz.contiguous().clone()
        dual_residual_adjoint_(dx, dy, None, coefficient=ctx.coefficient, beta=ctx.beta)
        return dy, dx, dz.to(ctx.dtype), None, None


def dual_residual(y: Tensor, x: Tensor, p: Tensor, *, coefficient: float = 0.0, beta: float = 1.0) -> Tensor:
    """Differentiable, out-of-place :func:`dual_residual_` on floats; y is left as it was.

    Args, Raises: as :func:`dual_residual_`.

    Returns:
        ``z = beta y + p + c x`` in y's dtype, contiguous.
    """
    return _DualResidual.apply(y, x, p, coefficient, beta)


class _Upsample(torch.autograd.Function):
    """``y = up_f(x)``; ``dx = up_f^T(dy)``."""

    @staticmethod
    def forward(x: Tensor, factor: int, mode: str) -> Tensor:
        return _ops.upsample(x, factor, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, ctx.mode = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("upsample")
        return _ops.upsample_adjoint(dy, ctx.factor, ctx.mode), None, None


def upsample(x: Tensor, factor: int, *, mode: str = "bilinear") -> Tensor:
    """Upsample a map by 1, 2, 4 or 8, as ``F.interpolate(scale_factor=factor, align_corners=False)``.

    Args:
        x: ``[N, C, H, W]``, float.
        factor: 1, 2, 4 or 8.
        mode: ``"bilinear"`` or ``"nearest"``.

    Returns:
        ``[N, C, factor * H, factor * W]``, contiguous, x's dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype, factor or mode.
    """
    _check_map("x", x)
    _check_factor("factor", factor, mode)
    return _Upsample.apply(x, factor, mode)


class _SpaceToDepth(torch.autograd.Function):
    """A linear map; its transpose sums the gradients of repeated planes."""

    @staticmethod
    def forward(x: Tensor, planes: int, block: int) -> Tensor:
        return _ops.space_to_depth(x, planes, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.block = inputs
        ctx.channels = x.shape[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("space_to_depth")
        return _ops.space_to_depth_adjoint(dy, ctx.channels, ctx.block), None, None


def space_to_depth(x: Tensor, planes: int, block: int) -> Tensor:
    """Move ``block x block`` pixels into channels, after repeating the image planes cyclically to ``planes``.

    ``y[n, (r * block + q) * planes + p, i, j] = x[n, p mod C, i * block + r, j * block + q]`` (the network's stem).

    Args:
        x: ``[N, C, H, W]``, float; H and W multiples of ``block``.
        planes: at least C.
        block: side of the block in pixels, at least 1.

    Returns:
        ``[N, planes * block^2, H / block, W / block]``, contiguous.

    Raises:
        ValueError, TypeError: wrong shape, dtype, planes or block.
    """
    _check_map("x", x)
    if block < 1 or x.shape[2] % block or x.shape[3] % block:
        raise ValueError(f"block: expected a divisor of the image's size {tuple(x.shape[2:])}, got {block}")
    if planes < x.shape[1]:
        raise ValueError(f"planes: expected at least the image's {x.shape[1]} channels, got {planes}")
    return _SpaceToDepth.apply(x, planes, block)


def depth_to_space(y: Tensor, channels: int, block: int) -> Tensor:
    """Inverse of :func:`space_to_depth` (not differentiable): the first copy of each image plane.

    Args:
        y: ``[N, planes * block^2, H, W]``, float.
        channels: planes of the image, at most ``planes``.
        block: side of the block in pixels.

    Returns:
        ``[N, channels, block * H, block * W]``, contiguous.

    Raises:
        ValueError, TypeError: wrong shape, dtype, channels or block.
    """
    _check_map("y", y)
    if block < 1 or y.shape[1] % (block * block):
        raise ValueError(f"block: expected block^2 to divide y's {y.shape[1]} channels, got {block}")
    if not 1 <= channels <= y.shape[1] // (block * block):
        raise ValueError(f"channels: expected 1 to {y.shape[1] // (block * block)}, got {channels}")
    return _ops.depth_to_space(y, channels, block)


class _DepthwiseConv(torch.autograd.Function):
    """``y = w * x`` per channel; ``dx = w^T * dy``, ``dw = x * dy``."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        return _ops.depthwise_conv(x, weight, None, None, stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("depthwise_conv")
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _ops.depthwise_conv_grad_input(dy, weight, x.shape[2], x.shape[3], ctx.stride)
        if ctx.needs_input_grad[1]:
            kernel = weight.shape[-1]
            dw = _ops.depthwise_conv_grad_weight(x, dy, None, None, kernel, ctx.stride).to(weight.dtype)
        return dx, dw, None


def depthwise_conv(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """Depthwise convolution with an odd kernel k, zero padding ``(k - 1) / 2`` and no bias, as ``F.conv2d``.

    Args:
        x: ``[N, C, H, W]``, float.
        weight: ``[C, 1, k, k]``, k odd, on x's device.
        stride: at least 1.

    Returns:
        ``[N, C, ceil(H / stride), ceil(W / stride)]``, contiguous, x's dtype.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or stride.
    """
    _check_map("x", x)
    _check_map("weight", weight, x.device)
    c, one, k, k2 = weight.shape
    if c != x.shape[1] or one != 1 or k != k2 or k % 2 == 0:
        raise ValueError(f"weight: expected shape ({x.shape[1]}, 1, k, k) with k odd, got {tuple(weight.shape)}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    return _DepthwiseConv.apply(x, weight, stride)


__all__ = [
    "accumulate_dtype",
    "couple",
    "couple_",
    "couple_adjoint",
    "depth_to_space",
    "depthwise_conv",
    "dual_residual",
    "dual_residual_",
    "dual_residual_adjoint_",
    "forbid_double_backward",
    "remainder_bytes",
    "space_to_depth",
    "upsample",
]
