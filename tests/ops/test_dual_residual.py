"""The dual-residual step, its inverse and its adjoint: every implementation that runs here against the reference."""

import pytest
import torch

import revkernels
from revkernels import reference
from revkernels.functional import remainder_bytes
from revkernels.testing import implementations, relative_error
from tests.marks import covering

pytestmark = covering

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
STEP = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("dual_residual_", d)}
ADJOINT = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("dual_residual_adjoint_", d)}
FLOATS = {"fp32": (torch.float32,) * 2, "fp64": (torch.float64,) * 2, "fp16": (torch.float16,) * 2}
FLOATS |= {"bf16": (torch.bfloat16,) * 2, "fp32+bf16": (torch.float32, torch.bfloat16)}
INTEGERS = {"int16": torch.int16, "int32": torch.int32}
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SIZES = [0, 1, 7, 8, 9, 63, 1024, 1031, 4096, 9001]
POINTS = [(1.0, 1 / 128), (1.0, 0.5), (0.5, 0.5), (0.0, 1.0), (0.3, 0.7)]

steps = pytest.mark.parametrize("step", STEP)
integers = pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
shifts = pytest.mark.parametrize("k", [0, 1, 3, 7, 8, 11, 15])


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def integer_stream(size, dtype, device="cpu", seed=0, largest=12000):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (size,), generator=g).to(device, dtype)


def integer_sample():
    """Arguments of a step on integers that gives every optional tensor."""
    y, x = integer_stream(35, torch.int16), integer_stream(35, torch.int16, seed=1)
    remainder = torch.zeros(remainder_bytes(35, 0.125), dtype=torch.uint8)
    return y, x, randn(35), -0.25, 0.125, False, 8, remainder, torch.zeros(1, dtype=torch.int64)


@steps
@pytest.mark.parametrize("dtypes", FLOATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_step_on_floats_is_its_formula_rounded_once(step, dtypes, size, inverse):
    run, device = STEP[step]
    dtype, p_dtype = FLOATS[dtypes]
    y, x = (randn(size, dtype=dtype, device=device, seed=s) for s in (0, 1))
    p = randn(size, dtype=p_dtype, device=device, seed=2)
    want = y.double()
    reference.dual_residual_(want, x.double(), p.double(), -0.3, 0.7, inverse)
    assert run(y, x, p, -0.3, 0.7, inverse) is None
    assert relative_error(y, want) <= 2 * EPS[dtype] if size else y.numel() == 0


@steps
@pytest.mark.parametrize("alpha, beta", POINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_inverse_undoes_a_step_on_floats_up_to_rounding(step, alpha, beta, dtype):
    run, device = STEP[step]
    y, x, p = (randn(1031, dtype=dtype, device=device, seed=s) for s in range(3))
    out = y.clone()
    for inverse in (False, True):
        run(out, x, p, alpha - 1, beta, inverse)
    assert relative_error(out, y) < 8 * EPS[dtype] / beta


@steps
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("adjoint", ["none", "given"])
def test_the_adjoint_is_the_transpose_of_the_step(step, dtype, adjoint):
    run, device = ADJOINT[step]
    dtype = FLOATS[dtype][0]
    dx, dy, g = (randn(1031, dtype=dtype, device=device, seed=s) for s in range(3))
    g = g if adjoint == "given" else None
    want_x = dx.double() + -0.6 * dy.double() + (0 if g is None else g.double())
    want_y = 0.25 * dy.double()
    run(dx, dy, g, -0.6, 0.25)
    assert relative_error(dx, want_x) < 2 * EPS[dtype] and relative_error(dy, want_y) < EPS[dtype]


@steps
@integers
@shifts
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("x_given", [False, True])
def test_a_step_on_integers_is_that_of_the_reference_bit_for_bit(step, dtype, k, size, x_given):
    run, device = STEP[step]
    y = integer_stream(size, dtype, device)
    x, c = (integer_stream(size, dtype, device, seed=1), -0.75) if x_given else (None, 0.0)
    p, beta, count = randn(size, device=device, seed=2), 2.0**-k, torch.zeros(1, dtype=torch.int64, device=device)
    packed = torch.full((remainder_bytes(size, beta),), 0xA5, dtype=torch.uint8, device=device)
    want, want_packed, want_count = y.clone(), packed.clone(), count.clone()
    reference.dual_residual_(want, x, p, c, beta, False, 8, want_packed, want_count)
    run(y, x, p, c, beta, False, 8, packed, count)
    assert torch.equal(y, want) and torch.equal(packed, want_packed) and torch.equal(count, want_count)


@steps
@integers
@shifts
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 0.9921875])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e12], ids=["in range", "beyond int16", "beyond int32"])
@pytest.mark.parametrize("p_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_inverse_undoes_a_step_on_integers_bit_for_bit_whatever_is_added(step, dtype, k, alpha, scale, p_dtype):
    run, device = STEP[step]
    half = 2 ** (8 * dtype.itemsize - 1)
    y, x = (integer_stream(1031, dtype, device, s, largest=half - 1) for s in (0, 1))
    y[:2] = torch.tensor([-half, half - 1])
    p = (randn(1031, device=device, seed=2) * scale).to(p_dtype)
    p[5:8] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out, beta, count = y.clone(), 2.0**-k, torch.zeros(1, dtype=torch.int64, device=device)
    packed = torch.empty(remainder_bytes(1031, beta), dtype=torch.uint8, device=device)
    run(out, x, p, alpha - 1, beta, False, 8, packed, count)
    assert count.item() >= 3
    run(out, x, p, alpha - 1, beta, True, 8, packed, None)
    assert torch.equal(out, y)


@steps
@integers
def test_what_leaves_the_range_is_counted(step, dtype):
    run, device = STEP[step]
    half = 2 ** (8 * dtype.itemsize - 1)
    y = torch.tensor([half - 1, half - 1, -half, -half, 0, 0, 0, 0], dtype=dtype, device=device)
    p = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, float("nan"), 3e9, -3e9], device=device)
    count = torch.full((1,), 5, dtype=torch.int64, device=device)
    run(y, None, p, 0.0, 1.0, False, 0, None, count)
    assert count.item() == 5 + 5
    wrapped = [-half, half - 2, half - 1, -half + 1, 0, 0, 0, 0]
    assert y.tolist() == wrapped


