"""The coupling and its adjoint, every implementation that runs here against the reference in float64."""

import importlib.util
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
COUPLE = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("couple_", d)}
ADJOINT = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("couple_adjoint", d)}
DTYPES = {"fp32": (torch.float32,) * 2, "fp64": (torch.float64,) * 2, "fp16": (torch.float16,) * 2}
DTYPES |= {"bf16": (torch.bfloat16,) * 2, "fp32+bf16": (torch.float32, torch.bfloat16)}
ALL_FACTORS = [s for size in range(1, 5) for s in combinations((1, 2, 4, 8), size)]
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

couples = pytest.mark.parametrize("couple", COUPLE)
adjoints = pytest.mark.parametrize("adjoint", ADJOINT)
modes = pytest.mark.parametrize("mode", ["bilinear", "nearest"])


def draw(n, c, h, w, factors, dtypes=(torch.float32,) * 2, affine=("channel",), device="cpu", seed=0):
    """y, p, scale, shift; the vectors' kinds are taken from ``affine`` in turn."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"channel": (c,), "sample": (n, c)}
    kinds = [affine[k % len(affine)] for k in range(len(factors))]
    y = torch.randn(n, c, h, w, generator=g).to(device, dtypes[0])
    p = [torch.randn(n, c, h // f, w // f, generator=g).to(device, dtypes[1]) for f in factors]
    vector = [[None if k is None else torch.randn(shapes[k], generator=g).to(device) for k in kinds] for _ in range(2)]
    return y, p, *vector


def wide(values):
    return [None if v is None else v.double() for v in values]


def expected(y, p, scale, shift, factors, mode, subtract=False):
    out = y.double().clone()
    reference.couple_(out, wide(p), wide(scale), wide(shift), list(factors), mode, subtract)
    return out


def plain(y, p, scale, shift, factors, mode):
    """The same maths as one would write it in PyTorch, in the tensors' own dtypes."""
    for p_k, a_k, b_k, f_k in zip(p, scale, shift, factors, strict=True):
        a = 1 if a_k is None else a_k[..., None, None].to(p_k.dtype)
        b = 0 if b_k is None else b_k[..., None, None].to(p_k.dtype)
        aligned = {} if mode == "nearest" else {"align_corners": False}
        y = y + F.interpolate(p_k * a + b, scale_factor=f_k, mode=mode, **aligned).to(y.dtype)
    return y


def test_triton_takes_part_where_it_is_installed():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert any(name.startswith("triton") for name in COUPLE)
    assert any(name.startswith("triton") for name in ADJOINT)


@couples
@modes
@pytest.mark.parametrize("factors", [*ALL_FACTORS, (1,) * 6, (2, 2, 1, 8, 4, 4)], ids=str)
def test_couple_adds_any_factors_in_one_call(couple, mode, factors):
    run, device = COUPLE[couple]
    y, p, scale, shift = draw(1, 2, 8, 24, factors, affine=("channel", "sample", None), device=device)
    want = expected(y, p, scale, shift, factors, mode)
    out = y.clone()
    assert run(out, p, scale, shift, list(factors), mode, False) is None
    assert relative_error(out, want) < 5e-7


@couples
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape, factors", [((2, 3, 7, 7), (1,)), ((1, 2, 8, 40), (2, 4, 8))], ids=str)
def test_couple_is_at_most_twice_as_far_from_the_truth_as_plain_pytorch(couple, dtypes, shape, factors):
    run, device = COUPLE[couple]
    y, p, scale, shift = draw(*shape, factors, DTYPES[dtypes], ("channel", "sample"), device)
    want = expected(y, p, scale, shift, factors, "bilinear")
    allowed = 2 * relative_error(plain(y, p, scale, shift, factors, "bilinear"), want) + ULP[y.dtype] / 2
    run(y, p, scale, shift, list(factors), "bilinear", False)
    assert relative_error(y, want) <= allowed


