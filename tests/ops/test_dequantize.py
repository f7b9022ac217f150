"""Values of int16 streams: every implementation that runs here."""

import pytest
import torch

from revkernels.testing import LAYOUTS, channel_half, contiguous, implementations
from tests.marks import covering

pytestmark = covering

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
RUNS = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("dequantize_", d)}
RUN = pytest.mark.parametrize("run", RUNS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
SIZES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 1, 1), (2, 2, 17, 1), (1, 3, 1, 33), (2, 5, 56, 56), (3, 1, 8, 16)]
EMPTY = [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)]


def steps(*shape):
    """Any int16, the extremes among them."""
    y = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(sum(shape)))
    if y.numel() > 2:
        y.view(-1)[:3] = torch.tensor([-(2**15), 2**15 - 1, 0])
    return y


def one_sample(t):
    return t[:1].expand_as(t)


def one_column(t):
    return t[..., :1].expand_as(t)


READ_LAYOUTS = [*LAYOUTS, one_sample, one_column]


def exact(y, dtype, fraction_bits, run=""):
    """In float64, where nothing is rounded, then rounded once; Triton's interpreter truncates to bfloat16."""
    if run == "triton-cpu" and dtype == torch.bfloat16:
        return ((y.float() * 2.0**-fraction_bits).view(torch.int32) >> 16).to(torch.int16).view(dtype)
    return (y.double() * 2.0**-fraction_bits).to(dtype)


def check(run, x, y, fraction_bits):
    call, device = RUNS[run]
    want = exact(y, x.dtype, fraction_bits, run)
    x, y = x.to(device), y.to(device)
    before, strides = y.clone(), x.stride()
    assert call(x, y, fraction_bits) is None
    assert x.stride() == strides and torch.equal(y, before)
    assert torch.equal(x.cpu(), want)


def poisoned(y, dtype, layout=contiguous):
    return layout(torch.full(y.shape, float("nan"), dtype=dtype))


@RUN
@DTYPES
@pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
@pytest.mark.parametrize("layout", READ_LAYOUTS)
def test_values_are_rounded_once(run, dtype, size, layout):
    y = layout(steps(*size))
    check(run, poisoned(y, dtype), y, 9)


@RUN
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read_layout", READ_LAYOUTS)
def test_results_go_to_any_strides(run, dtype, layout, read_layout):
    y = read_layout(steps(2, 3, 6, 35))
    check(run, poisoned(y, dtype, layout), y, 9)


@RUN
@DTYPES
def test_what_lies_between_the_results_is_left_as_it_was(run, dtype):
    call, device = RUNS[run]
    y = steps(2, 3, 6, 35).to(device)
    memory = torch.full((2, 7, 8, 40), float("nan"), dtype=dtype, device=device)
    x = memory[:, 2:5, 1:7, 3:38]
    call(x, y, 9)
    assert torch.equal(x.cpu(), exact(y.cpu(), dtype, 9, run))
    x.fill_(float("nan"))
    assert memory.isnan().all()


@RUN
@DTYPES
@pytest.mark.parametrize("fraction_bits", range(-8, 16))
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # from the interpreter's numpy
def test_every_int16_at_every_scale(run, dtype, fraction_bits):
    """float16 overflows to infinity and rounds to subnormal numbers."""
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(2, 4, 64, 128)
    check(run, poisoned(y, dtype), y, fraction_bits)


@RUN
@pytest.mark.parametrize("n, size", [(1, 7), (3, 12), (2, 201)])
def test_long_rows_and_several_threads(run, n, size):
    y = channel_half(steps(n, 2, size, size))
    check(run, poisoned(y, torch.float32), y, 8)
    check(run, poisoned(y, torch.bfloat16), y, 8)


@pytest.mark.parametrize("run", [name for name in RUNS if name.startswith("cpp")])
def test_bad_arguments_are_named(run):
    call, _ = RUNS[run]
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, dtype=torch.int16)
    bad = {
        "x: dtype Int is not supported": (x.int(), y, 8),
        "x: dtype Short is not supported": (y, y, 8),
        "y: expected int16, got Float": (x, x, 8),
        "y: expected int16, got Int": (x, y.int(), 8),
        r"x: expected \[N, C, H, W\], got \[3, 4, 5\]": (x[0], y[0], 8),
        r"y: expected \[N, C, H, W\], got \[3, 4, 5\]": (x, y[0], 8),
        r"y: expected \[2, 3, 4, 5\], got \[2, 3, 5, 4\]": (x, y.mT, 8),
        r"y: expected \[2, 3, 4, 5\], got \[1, 3, 4, 5\]": (x, y[:1], 8),
        "x: elements overlap in memory": (x[:1].expand(2, 3, 4, 5), y, 8),
        "fraction_bits: expected -8 to 24, got -9": (x, y, -9),
        "fraction_bits: expected -8 to 24, got 25": (x, y, 25),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)
