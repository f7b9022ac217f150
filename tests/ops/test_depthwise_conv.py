"""Depthwise convolution and its gradients, every implementation that runs here against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error
from tests.marks import covering

pytestmark = covering

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OPS = ("depthwise_conv", "depthwise_conv_grad_input", "depthwise_conv_grad_weight")
RUNS = {
    f"{name}-{d}": ({op: dict(implementations(op, d))[name] for op in OPS}, d)
    for d in DEVICES
    for name, _ in implementations(OPS[0], d)
}
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# The network's kernels and strides, then others.
KERNELS = [(3, 1), (5, 1), (3, 2), (5, 2), (7, 4), (15, 8), (1, 1), (7, 1), (3, 4), (1, 2), (5, 3), (9, 6), (31, 1)]
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 2, 1, 9), (2, 2, 14, 14), (1, 2, 17, 33), (11, 1, 8, 8), (1, 1, 70, 41)]
TINY = [(9, 19, 3, 2), (2, 37, 4, 1)]  # planes side by side in vectors, tiles of them cut anywhere

impls = pytest.mark.parametrize("impl", RUNS)
kernels = pytest.mark.parametrize("kernel, stride", KERNELS)


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def problem(shape, kernel, stride, dtype=torch.float64, device="cpu", prologue=False):
    """x, weight, (scale, shift) or (None, None), dy; vectors and weights in the accumulate dtype."""
    n, c, h, w = shape
    acc = reference.accumulate_dtype(dtype)
    weight = draw((c, 1, kernel, kernel), acc, device, seed=1) / kernel
    vectors = [draw((c,), acc, device, seed=s) if prologue else None for s in (2, 3)]
    dy = draw((n, c, -(-h // stride), -(-w // stride)), dtype, device, seed=4)
    return draw(shape, dtype, device), weight, *vectors, dy


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def fresh(run, *arguments):
    """Run over memory that was left full of NaN, so that an unwritten output shows."""
    poison()
    return run(*arguments)


def all_three(runs, x, weight, scale, shift, dy, stride):
    k, (h, w) = weight.shape[-1], x.shape[2:]
    return {
        "depthwise_conv": fresh(runs["depthwise_conv"], x, weight, scale, shift, stride),
        "depthwise_conv_grad_input": fresh(runs["depthwise_conv_grad_input"], dy, weight, h, w, stride),
        "depthwise_conv_grad_weight": fresh(runs["depthwise_conv_grad_weight"], x, dy, scale, shift, k, stride),
    }


REFERENCE = {op: getattr(reference, op) for op in OPS}


@impls
@kernels
@pytest.mark.parametrize("shape", SHAPES + TINY, ids=str)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "hardswish"])
def test_matches_the_reference(impl, kernel, stride, shape, prologue):
    runs, device = RUNS[impl]
    arguments = problem(shape, kernel, stride, device=device, prologue=prologue)
    want = all_three(REFERENCE, *arguments, stride)
    for op, out in all_three(runs, *arguments, stride).items():
        assert out.shape == want[op].shape and out.is_contiguous() and out.dtype == want[op].dtype
        assert relative_error(out, want[op]) < 1e-13, op


@impls
@kernels
def test_gradients_are_the_transposes(impl, kernel, stride):
    """``<A(w) x, dy> = <x, A(w)^T dy> = <w, B(x)^T dy>``"""
    runs, device = RUNS[impl]
    x, weight, scale, shift, dy = problem((2, 3, 19, 22), kernel, stride, device=device)
    out = all_three(runs, x, weight, scale, shift, dy, stride)
    inner = (out["depthwise_conv"] * dy).sum()
    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close((x * out["depthwise_conv_grad_input"]).sum(), inner, **close)
    torch.testing.assert_close((weight * out["depthwise_conv_grad_weight"]).sum(), inner, **close)


class Convolution(torch.autograd.Function):
    """``hardswish(scale x + shift)`` and the convolution as one differentiable function made of the ops."""

    @staticmethod
    def forward(ctx, runs, stride, x, weight, scale, shift):
        ctx.runs, ctx.stride = runs, stride
        ctx.save_for_backward(x, weight, scale, shift)
        return runs["depthwise_conv"](x, weight, scale, shift, stride)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale, shift = ctx.saved_tensors
        dv = ctx.runs["depthwise_conv_grad_input"](dy, weight, *x.shape[2:], ctx.stride)
        dw = ctx.runs["depthwise_conv_grad_weight"](x, dy, scale, shift, weight.shape[-1], ctx.stride)
        sums = ctx.runs["bn_act_grad_sums"](dv, x, scale, shift, torch.zeros_like(scale), "hardswish").sum(1)
        dx = ctx.runs["bn_act_grad"](dv, x, scale, shift, None, None, None, None, "hardswish")
        return None, None, dx, dw, sums[2], sums[1]


@impls
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (5, 2), (7, 4), (3, 3)])
def test_gradcheck_with_the_prologue(impl, kernel, stride):
    runs, device = RUNS[impl]
    names = ("bn_act_grad_sums", "bn_act_grad")
    runs = runs | {op: dict(implementations(op, device))[impl.removesuffix(f"-{device}")] for op in names}
    *leaves, _ = problem((2, 2, 5, 6), kernel, stride, device=device, prologue=True)
    leaves = [v.requires_grad_() for v in leaves]
    assert torch.autograd.gradcheck(lambda *v: Convolution.apply(runs, stride, *v), leaves)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 2), (7, 4), (9, 1)])
def test_sums_are_kept_in_single_precision_at_least(impl, dtype, kernel, stride):
    runs, device = RUNS[impl]
    x, weight, scale, shift, dy = problem((3, 4, 21, 26), kernel, stride, dtype, device)
    want = all_three(REFERENCE, *wide(x, weight, scale, shift, dy), stride)
    out = all_three(runs, x, weight, scale, shift, dy, stride)
    plain = F.conv2d(x, weight.to(dtype), None, stride, (kernel - 1) // 2, 1, 4)
    allowed = 2 * relative_error(plain, want["depthwise_conv"]) + ULP[dtype] / 2
    assert out["depthwise_conv"].dtype == out["depthwise_conv_grad_input"].dtype == dtype
    assert relative_error(out["depthwise_conv"], want["depthwise_conv"]) <= allowed
    assert relative_error(out["depthwise_conv_grad_input"], want["depthwise_conv_grad_input"]) <= allowed
    weight_grad = out["depthwise_conv_grad_weight"]
    assert weight_grad.dtype == reference.accumulate_dtype(dtype)
    assert relative_error(weight_grad, want["depthwise_conv_grad_weight"]) <= 8 * ULP[weight_grad.dtype]


def views(x):
    """The same values in other layouts; what lies between them is NaN."""
    n, c, h, w = x.shape
    half = x.new_full((n, 2 * c, h, w), float("nan"))
    half[:, c:] = x
    crop = x.new_full((n, c, h + 2, w + 3), float("nan"))
    crop[:, :, 1 : 1 + h, 2 : 2 + w] = x
    return {
        "half": half[:, c:],
        "crop": crop[:, :, 1 : 1 + h, 2 : 2 + w],
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@impls
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (3, 2), (7, 4), (15, 8), (7, 1)])
@pytest.mark.parametrize("layout", list(views(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 18, 20), (2, 19, 4, 3)], ids=str)
def test_accepts_any_strides(impl, kernel, stride, layout, dtype, shape):
    runs, device = RUNS[impl]
    x, weight, scale, shift, dy = problem(shape, kernel, stride, dtype, device, prologue=True)
    want = all_three(runs, x, weight, scale, shift, dy, stride)
    got = all_three(runs, views(x)[layout], views(weight)[layout], scale, shift, views(dy)[layout], stride)
    for op in OPS:  # PyTorch's own convolution takes another path for other layouts
        assert relative_error(got[op], want[op]) <= (1e-6 if impl.startswith("reference") else 0), op


@impls
@kernels
def test_zero_padding_does_not_look_beyond_the_map(impl, kernel, stride):
    """A NaN stays within reach of its kernel, and neighbours in memory never matter."""
    runs, device = RUNS[impl]
    x, weight, *_ = problem((1, 2, 40, 40), kernel, stride, torch.float32, device)
    x[0, 0, 20, 20] = float("nan")
    y = runs["depthwise_conv"](x, weight, None, None, stride)
    want = reference.depthwise_conv(x.double(), weight.double(), None, None, stride)
    assert torch.equal(y.isnan(), want.isnan())


@impls
@kernels
def test_an_empty_batch_gives_empty_maps_and_zero_weight_gradients(impl, kernel, stride):
    runs, device = RUNS[impl]
    x, weight, scale, shift, dy = problem((0, 3, 9, 10), kernel, stride, torch.float32, device)
    out = all_three(runs, x, weight, scale, shift, dy, stride)
    assert out["depthwise_conv"].shape == dy.shape
    assert out["depthwise_conv_grad_input"].shape == x.shape
    assert torch.equal(out["depthwise_conv_grad_weight"], torch.zeros_like(weight))


@impls
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (3, 2), (7, 4), (15, 8)])
@pytest.mark.parametrize("shape", [(5, 3, 14, 15), (5, 19, 4, 4)], ids=str)
def test_maps_do_not_depend_on_how_the_batch_is_cut(impl, kernel, stride, shape):
    runs, device = RUNS[impl]
    x, weight, scale, shift, dy = problem(shape, kernel, stride, torch.float32, device, prologue=True)
    whole = all_three(runs, x, weight, scale, shift, dy, stride)
    for op in OPS[:2]:
        parts = [all_three(runs, x[i], weight, scale, shift, dy[i], stride)[op] for i in (slice(0, 2), slice(2, 5))]
        assert torch.equal(torch.cat(parts), whole[op]), op


@pytest.mark.skipif("cpp-cpu" not in RUNS, reason="the C++ kernels are not built")
@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (5, 2), (7, 4), (15, 8), (7, 1)])
def test_results_do_not_depend_on_threads(kernel, stride):
    arguments = problem((17, 6, 28, 28), kernel, stride, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(all_three(RUNS["cpp-cpu"][0], *arguments, stride))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][op], other[op]) for op in OPS)


@given(
    n=st.integers(0, 3),
    c=st.integers(1, 3),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5, 7, 9, 15]),
    stride=st.integers(1, 9),
)
def test_any_shape_kernel_and_stride(n, c, h, w, kernel, stride):
    arguments = problem((n, c, h, w), kernel, stride)
    for runs, device in RUNS.values():
        moved = [None if t is None else t.to(device) for t in arguments]
        want = all_three(REFERENCE, *moved, stride)
        for op, out in all_three(runs, *moved, stride).items():
            assert relative_error(out, want[op]) < 1e-12, op


@pytest.mark.skipif("cpp-cpu" not in RUNS, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=torch.zeros(3, 1, 4, 4)), "weight"),
        (dict(weight=torch.zeros(2, 1, 3, 3)), "weight"),
        (dict(x=torch.zeros(2, 3, 8)), "x"),
        (dict(x=torch.zeros(2, 3, 8, 8, dtype=torch.int32)), "x"),
        (dict(scale=torch.zeros(3)), "scale, shift"),
        (dict(scale=torch.zeros(4), shift=torch.zeros(3)), "scale"),
        (dict(stride=0), "stride"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_what_the_kernel_cannot_take_is_named(change, message):
    arguments = dict(x=torch.zeros(2, 3, 8, 8), weight=torch.zeros(3, 1, 3, 3), scale=None, shift=None, stride=1)
    with pytest.raises(RuntimeError, match=message):
        RUNS["cpp-cpu"][0]["depthwise_conv"](*(arguments | change).values())


@pytest.mark.parametrize("impl", [name for name in RUNS if name.endswith("cpu")])
@kernels
@pytest.mark.parametrize("half", [False, True])
def test_int16_streams_count_as_float32(impl, kernel, stride, half):
    """Bit for bit what the same integers are as float32, channel halves included."""
    runs, _ = RUNS[impl]
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**15), 2**15, (3, 6, 17, 14), generator=g, dtype=torch.int16)
    x = x[:, 3:] if half else x
    weight, dy = draw((x.shape[1], 1, kernel, kernel), seed=1), draw((*x.shape[:2], -(-17 // stride), -(-14 // stride)))
    found = fresh(runs["depthwise_conv"], x, weight, None, None, stride)
    wanted = runs["depthwise_conv"](x.float(), weight, None, None, stride)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    found = fresh(runs["depthwise_conv_grad_weight"], x, dy, None, None, kernel, stride)
    wanted = runs["depthwise_conv_grad_weight"](x.float(), dy, None, None, kernel, stride)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
