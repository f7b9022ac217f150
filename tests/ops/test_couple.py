"""The coupling and its adjoint, every implementation that runs here against the reference in float64."""

import importlib.util
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error
from tests.marks import covering, mostly_slow, slow

pytestmark = covering

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


# --- fixed-point streams ------------------------------------------------------------------------

BITS = 8
STREAMS = {"int16": torch.int16, "fp32 grid": torch.float32, "fp64 grid": torch.float64}
RANGE = {torch.int16: 2.0**15, torch.float32: 2.0**24, torch.float64: 2.0**53}  # in grid steps
MAPS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

streams = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


def draw_stream(shape, stream, device="cpu", seed=0, largest=30000):
    """y on the grid of multiples of ``2^-BITS``, as ``stream`` holds it."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(-largest, largest + 1, shape, generator=g)
    return steps.to(device, stream) if stream == torch.int16 else (steps.to(stream) * 2.0**-BITS).to(device)


def draw_exact(shape, factors, dtype, device="cpu", seed=0):
    """p, scale, shift, such that every t is exact in float32 and many lie half-way between two grid points."""
    g = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    p = [torch.randint(-60, 61, (n, c, h // f, w // f), generator=g).to(device, dtype) / 8 for f in factors]
    scale, shift = ([torch.randint(-3, 4, (c,), generator=g).to(device).float() for _ in factors] for _ in range(2))
    return p, scale, [b / 512 for b in shift]


def counter(device):
    return torch.zeros(1, dtype=torch.int64, device=device)


def both(run, y, p, scale, shift, factors, mode, subtract=False, bits=BITS):
    """``(result, overflow)`` of an implementation and of the reference."""
    results = []
    for couple in (run, reference.couple_):
        out, overflow = y.clone(), counter(y.device)
        assert couple(out, p, scale, shift, list(factors), mode, subtract, bits, overflow) is None
        results.append((out, overflow))
    return results


@couples
@modes
@streams
@pytest.mark.parametrize("dtype", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize(
    "shape, factors",
    [((2, 3, 8, 24), (1, 2, 4, 8)), ((2, 3, 7, 7), (1,)), ((1, 2, 6, 70), (1, 2)), ((1, 1, 1, 1), (1,)),
     ((1, 2, 2, 2), (2,)), ((2, 5, 3, 1), (1, 1)), ((0, 3, 8, 8), (2, 1)), ((1, 1, 8, 8), (8,) * 5)],
    ids=str,
)  # fmt: skip
def test_fixed_point_stream_equals_the_reference_and_inverts_exactly(couple, mode, stream, dtype, shape, factors):
    run, device = COUPLE[couple]
    y = draw_stream(shape, stream, device, largest=20000)
    terms = (*draw_exact(shape, factors, dtype, device), factors, mode)
    for subtract in (False, True):
        (out, overflow), (want, count) = both(run, y, *terms, subtract)
        assert torch.equal(out, want) and torch.equal(overflow, count)
        assert y.numel() < 8 or not torch.equal(out, y)
        run(out, *terms[:3], list(factors), mode, not subtract, BITS)
        assert torch.equal(out, y)


@couples
@streams
@pytest.mark.parametrize("bits", [-8, 24, *slow([0, 11])])
def test_fixed_point_stream_is_within_one_step_of_the_reference_for_any_contribution(couple, stream, bits):
    run, device = COUPLE[couple]
    factors = (1, 2, 4)
    _, p, scale, shift = draw(2, 3, 8, 24, factors, affine=("sample", None, "channel"), device=device)
    p, shift = ([None if v is None else v * 2.0 ** (8 - bits) for v in values] for values in (p, shift))
    y = torch.arange(2.0 * 3 * 8 * 24, device=device).view(2, 3, 8, 24)
    y = y.to(stream) if stream == torch.int16 else y.to(stream) * 2.0**-bits
    step = 1 if stream == torch.int16 else 2.0**-bits
    (out, _), (want, _) = both(run, y, p, scale, shift, factors, "bilinear", bits=bits)
    assert (out.double() - want.double()).abs().max() <= step
    run(out, p, scale, shift, list(factors), "bilinear", True, bits)
    assert torch.equal(out, y)


@couples
@streams
def test_fixed_point_rounding_takes_half_to_even(couple, stream):
    run, device = COUPLE[couple]
    p = torch.tensor([-2.5, -1.5, -0.5, 0.49999997, 0.5, 1.5, 2.5, 2.0**22 + 0.5, 2.0**23 + 1], device=device)
    out = torch.zeros(1, 1, 1, p.numel(), dtype=stream, device=device)
    run(out, [p.view_as(out)], [None], [None], [1], "bilinear", False, 0)
    want = torch.tensor([-2, -2, 0, 0, 0, 2, 2, 2**22, 2**23 + 1], device=device)
    assert torch.equal(out.flatten(), want.to(stream))


@couples
@streams
@pytest.mark.parametrize("layout", [half, spaced, channels_last, transposed])
@pytest.mark.parametrize("factors", [(1,), (1, 2, 4)], ids=str)
def test_fixed_point_stream_takes_any_strides_and_writes_nothing_else(couple, stream, layout, factors):
    run, device = COUPLE[couple]
    y = draw_stream((2, 2, 4, 12), stream, device)
    terms = (*draw_exact(y.shape, factors, torch.float32, device), factors, "bilinear")
    _, (want, count) = both(run, y, *terms)
    out, overflow = layout(y.shape, dtype=stream, device=device).copy_(y), counter(device)
    around = out._base.clone() if out._base is not None else None
    run(out, *terms[:3], list(factors), "bilinear", False, BITS, overflow)
    assert torch.equal(out, want) and torch.equal(overflow, count)
    if around is not None:
        torch.as_strided(around, out.shape, out.stride(), out.storage_offset()).copy_(out)
        assert torch.equal(out._base, around)


@couples
@streams
@pytest.mark.parametrize("shape, factors", [((2, 3, 5, 7), (1,)), ((2, 3, 8, 40), (1, 2))], ids=str)
def test_results_beyond_the_range_are_counted_and_int16_wraps_around_and_inverts(couple, stream, shape, factors):
    run, device = COUPLE[couple]
    y = draw_stream(shape, stream, device, largest=32767)
    p, scale, shift = draw_exact(shape, factors, torch.float32, device)
    p = [p_k * RANGE[stream] * 2.0 ** -(BITS + 3) for p_k in p]
    shift = [b * 0 for b in shift]
    for subtract in (False, True):
        (out, overflow), (want, count) = both(run, y, p, scale, shift, factors, "nearest", subtract)
        assert torch.equal(out, want)
        assert torch.equal(overflow, count) and 0 < count < y.numel()
        if stream == torch.int16:
            run(out, p, scale, shift, list(factors), "nearest", not subtract, BITS)
            assert torch.equal(out, y)


EXTREMES = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**31 - 128, 2.0**33, 1e-40]


@couples
@streams
@pytest.mark.parametrize("subtract", [False, True])
def test_extreme_contributions_are_counted_and_int16_inverts(couple, stream, subtract):
    run, device = COUPLE[couple]
    p = torch.tensor(EXTREMES * 4, device=device).view(1, 2, 1, -1)
    y = draw_stream(p.shape, stream, device)
    (out, overflow), (want, count) = both(run, y, [p], [None], [None], (1,), "bilinear", subtract, bits=0)
    assert torch.equal(out.nan_to_num(7), want.nan_to_num(7))
    assert torch.equal(overflow, count)
    assert count == 4 * (5 if stream == torch.float64 else 9)
    if stream == torch.int16:
        run(out, [p], [None], [None], [1], "bilinear", not subtract, 0)
        assert torch.equal(out, y)


@couples
def test_overflow_is_added_to_what_was_counted_before(couple):
    run, device = COUPLE[couple]
    y = torch.full((2, 2, 64, 96), 32767, dtype=torch.int16, device=device)
    p, overflow = torch.ones(y.shape, device=device), torch.full((1,), 5, device=device)
    run(y, [p], [None], [None], [1], "bilinear", False, 0, overflow)
    assert overflow.item() == 5 + y.numel() and (y == -32768).all()


@couples
@streams
def test_without_contributions_a_fixed_point_stream_stays_and_nothing_is_counted(couple, stream):
    run, device = COUPLE[couple]
    y, overflow = torch.full((1, 2, 3, 4), 2.0**14, device=device).to(stream) * 2, counter(device)
    out = y.clone()
    run(out, [], [], [], [], "bilinear", False, 24, overflow)
    assert torch.equal(out, y) and overflow.item() == 0


@couples
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # from the interpreter's numpy
@given(data=st.data())
def test_any_sequence_of_couplings_of_an_int16_stream_inverts_bit_for_bit(couple, data):
    run, device = COUPLE[couple]
    seed = data.draw(st.integers(0, 2**31))
    y = draw_stream((1, 2, 8, 8), torch.int16, device, seed, largest=32768)
    y = y.clamp(max=32767)
    calls = []
    for i in range(data.draw(st.integers(1, 4))):
        factors = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
        dtypes = (torch.float32, data.draw(st.sampled_from(list(MAPS.values()))))
        _, p, scale, shift = draw(1, 2, 8, 8, factors, dtypes, ("sample", None), device, seed + i)
        for p_k in p:
            p_k *= data.draw(st.sampled_from([1e-3, 1.0, 1e4, 1e30]))
            p_k[..., 0, 0] = data.draw(st.floats(width=32))
        mode = data.draw(st.sampled_from(["bilinear", "nearest"]))
        sign, bits = data.draw(st.booleans()), data.draw(st.integers(-8, 24))
        calls.append((p, scale, shift, factors, mode, sign, bits))
    out = y.clone()
    for call in calls:
        run(out, *call)
    for *terms, sign, bits in reversed(calls):
        run(out, *terms, not sign, bits)
    assert torch.equal(out, y)


@couples
@given(data=st.data())
def test_any_sequence_of_couplings_on_a_grid_inverts_exactly_within_the_range(couple, data):
    run, device = COUPLE[couple]
    stream = data.draw(st.sampled_from([torch.float32, torch.float64]))
    seed, bits = data.draw(st.integers(0, 2**31)), data.draw(st.integers(-8, 14))
    steps = torch.randint(-1000, 1001, (1, 2, 8, 8), generator=torch.Generator().manual_seed(seed))
    y = (steps.to(stream) * 2.0**-bits).to(device)
    calls = []
    for i in range(data.draw(st.integers(1, 4))):
        factors = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
        terms = draw(1, 2, 8, 8, factors, affine=("sample", None), device=device, seed=seed + i)[1:]
        calls.append((*terms, factors, "bilinear", data.draw(st.booleans())))
    out, overflow = y.clone(), counter(device)
    for call in calls:
        run(out, *call, bits, overflow)
    assert overflow.item() == 0
    for *terms, sign in reversed(calls):
        run(out, *terms, not sign, bits)
    assert torch.equal(out, y)


def test_native_fixed_point_streams_refuse_what_they_cannot_hold():
    if "cpp-cpu" not in COUPLE:
        pytest.skip("no native code")
    run, y = COUPLE["cpp-cpu"][0], torch.zeros(1, 2, 4, 4)

    def couple(y, *arguments):
        run(y, [y.float()], [None], [None], [1], "bilinear", False, *arguments)

    for message, arguments in {
        "fraction_bits: expected an int": (y.short(),),
        "fraction_bits: expected -8 to 24, got 25": (y, 25),
        "fraction_bits: expected -8 to 24, got -9": (y, -9),
        "y: expected int16, float32 or float64": (y.half(), 8),
        "y: dtype Int is not supported": (y.int(), 8),
        "overflow: expected None": (y, None, counter("cpu")),
        "overflow: expected one int64": (y, 8, counter("cpu").int()),
        "overflow: expected one int64 .* of shape": (y, 8, counter("cpu").repeat(2)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            couple(*arguments)
    with pytest.raises(RuntimeError, match=r"p\[0\]: dtype Short is not supported"):
        run(y, [y.short()], [None], [None], [1], "bilinear", False, 8)
    with pytest.raises(RuntimeError, match="dy: dtype Short is not supported"):
        ADJOINT["cpp-cpu"][0](y.short(), [None], [None], [2], "bilinear")


# --- adjoint ------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("mode", mostly_slow(["bilinear", "nearest"]))
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
