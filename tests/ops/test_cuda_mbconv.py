"""An MBConv's passes as CUDA has them (kernels, their order, memory), emulated on the CPU, against the reference.

Products, which are cuBLAS's on a GPU, are sums in float64 here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from revkernels import reference_mbconv as reference
from revkernels import workspace
from revkernels.reference import accumulate_dtype, pointwise_conv_grad_weight
from revkernels.testing import relative_error
from tests.ops import test_mbconv
from tests.ops.test_cuda_emulation import library, one_thread, pytestmark  # noqa: F401  fixtures
from tests.ops.test_mbconv import CASES, Case, backward, close, forward, recompute, seed  # noqa: F401

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16)


PARTIAL_BYTES = 16 << 20  # csrc/cuda/products.h


class GpuCase(Case):
    """A case with the workspace that CUDA takes: x is converted to the planes' dtype first."""

    @property
    def shape(self) -> workspace.MBConvShape:
        return super().shape._replace(scaled=False, converted=self.dtype != self.plane_dtype)


GPU_CASES = {name: GpuCase(**vars(case)) for name, case in CASES.items()}
cases = pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())


class Map(ctypes.Structure):
    """``revkernels::Map``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    ]


def _map(t: Tensor | None) -> Any:
    if t is None:
        return None
    return ctypes.byref(Map(t.data_ptr(), DTYPES.index(t.dtype), tuple(t.shape), tuple(t.stride())))


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _integers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class Emulated:
    """The three ops, with their schemas' arguments."""

    def __init__(self, library: ctypes.CDLL, reverse: bool = False) -> None:  # noqa: F811
        self.library, self.reverse = library, reverse

    def run(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, f"emulate_{name}")
        function.restype = ctypes.c_char_p
        converted = [ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments]
        error = function(ctypes.c_int64(self.reverse), *converted)
        if error is not None:
            raise RuntimeError(error.decode())

    def described(self, x: Tensor, bits: int | None, weights: Sequence[Tensor | None], stride: int, chunk: int,
                  batch: Sequence[bool], norms: Tensor, planes: torch.dtype) -> tuple:  # fmt: skip
        e, _, kernel, _ = weights[1].shape
        hidden = 0 if weights[2] is None else weights[2].shape[0]
        unit = ctypes.c_double(1.0 if bits is None else 2.0**-bits)
        sizes = _integers(e, kernel, stride, hidden, weights[6].shape[0], chunk)
        dtypes = DTYPES.index(planes), DTYPES.index(accumulate_dtype(planes))
        return _map(x), unit, *dtypes, sizes, _pointers(weights), _integers(*map(int, batch)), _pointer(norms)

    def mbconv(self, x: Tensor, bits: int | None, *rest: Any) -> Tensor:
        named, running = rest[:13], rest[13:22]
        batch, momentum, eps, stride, chunk, given, p, d, memory = rest[22:]
        weights = [named[i] for i in (0, 3, 6, 7, 8, 9, 10)]
        parameters = [named[i] for i in (1, 2, 4, 5, 11, 12)]
        columns = sum(reference.norm_columns(weights[0], weights[1], weights[6]))
        if given is None:
            norms = torch.full((4, columns), float("nan"), dtype=accumulate_dtype(p.dtype))
        else:
            norms = given.clone()
        doubles = ((ctypes.c_double * 3)(*momentum), (ctypes.c_double * 3)(*eps))
        self.run(
            "mbconv",
            *self.described(x, bits, weights, stride, chunk, batch, norms, p.dtype),
            *(_pointers(parameters), _pointers(running), *doubles, int(given is not None)),
            *(_map(p), _map(d), _pointer(memory), memory.numel()),
        )
        return norms

    def mbconv_recompute(self, x: Tensor, bits: int | None, *rest: Any) -> Tensor:
        weights, (norms, stride, chunk, p, d, e, memory) = rest[:7], rest[7:]
        hidden = 0 if weights[2] is None else weights[2].shape[0]
        size = x.shape[0] * (2 * weights[1].shape[0] + hidden) if hidden else 0
        squeezed = torch.full((size,), float("nan"), dtype=norms.dtype)
        self.run(
            "mbconv_recompute",
            *self.described(x, bits, weights, stride, chunk, (False,) * 3, norms, p.dtype),
            *(_map(p), _map(d), _map(e), _pointer(squeezed), _pointer(memory), memory.numel()),
        )
        return squeezed

    def mbconv_backward(self, du: Tensor, sums: Tensor | None, x: Tensor, bits: int | None, *rest: Any) -> tuple:
        weights, (norms, batch, keep, stride, chunk, p, d, e, squeezed, dz, dx, add, memory) = rest[:7], rest[7:]
        expand, depthwise, w1, b1, w2, b2, project = weights
        bn0, bn1, bn2 = (None if w is None else w[:, 0, 0, 0] for w in (expand, depthwise, project))
        like = (expand, bn0, bn0, depthwise, bn1, bn1, w1, b1, w2, b2, project, bn2, bn2)
        gradients = [norms.new_full((0,) if w is None else w.shape, float("nan")) for w in like]
        planes = (dz if p is None else p).dtype
        self.run(
            "mbconv_backward",
            *self.described(x, bits, weights, stride, chunk, batch, norms, planes),
            *(_map(du), _pointer(sums), _pointer(keep), _map(p), _map(d), _map(e), _pointer(squeezed)),
            *(_map(dz), _map(dx), int(add), _pointers(gradients), _pointer(memory), memory.numel()),
        )
        return tuple(gradients)


