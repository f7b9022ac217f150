"""The 1x1 convolution and its weight gradient: every implementation that runs here against the reference in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from revkernels import reference
from revkernels.reference import accumulate_dtype
from revkernels.testing import LAYOUTS, contiguous, implementations, poison, relative_error
from tests.marks import covering

pytestmark = covering

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CONV = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("pointwise_conv_", d)}
GRAD = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("pointwise_conv_grad_weight", d)}
NATIVE = pytest.mark.parametrize("run", [name for name in CONV if name.startswith("cpp")])
conv = pytest.mark.parametrize("run", CONV)
grad = pytest.mark.parametrize("run", GRAD)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
PROLOGUES = pytest.mark.parametrize("prologue", ["none", "affine", "gated"])

# (N, C, H, W), O: planes shorter and longer than a panel and a segment, pieces of them, odd numbers of everything.
SHAPES = [
    ((2, 24, 14, 14), 24),
    ((8, 40, 7, 7), 72),
    ((1, 1, 1, 1), 1),
    ((67, 5, 1, 1), 3),
    ((3, 17, 13, 31), 9),
    ((1, 3, 67, 130), 5),
    ((2, 200, 5, 3), 131),
    ((1, 2, 33, 32), 65),
    ((5, 4, 1, 33), 2),
    ((7, 208, 7, 7), 197),
    ((2, 37, 2, 2), 83),
    ((1, 195, 19, 20), 240),
]
EMPTY = [((0, 3, 4, 4), 2), ((2, 3, 0, 4), 2), ((2, 3, 4, 4), 0), ((2, 0, 4, 4), 3)]


def draw(shape, out, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, c, h, w = shape

    def normal(*size):
        return torch.randn(*size, generator=g)

    acc = accumulate_dtype(dtype)
    x, dy = (2 * normal(n, c, h, w)).to(dtype), normal(n, out, h, w).to(dtype)
    weight = (normal(out, c, 1, 1) / max(c, 1) ** 0.5).to(dtype).to(acc)  # representable: devices may round it
    scale, shift, gate = normal(c), normal(c), normal(n, c).sigmoid()
    prologues = {"none": (None, None, None), "affine": (scale, shift, None), "gated": (scale, shift, gate)}
    return x, dy, weight, prologues


def tolerance(run, terms, dtype, *others):
    """Results are rounded to dtype; cuBLAS takes z rounded to the maps' dtype, which the interpreter truncates to."""
    coarsest = 4 * max(map(ULP.get, (dtype, *others))) if run.startswith("triton") else ULP[dtype]
    return coarsest + ULP[accumulate_dtype(dtype)] * 4 * max(terms, 1) ** 0.5


def move(values, device):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


# Of two maps: one of them contiguous or both alike, and any two.
PAIRS = [
    pytest.param(a, b, marks=() if a is b or contiguous in (a, b) else pytest.mark.slow)
    for a, b in itertools.product(LAYOUTS, LAYOUTS)
]


def check_conv(run, x, weight, prologue, y):
    """The op's result in y, against the reference in float64."""
    call, device = CONV[run]
    want = torch.empty(y.shape, dtype=torch.float64)
    reference.pointwise_conv_(want, *double([x, weight, *prologue]))
    given, strides = move([x, weight, *prologue], device), y.stride()
    poison()
    assert call(y, *given) is None
    assert y.stride() == strides
    assert relative_error(y.cpu(), want) <= tolerance(run, x.shape[1], y.dtype, *({x.dtype} & ULP.keys()))


@conv
@DTYPES
@PROLOGUES
@pytest.mark.parametrize("shape, out", SHAPES + EMPTY, ids=str)
def test_convolution_equals_the_reference(run, dtype, prologue, shape, out):
    x, dy, weight, prologues = draw(shape, out, dtype)
    check_conv(run, x, weight, prologues[prologue], torch.full_like(dy, float("nan"), device=CONV[run][1]))


def test_reference_is_pytorchs_convolution():
    x, dy, weight, prologues = draw((2, 6, 5, 7), 4, torch.float64)
    scale, shift, gate = prologues["gated"]
    z = F.hardswish(x * scale[:, None, None] + shift[:, None, None]) * gate[..., None, None]
    reference.pointwise_conv_(y := torch.empty_like(dy), x, weight, scale, shift, gate)
    torch.testing.assert_close(y, F.conv2d(z, weight))
    dw = reference.pointwise_conv_grad_weight(x, dy, scale, shift, gate)
    torch.testing.assert_close(dw, torch.nn.grad.conv2d_weight(z, weight.shape, dy))


@conv
@pytest.mark.parametrize("x_layout, y_layout", PAIRS)
def test_convolution_of_any_strides(run, x_layout, y_layout):
    x, dy, weight, prologues = draw((3, 9, 6, 35), 7)
    y = y_layout(torch.full_like(dy, float("nan"), device=CONV[run][1]))
    check_conv(run, x_layout(x), weight, prologues["gated"], y)


@conv
def test_convolution_with_a_transposed_weight(run):
    """``dz = W^T dy`` reads the same weight the other way round."""
    x, dy, weight, _ = draw((2, 24, 9, 9), 40)
    check_conv(run, dy, weight.transpose(0, 1), (None, None, None), torch.empty_like(x, device=CONV[run][1]))


