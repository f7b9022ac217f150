"""BatchNorm, activation and their gradients, every implementation that runs here against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F

from revkernels import reference
from revkernels.testing import implementations, poison, relative_error
from tests.marks import slow

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OPS = ("bn_stats", "bn_act", "bn_act_squeeze", "bn_act_grad_sums", "bn_act_grad")
RUNS = {f"{op}-{name}-{d}": (op, f, d) for op in OPS for d in DEVICES for name, f in implementations(op, d)}
SETS = sorted({(name, d) for op in OPS for d in DEVICES for name, _ in implementations(op, d)})
ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

runs = pytest.mark.parametrize("run", RUNS)
acts = pytest.mark.parametrize("act", ["hardswish", "identity"])
sets = pytest.mark.parametrize("name, device", SETS)


def ops(name, device):
    """All ops of one implementation; the reference where it has none."""
    return {op: dict(implementations(op, device)).get(name, getattr(reference, op)) for op in OPS}


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    """Maps and vectors by the names that the ops give them.

    x reaches beyond both kinks of hardswish but not onto them, where its slope jumps and rounding would decide.
    """
    g = torch.Generator().manual_seed(seed)
    n, c = shape[:2]

    def normal(*size):
        return torch.randn(*size, generator=g).to(device)

    maps = {"x": (3 * normal(*shape) + 0.5).to(dtype), "dz": normal(*shape).to(dtype)}
    vectors = {"scale": normal(c), "shift": normal(c), "mean": normal(c), "slope": normal(c), "offset": normal(c)}
    u = maps["x"].double() * vectors["scale"][:, None, None] + vectors["shift"][:, None, None]
    maps["x"][(u.abs() - 3).abs() < 1e-4] = 0
    return maps | vectors | {"gate": normal(n, c).sigmoid(), "dpool": normal(n, c)}


def arguments(op, v, act):
    names = {
        "bn_stats": ("x",),
        "bn_act": ("x", "scale", "shift", "gate"),
        "bn_act_squeeze": ("x", "scale", "shift"),
        "bn_act_grad_sums": ("dz", "x", "scale", "shift", "mean"),
        "bn_act_grad": ("dz", "x", "scale", "shift", "gate", "dpool", "slope", "offset"),
    }[op]
    return [v[name] for name in names] + ([] if op == "bn_stats" else [act])


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def tensors(out):
    return out if isinstance(out, tuple) else (out,)


@runs
@acts
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 7, 7),
        (3, 5, 4, 12),
        (1, 2, 1, 1),
        (2, 1, 1, 33),
        (1, 1, 20, 50),
        (5, 17, 3, 2),
        (3, 37, 2, 2),
        (2, 19, 1, 3),
        *slow([(1, 2, 130, 130), (1, 1, 400, 400)]),
    ],
    ids=str,
)
def test_equals_the_reference_at_any_size(run, act, shape):
    op, f, device = RUNS[run]
    args = arguments(op, draw(shape, device=device), act)
    want = tensors(getattr(reference, op)(*wide(args)))
    poison()
    for out, ref in zip(tensors(f(*args)), want, strict=True):
        assert out.shape == ref.shape and out.dtype == torch.float32 and out.is_contiguous()
        assert relative_error(out, ref) < 2e-6


@runs
@pytest.mark.parametrize("dtype", ULP)
def test_is_at_most_twice_as_far_from_the_truth_as_plain_pytorch(run, dtype):
    """Plain PyTorch: the reference's formulas carried out in the maps' own dtype, as autocast-free code would."""
    op, f, device = RUNS[run]
    values = draw((2, 3, 6, 20), dtype, device)
    args = arguments(op, values, "hardswish")
    want = tensors(getattr(reference, op)(*wide(args)))
    for i, (out, ref) in enumerate(zip(tensors(f(*args)), want, strict=True)):
        sums = op not in ("bn_act", "bn_act_grad")
        assert out.dtype == (reference.accumulate_dtype(dtype) if sums else dtype)
        error = relative_error(out, ref)
        if sums:
            assert error < (1e-14 if dtype == torch.float64 else 1e-6), i
        else:
            assert error <= 2 * relative_error(plain(op, values), ref) + ULP[dtype] / 2, i


def plain(op, v):
    v = {k: t.to(v["x"].dtype) for k, t in v.items()}
    v |= {k: t[..., None, None] for k, t in v.items() if t.dim() < 4}
    u = v["x"] * v["scale"] + v["shift"]
    if op == "bn_act":
        return F.hardswish(u) * v["gate"]
    slope = torch.where(u <= -3, 0.0, torch.where(u >= 3, 1.0, (2 * u + 3) / 6)).to(u.dtype)
    return v["scale"] * (v["gate"] * v["dz"] + v["dpool"]) * slope + v["slope"] * v["x"] + v["offset"]


@runs
@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_empty_maps_give_what_the_reference_gives(run, shape):
    op, f, device = RUNS[run]
    if op == "bn_stats" and shape[0] == 0:
        pytest.skip("no values, no statistics")
    args = arguments(op, draw(shape, device=device), "hardswish")
    for out, ref in zip(tensors(f(*args)), tensors(getattr(reference, op)(*args)), strict=True):
        torch.testing.assert_close(out, ref, equal_nan=True)


LAYOUTS = {
    "half": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "spaced": lambda x: F.pad(x.repeat_interleave(2, 3), (0, 0, 1, 1))[:, :, 1:-1, ::2],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand_as(x),
}


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 12), (2, 19, 1, 2)], ids=str)
def test_takes_any_strides(run, layout, shape):
    op, f, device = RUNS[run]
    values = draw(shape, device=device)
    values["x"] = LAYOUTS[layout](values["x"])
    values["scale"] = values["scale"].repeat_interleave(2)[::2]
    args = arguments(op, values, "hardswish")
    for out, ref in zip(tensors(f(*args)), tensors(getattr(reference, op)(*wide(args))), strict=True):
        assert out.is_contiguous() and relative_error(out, ref) < 2e-6


@sets
def test_optional_vectors_may_be_missing(name, device):
    run, v = ops(name, device), draw((2, 3, 4, 8), device=device)
    out = run["bn_act"](v["x"], v["scale"], v["shift"], None, "hardswish")
    assert relative_error(out, reference.bn_act(v["x"], v["scale"], v["shift"], None, "hardswish")) < 1e-6
    optional = ("gate", "dpool", "slope", "offset")
    for kept in (None, *optional):
        rest = [v[k] if k == kept else None for k in optional]
        args = [v["dz"], v["x"], v["scale"], v["shift"], *rest, "hardswish"]
        assert relative_error(run["bn_act_grad"](*args), reference.bn_act_grad(*wide(args))) < 1e-6


@sets
def test_variance_survives_a_mean_that_dwarfs_it(name, device):
    x = draw((8, 2, 5, 9), device=device)["x"] + 30000.0
    mean, var = ops(name, device)["bn_stats"](x)
    assert relative_error(var, x.double().var((0, 2, 3), correction=0)) < 1e-3
    assert relative_error(mean, x.double().mean((0, 2, 3))) < 1e-6


@sets
def test_statistics_merge_parts_of_unequal_size(name, device):
    """Many samples and a plane that no block divides: parts differ in pixels and in samples."""
    x = draw((37, 2, 1, 300), device=device)["x"]
    x[20:] += 5.0
    mean, var = ops(name, device)["bn_stats"](x)
    assert relative_error(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert relative_error(var, x.double().var((0, 2, 3), correction=0)) < 1e-6


@sets
@acts
def test_gradient_through_activation_gate_and_squeeze_equals_autograd(name, device, act):
    run, v = ops(name, device), draw((2, 3, 4, 6), torch.float64, device)
    x = v["x"].requires_grad_()
    scale, shift, gate = (v[k].double() for k in ("scale", "shift", "gate"))
    h = x * scale[:, None, None] + shift[:, None, None]
    h = F.hardswish(h) if act == "hardswish" else h
    loss = (gate[..., None, None] * h * v["dz"]).sum() + (v["dpool"].double() * h.sum((2, 3))).sum()
    (want,) = torch.autograd.grad(loss, x)
    args = [v["dz"], x.detach(), scale, shift, gate, v["dpool"].double(), None, None, act]
    torch.testing.assert_close(run["bn_act_grad"](*args), want, rtol=1e-12, atol=1e-12)


@sets
def test_ops_compose_to_the_gradient_of_batch_norm(name, device):
    """Statistics, the five sums and ``slope``, ``offset`` give dx, dgamma, dbeta of batch_norm -> hardswish."""
    run, v = ops(name, device), draw((4, 3, 5, 6), torch.float64, device)
    x, dz, gamma, beta = v["x"], v["dz"], v["scale"].double(), v["shift"].double()
    leaves = [t.clone().requires_grad_() for t in (x, gamma, beta)]
    z = F.hardswish(F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=1e-3))
    want = torch.autograd.grad((z * dz).sum(), leaves)

    mean, var = run["bn_stats"](x)
    rstd = (var + 1e-3).rsqrt()
    scale, shift = gamma * rstd, beta - mean * gamma * rstd
    torch.testing.assert_close(run["bn_act"](x, scale, shift, None, "hardswish"), z.detach())
    sums = run["bn_act_grad_sums"](dz, x, scale, shift, mean, "hardswish").sum(1)
    count = x.numel() / x.shape[1]
    slope = -scale * rstd.square() * sums[2] / count
    dx = run["bn_act_grad"](
        dz, x, scale, shift, None, None, slope, -scale * sums[1] / count - slope * mean, "hardswish"
    )
    for out, ref in zip((dx, sums[2] * rstd, sums[1]), want, strict=True):
        torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-10)


@sets
@pytest.mark.parametrize("op", ["bn_act", "bn_act_squeeze", "bn_act_grad_sums", "bn_act_grad"])
@pytest.mark.parametrize("shape", [(3, 2, 9, 40), (3, 19, 2, 2)], ids=str)
def test_result_of_a_sample_does_not_depend_on_its_batch(name, device, op, shape):
    run, v = ops(name, device)[op], draw(shape, device=device)
    whole = run(*arguments(op, v, "hardswish"))
    one = {k: t[1:2] if k in ("x", "dz", "gate", "dpool") else t for k, t in v.items()}
    part = run(*arguments(op, one, "hardswish"))
    assert torch.equal(whole[:, 1:2] if op == "bn_act_grad_sums" else whole[1:2], part)


class Norm(torch.autograd.Function):
    """BatchNorm, activation, gate and squeeze as one differentiable function made of the ops.

    ``x_hat = (x - mean) rstd; h = act(gamma x_hat + beta); z = gate h; pooled = mean_hw h``; ``moments`` is
    ``(mean, var)``, or None for the batch's own.
    """

    @staticmethod
    def forward(ctx, run, act, moments, x, gamma, beta, gate):
        mean, var = run["bn_stats"](x) if moments is None else moments
        rstd = (var + 1e-3).rsqrt()
        scale = gamma * rstd
        shift = beta - mean * scale
        ctx.run, ctx.act, ctx.of_batch = run, act, moments is None
        ctx.save_for_backward(x, scale, shift, gate, mean, rstd)
        return run["bn_act"](x, scale, shift, gate, act), run["bn_act_squeeze"](x, scale, shift, act)

    @staticmethod
    def backward(ctx, dz, dpooled):
        x, scale, shift, gate, mean, rstd = ctx.saved_tensors
        dpool = dpooled / (x.shape[2] * x.shape[3])
        sums = ctx.run["bn_act_grad_sums"](dz, x, scale, shift, mean, ctx.act)
        dbeta, centered = ((gate * sums[k] + dpool * sums[k + 2]).sum(0) for k in (1, 2))
        slope = offset = None
        if ctx.of_batch:
            count = x.numel() / x.shape[1]
            slope = -scale * rstd.square() * centered / count
            offset = -scale * dbeta / count - slope * mean
        dx = ctx.run["bn_act_grad"](dz, x, scale, shift, gate, dpool, slope, offset, ctx.act)
        return None, None, None, dx, centered * rstd, dbeta, sums[0]


@sets
@pytest.mark.parametrize(
    "act, statistics",
    [
        ("hardswish", "batch"),
        pytest.param("hardswish", "running", marks=pytest.mark.slow),
        pytest.param("identity", "batch", marks=pytest.mark.slow),
        ("identity", "running"),
    ],
)
def test_gradcheck_of_norm_activation_gate_and_squeeze(name, device, act, statistics):
    v = {k: t.double().requires_grad_() for k, t in draw((2, 2, 1, 5), torch.float64, device).items()}
    moments = None if statistics == "batch" else (v["mean"].detach(), v["slope"].detach().square())
    leaves = (v["x"], v["scale"], v["shift"], v["gate"])
    assert torch.autograd.gradcheck(lambda *leaves: Norm.apply(ops(name, device), act, moments, *leaves), leaves)