@couples
@pytest.mark.parametrize(
    "shape, factors",
    [((1, 1, 1, 1), (1,)), ((1, 1, 1, 9), (1, 1)), ((2, 5, 3, 1), (1,)), ((1, 1, 2, 2), (2,)), ((1, 2, 8, 8), (8, 4)),
     ((1, 1, 6, 70), (2,)), ((1, 1, 136, 12), (4,)), ((1, 3, 12, 20), (4, 1)), ((0, 3, 8, 8), (2, 1)),
     ((2, 0, 4, 4), (1,))],
    ids=str,
)  # fmt: skip
def test_couple_handles_odd_and_empty_sizes(couple, shape, factors):
    run, device = COUPLE[couple]
    y, p, scale, shift = draw(*shape, factors, device=device)
    want = expected(y, p, scale, shift, factors, "bilinear")
    run(y, p, scale, shift, list(factors), "bilinear", False)
    assert relative_error(y, want) < 5e-7


def half(shape, **kw):
    n, c, h, w = shape
    return torch.full((n, 2 * c, h, w), 7.0, **kw)[:, c:]


def spaced(shape, **kw):
    n, c, h, w = shape
    return torch.full((n, c, h + 2, 2 * w), 7.0, **kw)[:, :, 1:-1, ::2]


def channels_last(shape, **kw):
    return torch.empty(shape, **kw).to(memory_format=torch.channels_last)


def transposed(shape, **kw):
    n, c, h, w = shape
    return torch.empty((n, c, w, h), **kw).transpose(2, 3)


@couples
@pytest.mark.parametrize("layout", [half, spaced, channels_last, transposed])
@pytest.mark.parametrize("factors", [(1,), (1, 2, 4)], ids=str)
def test_couple_takes_any_strides_and_writes_nothing_else(couple, layout, factors):
    run, device = COUPLE[couple]
    y, p, scale, shift = draw(2, 2, 4, 12, factors, device=device)
    want = expected(y, p, scale, shift, factors, "bilinear")
    out = layout(y.shape, device=device).copy_(y)
    p = [layout(p_k.shape, device=device).copy_(p_k) for p_k in p]
    around = out._base.clone() if out._base is not None else None
    run(out, p, scale, shift, list(factors), "bilinear", False)
    assert relative_error(out, want) < 5e-7
    if around is not None:
        inside = torch.as_strided(around, out.shape, out.stride(), out.storage_offset())
        inside.copy_(out)
        assert torch.equal(out._base, around)