@pytest.fixture(params=[False, True], ids=["in order", "reversed"])
def ops(request, library):  # noqa: F811
    return Emulated(library, request.param)


@cases
def test_forward_is_the_reference(case: Case, ops: Emulated) -> None:
    x, weights, running = case.input(), case.weights(), case.running()
    found, wanted = (forward(case, op, x, weights, running) for op in (ops.mbconv, reference.mbconv))
    close(found.d, wanted.d, case)
    close(found.p, wanted.p, case)
    close(found.norms, wanted.norms, case)
    for name, v in wanted.running.items():
        if v is not None:
            close(found.running[name].double(), v.double(), case)


@cases
@pytest.mark.parametrize("keep", [True, False], ids=["keeping", "lean"])
def test_recompute_gives_the_bits_of_the_forward(case: Case, library, keep: bool) -> None:  # noqa: F811
    ops = Emulated(library)
    x, weights = case.input(), case.weights()
    first = forward(case, ops.mbconv, x, weights, case.running())
    p, d, _, squeezed = recompute(case, ops.mbconv_recompute, x, weights, first.norms, keep=keep)
    assert torch.equal(p, first.p)
    assert not keep or torch.equal(d, first.d)
    wanted = recompute(case, reference.mbconv_recompute, x, weights, first.norms, keep=keep)
    close(squeezed, wanted[-1], case)


@cases
@pytest.mark.parametrize("held", ["everything", "lean", "no sums", "no sums, lean", "stored", "nothing"])
def test_gradients_are_those_of_the_reference(case: Case, held: str, library, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(test_mbconv, "OPS", Emulated(library, reverse="lean" in held))
    test_mbconv.test_gradients_are_those_of_the_reference(case, held)


def test_gradients_of_a_projection_too_large_for_products_per_sample(library, monkeypatch) -> None:  # noqa: F811
    """The gated map comes channel by channel out of the pass that sums its gradient."""
    case = GpuCase(n=2, c=1500, size=(1, 3), kernel=3, channels=1500, hidden=4)
    assert case.n * case.e * case.channels * 4 > PARTIAL_BYTES
    monkeypatch.setattr(test_mbconv, "OPS", Emulated(library))
    test_mbconv.test_gradients_are_those_of_the_reference(case, "everything")


def test_gradients_may_be_written_over_what_was_read(library, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(test_mbconv, "OPS", Emulated(library))
    monkeypatch.setattr(test_mbconv, "Case", GpuCase)
    test_mbconv.test_gradients_may_be_written_over_what_was_read()


def test_input_and_gradient_may_be_halves_of_streams(library, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(test_mbconv, "OPS", Emulated(library))
    test_mbconv.test_input_and_gradient_may_be_halves_of_streams()


def test_the_workspace_is_as_large_as_its_rule_says(library) -> None:  # noqa: F811
    case = GPU_CASES["int16 with bfloat16 planes"]
    x, weights, running = case.input(), case.weights(), case.running()

    def one_byte_less(*arguments: Any) -> Tensor:
        return Emulated(library).mbconv(*arguments[:-1], arguments[-1][:-64])

    with pytest.raises(RuntimeError, match="workspace: expected at least"):
        forward(case, one_byte_less, x, weights, running)


# --- the 1x1 convolution's weight gradient -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["plain", "gated"])
@pytest.mark.parametrize("size", [(3, 5, 4, 7, 7), (2, 700, 3100, 1, 2), (5, 1024, 1030, 1, 3)], ids=str)
def test_weight_gradient_matches_the_reference(library, size, form, dtype) -> None:  # noqa: F811
    """Products per sample, and the contraction over samples and pixels, with products larger than their bound."""
    n, c, o, h, w = size
    if n * c * o > 1 << 20 and (dtype != torch.float32 or form == "gated"):
        pytest.skip("as the small ones")
    acc = accumulate_dtype(dtype)
    x, dy = torch.randn(n, c, h, w).to(dtype), torch.randn(n, o, h, w).to(dtype)
    vectors = (
        (None,) * 3
        if form == "plain"
        else (torch.rand(c, dtype=acc), torch.randn(c, dtype=acc), torch.rand(n, c).to(acc))
    )
    wanted = pointwise_conv_grad_weight(*(None if v is None else v.double() for v in (x, dy, *vectors)))
    for add in (False, True):
        dw = torch.full((o, c), 0.5 if add else float("nan"), dtype=acc)
        peak = torch.zeros((), dtype=torch.int64)
        pointers = (*map(_pointer, vectors), _pointer(dw), int(add), _pointer(peak))
        Emulated(library).run("pointwise_grad_weight", _map(x), _map(dy), *pointers)
        products = max(PARTIAL_BYTES, dw.nbytes) if n > 1 else 0
        assert 0 < peak.item() <= products + 2 * (x.nbytes + dy.nbytes) + 8 * (c + o) * dtype.itemsize
        error = relative_error(dw - (0.5 if add else 0.0), wanted[:, :, 0, 0])
        assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}[dtype]
