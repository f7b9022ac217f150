"""Squeeze-excite's gate and its gradients, every implementation that runs here."""

import pytest
import torch

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
GATES = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("se_gate", d)}
GRADS = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("se_gate_grad", d)}
SIZES = [(1, 1, 1), (2, 48, 12), (19, 40, 7), (3, 130, 33)]  # N, C, R


def draw(n, c, r, dtype=torch.float32, device="cpu"):
    """pooled, w1, b1, w2, b2; the gate saturates at both ends now and then."""
    g = torch.Generator().manual_seed(n + c + r)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(device, dtype)

    return 2 * normal(n, c), normal(r, c) / c**0.5, normal(r), 3 * normal(c, r) / r**0.5, normal(c)


def wide(values):
    return [v.double() for v in values]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_equals_the_reference(gate, size, dtype):
    run, device = GATES[gate]
    args = draw(*size, dtype, device)
    poison()
    for out, want in zip(run(*args), reference.se_gate(*wide(args)), strict=True):
        assert out.shape == want.shape and out.dtype == dtype
        assert relative_error(out, want) < (2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_the_reference(grad, size, dtype):
    run, device = GRADS[grad]
    pooled, w1, b1, w2, b2 = draw(*size, dtype, device)
    gate, hidden = reference.se_gate(pooled, w1, b1, w2, b2)
    args = (torch.sin(gate * 40), gate, hidden, pooled, w1, w2)
    poison()
    for out, want in zip(run(*args), reference.se_gate_grad(*wide(args)), strict=True):
        assert out.shape == want.shape and out.dtype == dtype
        assert relative_error(out, want) < (5e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("grad", GRADS)
def test_gradients_equal_autograd(grad):
    run, device = GRADS[grad]
    leaves = [v.requires_grad_() for v in draw(5, 20, 6, torch.float64, device)]
    gate, hidden = GATES[grad][0](*(v.detach() for v in leaves))
    dgate = torch.sin(gate * 40)
    want = torch.autograd.grad((reference.se_gate(*leaves)[0] * dgate).sum(), leaves)
    pooled, w1, _, w2, _ = (v.detach() for v in leaves)
    for out, ref in zip(run(dgate, gate, hidden, pooled, w1, w2), want, strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-12)


class Gate(torch.autograd.Function):
    """The two ops as one differentiable function."""

    @staticmethod
    def forward(ctx, name, pooled, w1, b1, w2, b2):
        gate, hidden = GATES[name][0](pooled, w1, b1, w2, b2)
        ctx.name = name
        ctx.save_for_backward(gate, hidden, pooled, w1, w2)
        return gate

    @staticmethod
    def backward(ctx, dgate):
        return None, *GRADS[ctx.name][0](dgate, *ctx.saved_tensors)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 4, 2), (2, 5, 3)], ids=str)
def test_gradcheck(gate, size):
    leaves = [v.requires_grad_() for v in draw(*size, torch.float64, GATES[gate][1])]
    assert torch.autograd.gradcheck(lambda *v: Gate.apply(gate, *v), leaves)


@pytest.mark.parametrize("gate", GATES)
def test_strided_and_empty_operands(gate):
    run, device = GATES[gate]
    pooled, w1, b1, w2, b2 = draw(4, 40, 10, device=device)
    want = reference.se_gate(*wide((pooled, w1, b1, w2, b2)))
    strided = [v.t().contiguous().t() for v in (pooled, w1)] + [b1, w2.repeat_interleave(2, 1)[:, ::2], b2]
    for out, ref in zip(run(*strided), want, strict=True):
        assert relative_error(out, ref) < 2e-6
    out, hidden = run(pooled[:0], w1, b1, w2, b2)
    assert out.shape == (0, 40) and hidden.shape == (0, 10)
    grads = GRADS[gate][0](out, out, hidden, out, w1, w2)
    assert [g.shape for g in grads] == [(0, 40), (10, 40), (10,), (40, 10), (40,)]
    assert all(g.abs().sum() == 0 for g in grads)


