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
    assert torch.equal(run(pooled, *weights)[0][20:21], run(pooled[20:21], *weights)[0])