@conv
def test_what_lies_between_the_results_is_left_as_it_was(run):
    call, device = CONV[run]
    x, _, weight, prologues = draw((2, 5, 6, 35), 3)
    memory = torch.full((2, 5, 8, 40), float("nan"), device=device)
    y = memory[:, 1:4, 1:7, 2:37]
    check_conv(run, x, weight, prologues["gated"], y)
    y.fill_(float("nan"))
    assert memory.isnan().all()


@conv
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_maps_of_two_dtypes(run, x_dtype, y_dtype):
    """Under autocast a float32 stream is read by a convolution that computes 16-bit planes."""
    x, dy, weight, prologues = draw((2, 12, 6, 10), 8, torch.bfloat16)
    for prologue in (prologues["none"], prologues["gated"]):
        check_conv(run, x.to(x_dtype), weight, prologue, torch.empty(dy.shape, dtype=y_dtype, device=CONV[run][1]))


@NATIVE
def test_int16_maps_count_as_float32(run):
    x = torch.randint(-(2**15), 2**15, (2, 24, 7, 9), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    _, dy, weight, _ = draw(x.shape, 16)
    for y_dtype in (torch.float32, torch.bfloat16):
        check_conv(run, x[:, 4:20], weight[:, 4:20], (None, None, None), torch.empty(dy.shape, dtype=y_dtype))
    check_grad(run, x, dy, (None, None, None))


@NATIVE
@pytest.mark.parametrize("shape, out", SHAPES[:5], ids=str)
def test_a_sample_is_the_same_bits_in_any_batch(run, shape, out):
    call, _ = CONV[run]
    x, dy, weight, prologues = draw(shape, out)
    for scale, shift, gate in (prologues["affine"], prologues["gated"]):
        y = torch.empty_like(dy)
        call(y, x, weight, scale, shift, gate)
        for n in range(len(x)):
            alone = torch.empty_like(dy[:1])
            call(alone, x[n : n + 1], weight, scale, shift, None if gate is None else gate[n : n + 1])
            assert torch.equal(alone[0], y[n])


@NATIVE
@pytest.mark.parametrize("out", [72, 200], ids="{} channels".format)
def test_threads_do_not_change_the_bits(run, out):
    x, dy, weight, prologues = draw((6, 224, 14, 14), out)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            CONV[run][0](y := torch.empty_like(dy), x, weight, *prologues["gated"])
            found.append((y, GRAD[run][0](x, dy, *prologues["gated"])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# The weight's gradient ------------------------------------------------------------------------------


def check_grad(run, x, dy, prologue):
    call, device = GRAD[run]
    want = reference.pointwise_conv_grad_weight(*double([x, dy, *prologue]))
    given = move([x, dy, *prologue], device)
    poison()
    dw = call(*given)
    assert dw.shape == want.shape and dw.dtype == accumulate_dtype(x.dtype)
    assert relative_error(dw.cpu(), want) <= tolerance(run, len(x) * x.shape[2] * x.shape[3], dw.dtype, dy.dtype)


@grad
@DTYPES
@PROLOGUES
@pytest.mark.parametrize("shape, out", SHAPES + EMPTY, ids=str)
def test_gradient_equals_the_reference(run, dtype, prologue, shape, out):
    x, dy, _, prologues = draw(shape, out, dtype)
    check_grad(run, x, dy, prologues[prologue])


@grad
@pytest.mark.parametrize("x_layout, dy_layout", PAIRS)
def test_gradient_of_any_strides(run, x_layout, dy_layout):
    x, dy, _, prologues = draw((3, 9, 6, 35), 7)
    check_grad(run, x_layout(x), dy_layout(dy), prologues["gated"])


@NATIVE
def test_bad_arguments_are_named(run):
    x, dy, weight, prologues = draw((2, 6, 4, 5), 3)
    scale, shift, gate = prologues["gated"]
    y, none = torch.empty_like(dy), (None, None, None)
    bad = {
        "x: dtype Int is not supported": (y, x.int(), weight, *none),
        r"x: expected \[N, C, H, W\], got \[6, 4, 5\]": (y, x[0], weight, *none),
        r"weight: expected \[O, C, 1, 1\] with C = 6, got \[3, 5, 1, 1\]": (y, x, weight[:, :5], *none),
        r"weight: expected \[N, C, H, W\], got \[3, 6\]": (y, x, weight[..., 0, 0], *none),
        "weight: dtype Int is not supported": (y, x, weight.int(), *none),
        r"y: expected \[2, 3, 4, 5\], got \[2, 2, 4, 5\]": (y[:, :2], x, weight, *none),
        "y: expected not float64 as x is, got Double": (y.double(), x, weight, *none),
        "y: expected float64 as x is, got Float": (y, x.double(), weight, *none),
        "y: elements overlap in memory": (y[:1].expand_as(y), x, weight, *none),
        "scale, shift: give both or neither": (y, x, weight, scale, None, None),
        "gate: needs scale and shift": (y, x, weight, None, None, gate),
        r"scale: expected \[C\]": (y, x, weight, gate, shift, None),
        r"gate: expected \[N, C\]": (y, x, weight, scale, shift, scale),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            CONV[run][0](*arguments)
    bad = {
        r"dy: expected \[2, 3, 4, 5\], got \[2, 3, 5, 4\]": (x, dy.mT, *none),
        r"dy: expected \[2, 3, 4, 5\], got \[1, 3, 4, 5\]": (x, dy[:1], *none),
        r"dy: expected \[N, C, H, W\], got \[3, 4, 5\]": (x, dy[0], *none),
        "gate: needs scale and shift": (x, dy, None, None, gate),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            GRAD[run][0](*arguments)
