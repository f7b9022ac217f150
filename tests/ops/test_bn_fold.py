"""BatchNorm folded to an affine map, and its gradient: every implementation that runs here."""

import pytest
import torch
from torch import nn

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FOLDS = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("bn_fold", d)}
GRADS = {f"{name}-{d}": (f, d) for d in DEVICES for name, f in implementations("bn_fold_grad", d)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
CHANNELS = pytest.mark.parametrize("c", [1, 48, 131])


def draw(*shape, dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)


def close(found, wanted, dtype):
    return relative_error(found, wanted) < (2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("fold", FOLDS)
@CHANNELS
@DTYPES
@pytest.mark.parametrize("track", [False, True])
def test_fold_equals_the_reference(fold, c, dtype, track):
    run, device = FOLDS[fold]
    mean, weight, bias, running = (draw(c, dtype=dtype, device=device, seed=s) for s in range(4))
    var = draw(c, dtype=dtype, device=device, seed=4).square()

    def arguments(wide):
        vectors = [v.double() if wide else v for v in (mean, var, weight, bias)]
        buffers = [running.clone(), running.abs(), torch.tensor(7, device=device)] if track else [None] * 3
        return [*vectors, *(b.double() if wide and b is not None and b.dim() else b for b in buffers), 0.1, 37, 1e-3]

    got, want = arguments(False), arguments(True)
    poison()
    results = run(*got)
    assert all(r.dtype == dtype and r.shape == (c,) for r in results)
    for found, wanted in zip(results, reference.bn_fold(*want), strict=True):
        assert close(found, wanted, dtype)
    if track:
        assert close(got[4], want[4], dtype) and close(got[5], want[5], dtype)
        assert got[6].item() == 8 and got[6].dtype == torch.int64


@pytest.mark.parametrize("fold", FOLDS)
def test_fold_equals_batch_norm(fold):
    run, device = FOLDS[fold]
    norm = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3).double().to(device)
    with torch.no_grad():
        norm.weight.copy_(draw(5)), norm.bias.copy_(draw(5, seed=1)), norm.running_mean.copy_(draw(5, seed=2))
    buffers = [b.clone() for b in norm.buffers()]
    x = draw(3, 5, 4, 2, device=device)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    _, scale, shift = run(mean, var, norm.weight.detach(), norm.bias.detach(), *buffers, 0.3, 24, 1e-3)
    assert close(x * scale[:, None, None] + shift[:, None, None], norm(x).detach(), torch.float64)
    for found, wanted in zip(buffers, norm.buffers(), strict=True):
        assert close(found.double(), wanted.double(), torch.float64)


@pytest.mark.parametrize("grad", GRADS)
@CHANNELS
@DTYPES
@pytest.mark.parametrize("n", [1, 19])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("form", ["two", "two gated", "five", "five gated", "five pooled"])
def test_gradient_equals_the_reference(grad, c, dtype, n, batch, form):
    run, device = GRADS[grad]
    options = {"dtype": dtype, "device": device}
    sums = draw(2 if form.startswith("two") else 5, n, c, **options)
    gate = draw(n, c, **options) if form.endswith(("gated", "pooled")) else None
    if form == "two gated":
        gate = draw(n, 1, **options).expand(n, c)  # stochastic depth
    dpool = draw(n, c, **options, seed=1) if form == "five pooled" else None
    mean, rstd, scale = (draw(c, **options, seed=s) for s in range(3))
    args = (sums, gate, dpool, mean, rstd, scale)
    poison()
    found = run(*args, n * 6, batch)
    wanted = reference.bn_fold_grad(*(None if a is None else a.double() for a in args), n * 6, batch)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and a.shape == (c,)
        assert (a - b).abs().max() < (3e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("grad", GRADS)
def test_gradient_equals_autograd(grad):
    """dx = scale g + slope x + offset, and those of weight and bias."""
    run, device = GRADS[grad]
    x = draw(3, 5, 4, 2, device=device).requires_grad_()
    weight, bias = (draw(5, device=device, seed=s).requires_grad_() for s in (1, 2))
    g = draw(3, 5, 4, 2, device=device, seed=3)
    nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-3).backward(g)
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    rstd = torch.rsqrt(var + 1e-3)
    scale = weight.detach() * rstd
    sums = torch.stack([g.sum((2, 3)), (g * (x.detach() - mean[:, None, None])).sum((2, 3))])
    dweight, dbias, slope, offset = run(sums, None, None, mean, rstd, scale, 24, True)
    dx = scale[:, None, None] * g + slope[:, None, None] * x.detach() + offset[:, None, None]
    for found, leaf in zip((dx, dweight, dbias), (x, weight, bias), strict=True):
        assert relative_error(found, leaf.grad) < 1e-12


@pytest.mark.parametrize("grad", [name for name in GRADS if name.startswith("cpp")])
def test_shapes_are_checked(grad):
    run, _ = GRADS[grad]
    v = draw(3)
    with pytest.raises(RuntimeError, match=r"sums: expected \[2, N, C\] or \[5, N, C\], got \[3, 2, 3\]"):
        run(draw(3, 2, 3), None, None, v, v, v, 6, True)
    with pytest.raises(RuntimeError, match="mean: expected a CPU tensor"):
        run(draw(2, 2, 3), None, None, draw(4), v, v, 6, True)
