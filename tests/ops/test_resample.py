"""Upsampling, space-to-depth and their adjoints, every implementation that runs here against float64."""

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
UP = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("upsample", d)}
DOWN = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("upsample_adjoint", d)}
SHUFFLES = {
    f"{name}-{d}": ({op: dict(implementations(op, d))[name] for op in reference_ops}, d)
    for reference_ops in [("space_to_depth", "depth_to_space", "space_to_depth_adjoint")]
    for d in DEVICES
    for name, _ in implementations("space_to_depth", d)
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 1, 9), (2, 2, 9, 1), (1, 3, 14, 14), (1, 2, 3, 67), (2, 1, 33, 17)]

ups = pytest.mark.parametrize("up", UP)
downs = pytest.mark.parametrize("down", DOWN)
shuffles = pytest.mark.parametrize("shuffle", SHUFFLES)
modes = pytest.mark.parametrize("mode", ["bilinear", "nearest"])
factors = pytest.mark.parametrize("factor", [1, 2, 4, 8])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


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
        "reversed_batch": x.flip(0).contiguous().flip(0),
    }


LAYOUTS = list(views(torch.zeros(1, 1, 1, 1)))
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def fresh(run, *arguments):
    """Run over memory that was left full of NaN, so that an unwritten output shows."""
    poison()
    return run(*arguments)


@ups
@modes
@factors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_is_pytorchs_interpolation(up, mode, factor, shape):
    run, device = UP[up]
    x = draw(shape, torch.float64, device)
    aligned = {} if mode == "nearest" else {"align_corners": False}
    want = F.interpolate(x, scale_factor=factor, mode=mode, **aligned)
    y = fresh(run, x, factor, mode)
    assert y.shape == want.shape and y.is_contiguous()
    assert relative_error(y, want) < 1e-15


@downs
@modes
@factors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_adjoint_is_the_transpose(down, mode, factor, shape):
    run, device = DOWN[down]
    n, c, h, w = shape
    x = draw(shape, torch.float64, device)
    dy = draw((n, c, h * factor, w * factor), torch.float64, device, seed=1)
    dx = fresh(run, dy, factor, mode)
    assert dx.shape == x.shape and dx.is_contiguous()
    torch.testing.assert_close((reference.upsample(x, factor, mode) * dy).sum(), (x * dx).sum(), rtol=1e-12, atol=1e-12)
    assert relative_error(dx, reference.upsample_adjoint(dy, factor, mode)) < 1e-14


@ups
@modes
@dtypes
def test_upsample_rounds_once(up, mode, dtype):
    run, device = UP[up]
    x = draw((2, 3, 6, 11), dtype, device)
    want = reference.upsample(x.double(), 4, mode)
    plain = F.interpolate(x, scale_factor=4, mode=mode)
    out = fresh(run, x, 4, mode)
    assert out.dtype == dtype
    assert relative_error(out, want) <= 2 * relative_error(plain, want) + ULP[dtype] / 2


@downs
@modes
@dtypes
def test_upsample_adjoint_rounds_once(down, mode, dtype):
    run, device = DOWN[down]
    dy = draw((2, 3, 24, 44), dtype, device)
    out = fresh(run, dy, 4, mode)
    assert out.dtype == dtype
    assert relative_error(out, reference.upsample_adjoint(dy.double(), 4, mode)) <= 2 * ULP[dtype]


@ups
@downs
@layouts
@modes
def test_resampling_accepts_any_strides(up, down, layout, mode):
    (run, device), (run_adjoint, adjoint_device) = UP[up], DOWN[down]
    x, dy = draw((2, 3, 10, 6), device=device), draw((2, 3, 32, 16), device=adjoint_device)
    for factor in (2, 8):
        assert torch.equal(run(views(x)[layout], factor, mode), run(x, factor, mode))
        assert torch.equal(run_adjoint(views(dy)[layout], factor, mode), run_adjoint(dy, factor, mode))