@pytest.mark.parametrize("gate", GATES)
def test_gate_of_a_sample_does_not_depend_on_its_batch(gate):
    run, device = GATES[gate]
    if gate.startswith("reference"):
        pytest.skip("the reference's matrix product is PyTorch's, which promises nothing of the kind")
    pooled, *weights = draw(33, 40, 10, device=device)
    for n in (1, 2, 3, 7):
        for whole, part in zip(run(pooled, *weights), run(pooled[20 : 20 + n], *weights), strict=True):
            assert torch.equal(whole[20 : 20 + n], part)


def grad_arguments(n, c, r, dtype=torch.float32):
    pooled, w1, b1, w2, b2 = draw(n, c, r, dtype)
    gate, hidden = reference.se_gate(pooled, w1, b1, w2, b2)
    return torch.sin(gate * 40), gate, hidden, pooled, w1, w2


native = pytest.mark.skipif("cpp-cpu" not in GATES, reason="the C++ kernels are not built")


@native
@pytest.mark.parametrize("size", [(33, 40, 10), (6, 300, 150)], ids=str)
def test_gradient_of_a_sample_does_not_depend_on_its_batch(size):
    *samples, w1, w2 = grad_arguments(*size)
    whole = GRADS["cpp-cpu"][0](*samples, w1, w2)[0]
    for part in (slice(2, 3), slice(1, 3), slice(0, 5)):
        assert torch.equal(whole[part], GRADS["cpp-cpu"][0](*(v[part] for v in samples), w1, w2)[0])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_threads(dtype):
    size = (9, 700, 190)
    gate_arguments, arguments = draw(*size, dtype), grad_arguments(*size, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([*GATES["cpp-cpu"][0](*gate_arguments), *GRADS["cpp-cpu"][0](*arguments)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
@pytest.mark.parametrize("size", [(5, 1000, 250), (8, 129, 65), (64, 320, 80)], ids=str)
def test_sums_of_many_terms_equal_the_reference(size):
    args = draw(*size)
    for out, want in zip(GATES["cpp-cpu"][0](*args), reference.se_gate(*wide(args)), strict=True):
        assert relative_error(out, want) < 2e-6
    args = grad_arguments(*size)
    for out, want in zip(GRADS["cpp-cpu"][0](*args), reference.se_gate_grad(*wide(args)), strict=True):
        assert relative_error(out, want) < 2e-6


@native
@pytest.mark.parametrize("maps", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operands_may_differ_in_dtype(maps, weights):
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[maps]
    pooled, *vectors = draw(4, 40, 10)
    args = [pooled.to(maps), *(v.to(weights) for v in vectors)]
    results = GATES["cpp-cpu"][0](*args)
    for out, want in zip(results, reference.se_gate(*wide(args)), strict=True):
        assert out.dtype == maps and relative_error(out, want) < tolerance
    args = [torch.sin(results[0] * 40), *results, args[0], args[1], args[3]]
    for out, want in zip(GRADS["cpp-cpu"][0](*args), reference.se_gate_grad(*wide(args)), strict=True):
        assert out.dtype == maps and relative_error(out, want) < tolerance


@native
def test_what_the_kernels_cannot_take_is_named():
    pooled, w1, b1, w2, b2 = draw(2, 8, 3)
    for message, args in {
        "pooled: expected 2 dimensions": (pooled[0], w1, b1, w2, b2),
        r"w1: expected \[3, 8\], got \[3, 7\]": (pooled, w1[:, 1:], b1, w2, b2),
        r"b1: expected \[3\], got \[2\]": (pooled, w1, b1[1:], w2, b2),
        r"w2: expected \[8, 3\], got \[3, 8\]": (pooled, w1, b1, w2.t(), b2),
        r"b2: expected \[8\], got \[1, 8\]": (pooled, w1, b1, w2, b2[None]),
        "w1: dtype Long is not supported": (pooled, w1.long(), b1, w2, b2),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            GATES["cpp-cpu"][0](*args)