@integers
@shifts
def test_remainders_take_k_bits_an_element(dtype, k):
    assert remainder_bytes(8 * 1000, 2.0**-k) == 1000 * k
    low = torch.arange(1000) % 2**k
    packed = reference.pack_bits(low, k)
    assert packed.numel() == remainder_bytes(1000, 2.0**-k)
    assert k == 0 or torch.equal(reference.unpack_bits(packed, k, 1000), low)


@steps
def test_results_do_not_depend_on_the_number_of_threads(step):
    run, device = STEP[step]
    threads, results = torch.get_num_threads(), []
    x, p = integer_stream(50000, torch.int32, device, 1), randn(50000, device=device)
    for count in (1, 2):
        torch.set_num_threads(count)
        y = integer_stream(50000, torch.int32, device)
        packed = torch.empty(remainder_bytes(50000, 0.125), dtype=torch.uint8, device=device)
        run(y, x, p, -0.1, 0.125, False, 10, packed, None)
        results.append((y, packed))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_p_may_have_any_strides():
    y, p = integer_stream(24, torch.int32).view(2, 3, 4), randn(2, 4, 3).mT
    want = y.clone()
    revkernels.dual_residual_(want, None, p.contiguous(), fraction_bits=8)
    assert torch.equal(revkernels.dual_residual_(y, None, p, fraction_bits=8), want)


F, I = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.int32)  # noqa: E741
BITS = {"fraction_bits": 8}
BAD = {
    "y: expected one of .*int16.* got torch.float32": lambda: revkernels.dual_residual_(F.clone(), None, F, **BITS),
    "y: expected one of .*float32.* got torch.int32": lambda: revkernels.dual_residual_(I.clone(), None, F),
    r"p: expected shape \(4, 6\), got \(6, 4\)": lambda: revkernels.dual_residual_(F.clone(), None, F.mT),
    "p: expected one of": lambda: revkernels.dual_residual_(I.clone(), None, I, **BITS),
    "x: expected one of .*int32.* got torch.float32": lambda: revkernels.dual_residual_(I.clone(), F, F, **BITS),
    "y: expected a contiguous tensor": lambda: revkernels.dual_residual_(F.clone().mT, None, F.mT),
    "beta: expected a number other than 0": lambda: revkernels.dual_residual_(F.clone(), None, F, beta=0.0),
    r"beta: expected 2\^-k .* got 0.3": lambda: revkernels.dual_residual_(I.clone(), None, F, beta=0.3, **BITS),
    "coefficient: expected a finite": lambda: revkernels.dual_residual_(F.clone(), F, F, coefficient=float("nan")),
    "fraction_bits: expected -8 to 24": lambda: revkernels.dual_residual_(I.clone(), None, F, fraction_bits=25),
    "remainder: expected 3 elements of torch.uint8, got 2": lambda: revkernels.dual_residual_(
        I.clone(), None, F, beta=0.5, remainder=torch.zeros(2, dtype=torch.uint8), **BITS
    ),
    "remainder: expected the 3 bytes": lambda: revkernels.dual_residual_(
        I.clone(), None, F, beta=0.5, inverse=True, **BITS
    ),
    "overflow: expected one int64": lambda: revkernels.dual_residual_(I.clone(), None, F, overflow=F, **BITS),
    "remainder, overflow: expected None": lambda: revkernels.dual_residual_(F.clone(), None, F, overflow=F),
    "dx: expected one of": lambda: revkernels.dual_residual_adjoint_(F.double(), F.clone(), None),
    r"g: expected shape \(4, 6\)": lambda: revkernels.dual_residual_adjoint_(F.clone(), F.clone(), F.mT),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


@pytest.mark.parametrize("step", [name for name in STEP if not name.startswith("reference")])
def test_kernels_refuse_memory_that_is_not_contiguous(step):
    run, device = STEP[step]
    y, p = torch.zeros(4, 6, device=device), torch.zeros(6, 4, device=device).mT
    with pytest.raises(RuntimeError, match="p: expected contiguous memory"):
        run(y, None, p, 0.0, 1.0, False)