@couples
@modes
@pytest.mark.parametrize("factors", [(1,), (2, 4, 8)], ids=str)
def test_subtracting_undoes_adding_exactly_where_arithmetic_is_exact(couple, mode, factors):
    run, device = COUPLE[couple]
    g = torch.Generator().manual_seed(3)
    y = torch.randint(-999, 1000, (1, 2, 16, 24), generator=g).float().to(device)
    p = [torch.randint(-99, 100, (1, 2, 16 // f, 24 // f), generator=g).float().to(device) for f in factors]
    scale = [torch.tensor([2.0, -3.0], device=device)] * len(p)
    out = y.clone()
    for subtract in (False, True):
        run(out, p, scale, scale, list(factors), mode, subtract)
        assert torch.equal(out, y) == subtract


@couples
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_both_signs_take_the_same_sum_bit_by_bit(couple, dtypes):
    run, device = COUPLE[couple]
    factors = (1, 2, 4)
    y, p, scale, shift = draw(1, 2, 8, 16, factors, DTYPES[dtypes], ("sample",), device)
    added, subtracted = torch.zeros_like(y), torch.zeros_like(y)
    run(added, p, scale, shift, list(factors), "bilinear", False)
    run(subtracted, p, scale, shift, list(factors), "bilinear", True)
    assert torch.equal(added, -subtracted)


@couples
def test_subtracting_undoes_adding_within_rounding(couple):
    run, device = COUPLE[couple]
    y, p, scale, shift = draw(2, 2, 8, 16, (2, 4), device=device)
    out = y.clone()
    run(out, p, scale, shift, [2, 4], "bilinear", False)
    largest = out.abs().max().item()
    run(out, p, scale, shift, [2, 4], "bilinear", True)
    assert (out - y).abs().max().item() <= ULP[torch.float32] * largest


ADJOINT_CASES = [
    *(((1, 2, 8, 24), factors) for factors in ALL_FACTORS),
    ((2, 3, 7, 7), (1, 1, 1)),
    ((1, 1, 1, 1), (1,)),
    ((1, 2, 2, 2), (2,)),
    ((1, 1, 8, 8), (8,)),
    ((2, 1, 12, 20), (4, 2)),
    ((1, 1, 144, 40), (2, 8)),
    ((1, 1, 130, 130), (1,)),
    ((1, 1, 8, 1040), (8, 2)),
    ((1, 1, 2400, 2), (2,)),
    ((0, 2, 8, 8), (2, 1)),
]


@adjoints
@modes
@pytest.mark.parametrize("shape, factors", ADJOINT_CASES, ids=str)
def test_adjoint_and_its_sums_equal_the_reference(adjoint, mode, shape, factors):
    run, device = ADJOINT[adjoint]
    dy, p, center, _ = draw(*shape, factors, affine=("channel", None), device=device)
    want_du, want_sums = reference.couple_adjoint(dy.double(), wide(p), wide(center), list(factors), mode)
    poison()
    du, sums = run(dy, p, center, list(factors), mode)
    for f, out, want in zip(factors, du, want_du, strict=True):
        assert out.shape == want.shape and out.dtype == dy.dtype
        assert f == 1 or relative_error(out, want) < 5e-7
    for out, want in zip(sums, want_sums, strict=True):
        assert out.shape == want.shape and out.dtype == torch.float32
        assert relative_error(out, want) < 5e-6


@adjoints
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_adjoint_in_other_dtypes(adjoint, dtype):
    run, device = ADJOINT[adjoint]
    factors = (1, 2, 4, 8)
    dy, p, center, _ = draw(1, 2, 16, 24, factors, (dtype, dtype), device=device)
    want_du, want_sums = reference.couple_adjoint(dy.double(), wide(p), wide(center), list(factors), "bilinear")
    du, sums = run(dy, p, center, list(factors), "bilinear")
    for out, want in zip(du[1:], want_du[1:], strict=True):
        assert out.dtype == dtype and relative_error(out, want) < ULP[dtype]
    for out, want in zip(sums, want_sums, strict=True):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.dtype == acc and relative_error(out, want) < (1e-14 if dtype == torch.float64 else 5e-6)


@adjoints
@modes
def test_adjoint_is_the_transpose_of_coupling(adjoint, mode):
    run, device = ADJOINT[adjoint]
    couple, _ = COUPLE[adjoint]
    factors = [2, 4, 8]
    y, p, _, _ = draw(1, 2, 16, 24, factors, DTYPES["fp64"], (None,), device)
    du, _ = run(y, [None] * 3, [None] * 3, factors, mode)
    for p_k, du_k, f_k in zip(p, du, factors, strict=True):
        up = torch.zeros_like(y)
        couple(up, [p_k], [None], [None], [f_k], mode, False)
        torch.testing.assert_close((up * y).sum(), (p_k * du_k).sum(), rtol=1e-12, atol=1e-12)


@adjoints
@pytest.mark.parametrize("layout", [half, spaced, channels_last, transposed])
def test_adjoint_takes_any_strides(adjoint, layout):
    run, device = ADJOINT[adjoint]
    factors = [1, 2, 4]
    dy, p, center, _ = draw(2, 2, 8, 12, factors, device=device)
    want_du, want_sums = reference.couple_adjoint(dy.double(), wide(p), wide(center), factors, "bilinear")
    dy = layout(dy.shape, device=device).copy_(dy)
    p = [layout(p_k.shape, device=device).copy_(p_k) for p_k in p]
    du, sums = run(dy, p, center, factors, "bilinear")
    for out, want in [*zip(du[1:], want_du[1:], strict=True), *zip(sums, want_sums, strict=True)]:
        assert relative_error(out, want) < 5e-6


@adjoints
def test_adjoint_of_a_sample_does_not_depend_on_its_batch(adjoint):
    run, device = ADJOINT[adjoint]
    dy, p, center, _ = draw(3, 2, 16, 24, (1, 2, 8), device=device)
    du, sums = run(dy, p, center, [1, 2, 8], "bilinear")
    du_1, sums_1 = run(dy[1:2], [p_k[1:2] for p_k in p], center, [1, 2, 8], "bilinear")
    for whole, part in zip(du[1:], du_1[1:], strict=True):
        assert torch.equal(whole[1:2], part)
    for whole, part in zip(sums, sums_1, strict=True):
        assert torch.equal(whole[:, 1:2], part)