@ups
@downs
@factors
def test_resampling_of_an_empty_batch_is_empty(up, down, factor):
    (run, device), (run_adjoint, adjoint_device) = UP[up], DOWN[down]
    assert run(torch.empty(0, 3, 4, 5, device=device), factor, "bilinear").shape == (0, 3, 4 * factor, 5 * factor)
    empty = torch.empty(0, 3, 8, 16, device=adjoint_device)
    assert run_adjoint(empty, factor, "bilinear").shape == (0, 3, 8 // factor, 16 // factor)


@given(
    n=st.integers(0, 3),
    c=st.integers(1, 4),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    factor=st.sampled_from([1, 2, 4, 8]),
    mode=st.sampled_from(["bilinear", "nearest"]),
)
def test_upsample_of_any_shape(n, c, h, w, factor, mode):
    for run, device in UP.values():
        x = draw((n, c, h, w), torch.float64, device)
        assert relative_error(run(x, factor, mode), reference.upsample(x, factor, mode)) < 1e-14
    for run, device in DOWN.values():
        dy = draw((n, c, h * factor, w * factor), torch.float64, device)
        assert relative_error(run(dy, factor, mode), reference.upsample_adjoint(dy, factor, mode)) < 1e-13


shapes = pytest.mark.parametrize(
    "c, planes, block",
    [(3, 3, 4), (3, 5, 2), (3, 8, 4), (3, 20, 4), (3, 4, 1), (3, 7, 3), (1, 3, 4), (1, 1, 4), (4, 4, 4), (13, 16, 2)],
)


@shuffles
@dtypes
@shapes
def test_space_to_depth_and_back(shuffle, dtype, c, planes, block):
    runs, device = SHUFFLES[shuffle]
    x = draw((2, c, 5 * block, 9 * block), dtype, device)
    y = fresh(runs["space_to_depth"], x, planes, block)
    assert y.is_contiguous() and torch.equal(y, reference.space_to_depth(x, planes, block))
    assert torch.equal(fresh(runs["depth_to_space"], y, c, block), x)


@shuffles
@dtypes
@shapes
def test_space_to_depth_adjoint_is_the_transpose(shuffle, dtype, c, planes, block):
    runs, device = SHUFFLES[shuffle]
    x = draw((2, c, 5 * block, 9 * block), torch.float64, device)
    y = reference.space_to_depth(x, planes, block)
    dy = draw(y.shape, dtype, device, seed=1)
    dx = fresh(runs["space_to_depth_adjoint"], dy, c, block)
    assert dx.dtype == dtype and dx.shape == x.shape
    assert relative_error(dx, reference.space_to_depth_adjoint(dy.double(), c, block)) <= ULP[dtype]
    if dtype == torch.float64:
        torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-12, atol=1e-12)


@shuffles
@layouts
def test_space_to_depth_accepts_any_strides(shuffle, layout):
    runs, device = SHUFFLES[shuffle]
    x, y = draw((2, 3, 12, 16), device=device), draw((2, 5 * 16, 3, 4), device=device)
    assert torch.equal(runs["space_to_depth"](views(x)[layout], 5, 4), runs["space_to_depth"](x, 5, 4))
    for op in ("depth_to_space", "space_to_depth_adjoint"):
        assert torch.equal(runs[op](views(y)[layout], 3, 4), runs[op](y, 3, 4))


@shuffles
def test_space_to_depth_of_an_empty_batch_is_empty(shuffle):
    runs, device = SHUFFLES[shuffle]
    y = runs["space_to_depth"](torch.empty(0, 3, 8, 8, device=device), 4, 4)
    assert y.shape == (0, 64, 2, 2)
    assert runs["depth_to_space"](y, 3, 4).shape == (0, 3, 8, 8)
    assert runs["space_to_depth_adjoint"](y, 3, 4).shape == (0, 3, 8, 8)


@pytest.mark.skipif("cpp-cpu" not in UP, reason="the C++ kernels are not built")
def test_results_do_not_depend_on_threads():
    x, image = draw((3, 24, 28, 28)), draw((3, 3, 64, 64))
    up, down, shuffle = UP["cpp-cpu"][0], DOWN["cpp-cpu"][0], SHUFFLES["cpp-cpu"][0]["space_to_depth"]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([up(x, 4, "bilinear"), down(x, 2, "bilinear"), shuffle(image, 20, 4)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
