"""Every registered op: PyTorch's own checks, the public functions' gradients and errors, compilation."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

import revkernels
from revkernels import dispatch, functional
from revkernels.registry import OPS
from revkernels.testing import implementations, relative_error
from tests.marks import covering
from tests.ops import test_mbconv

KERNELS = [op for op in OPS if not op.startswith("mbconv")]  # whole branches are tested in test_mbconv.py


def samples(dtype=torch.float32):
    """Arguments of every op, with a strided half-channel view where a map comes in."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def half(n, c, h, w):
        return rand(n, 2 * c, h, w)[:, c:]

    n, c, h, w, r = 2, 6, 8, 16, 3
    x, dz, vector, rows = half(n, c, h, w), half(n, c, h, w), rand(c), rand(n, c)
    factors = [1, 2, 4, 8]
    pyramid = [rand(n, c, h // f, w // f) for f in factors]
    weight, dy = rand(c, 1, 5, 5), half(n, c, h // 2, w // 2)
    gate, hidden = rows.sigmoid(), rand(n, r)
    steps = torch.randint(-(2**15), 2**15, (n, 2 * c, h, w), generator=generator, dtype=torch.int16)[:, c:]
    return {
        "upsample": (x, 4, "bilinear"),
        "upsample_adjoint": (x, 4, "bilinear"),
        "space_to_depth": (rand(n, 3, h, w), 5, 4),
        "depth_to_space": (rand(n, 80, 3, 5), 3, 4),
        "space_to_depth_adjoint": (rand(n, 80, 3, 5), 3, 4),
        "couple_": (x, pyramid, [vector, None, rows, None], [rows, vector, None, None], factors, "bilinear", False),
        "couple_adjoint": (x, [pyramid[0], None, *pyramid[2:]], [vector, None, None, vector], factors, "bilinear"),
        "dequantize_": (x, steps, 8),
        "dual_residual_": (rand(n, 35), rand(n, 35), rand(n, 35), -0.25, 0.75, False),
        "dual_residual_adjoint_": (rand(n, 35), rand(n, 35), rand(n, 35), -0.25, 0.75),
        "depthwise_conv": (x, weight, vector, rand(c), 2),
        "depthwise_conv_grad_input": (dy, weight, h, w, 2),
        "depthwise_conv_grad_weight": (x, dy, vector, rand(c), 5, 2),
        "pointwise_conv_": (half(n, 5, h, w), x, rand(5, c, 1, 1), vector, rand(c), rows),
        "pointwise_conv_grad_weight": (x, half(n, 5, h, w), vector, rand(c), rows),
        "bn_stats": (x,),
        "bn_act": (x, vector, rand(c), rows, "hardswish"),
        "bn_act_squeeze": (x, vector, rand(c), "hardswish"),
        "bn_act_grad_sums": (dz, x, vector, rand(c), rand(c), "hardswish"),
        "bn_act_grad": (dz, x, vector, rand(c), rows, rand(n, c), rand(c), rand(c), "hardswish"),
        "bn_fold": (rand(c), rand(c).abs(), vector, rand(c), rand(c), rand(c).abs(), torch.tensor(3), 0.1, 24, 1e-3),
        "bn_fold_grad": (rand(5, n, c), rows, rand(n, c), rand(c), rand(c), vector, 24, True),
        "se_gate": (rows, rand(r, c), rand(r), rand(c, r), rand(c)),
        "se_gate_grad": (rand(n, c), gate, hidden, rows, rand(r, c), rand(c, r)),
    }


def fixed_point_samples():
    """Arguments of ``couple_`` on fixed-point streams, without and with a count of overflows."""
    y, *terms = samples()["couple_"]
    steps = (y * 256).round()
    return {
        "int16": (steps.short(), *terms, 8),
        "int16, counted": (steps.short(), *terms, 8, torch.zeros(1, dtype=torch.int64)),
        "grid": (steps / 256, *terms, 8),
        "grid, counted": (steps / 256, *terms, 8, torch.zeros(1, dtype=torch.int64)),
    }


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def run(op, arguments, call):
    """The results, or the updated arguments of an in-place op."""
    if not op.endswith("_"):
        return flat(call(*arguments))
    written = [argument.alias_info is not None for argument in OPS[op].overload._schema.arguments]
    arguments = [
        v.clone() if is_written and isinstance(v, torch.Tensor) else v
        for v, is_written in zip(arguments, written, strict=False)
    ]
    call(*arguments)
    return [v for v, is_written in zip(arguments, written, strict=False) if is_written and isinstance(v, torch.Tensor)]


def test_every_op_has_a_sample():
    assert samples().keys() | test_mbconv.samples().keys() == OPS.keys()


@pytest.mark.slow
@covering
@pytest.mark.parametrize("op", samples())
def test_opcheck(op):
    torch.library.opcheck(OPS[op].overload, samples()[op])


@pytest.mark.slow
@covering
@pytest.mark.parametrize("name", fixed_point_samples())
def test_opcheck_of_fixed_point_streams(name):
    torch.library.opcheck(OPS["couple_"].overload, fixed_point_samples()[name])


@covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", samples())
def test_every_implementation_agrees_with_the_reference(op, dtype):
    arguments = samples(dtype)[op]
    expected = run(op, samples(torch.float64)[op], OPS[op].reference)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, call in implementations(op):
        for out, ref in zip(run(op, arguments, call), expected, strict=True):
            assert out.shape == ref.shape, name
            assert relative_error(out, ref) < tolerance, name


@pytest.mark.parametrize("op", samples())
def test_fake_has_the_shapes_and_dtypes_of_the_result(op):
    arguments = samples(torch.bfloat16)[op]
    real = run(op, arguments, OPS[op].reference)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = run(op, samples(torch.bfloat16)[op], OPS[op].overload)
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]


def test_native_code_is_what_the_dispatcher_takes_on_the_cpu():
    if not dispatch.STATUS["cpp"].loaded:
        pytest.skip(dispatch.STATUS["cpp"].reason)
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"revkernels::{op}", "CPU"), op
        assert dispatch.in_use(op, "cpu") == "cpp", op


DOUBLE = {"dtype": torch.float64, "requires_grad": True}
GRADCHECKS = {
    "couple": lambda: (
        lambda y, p, q: revkernels.couple(y, [p, q], [1, 4]),
        (torch.randn(2, 3, 4, 8, **DOUBLE), torch.randn(2, 3, 4, 8, **DOUBLE), torch.randn(2, 3, 1, 2, **DOUBLE)),
    ),
    "dual_residual": lambda: (
        lambda y, x, p: revkernels.dual_residual(y, x, p, coefficient=-0.75, beta=0.5),
        (torch.randn(3, 5, **DOUBLE), torch.randn(3, 5, **DOUBLE), torch.randn(3, 5, **DOUBLE)),
    ),
    "upsample": lambda: (lambda x: revkernels.upsample(x, 2), (torch.randn(2, 3, 3, 5, **DOUBLE),)),
    "upsample nearest": lambda: (
        lambda x: revkernels.upsample(x, 4, mode="nearest"),
        (torch.randn(1, 2, 3, 2, **DOUBLE),),
    ),
    "space_to_depth": lambda: (lambda x: revkernels.space_to_depth(x, 5, 2), (torch.randn(2, 3, 4, 6, **DOUBLE),)),
    "depthwise_conv": lambda: (
        lambda x, w: revkernels.depthwise_conv(x, w, stride=2),
        (torch.randn(2, 3, 7, 6, **DOUBLE), torch.randn(3, 1, 3, 3, **DOUBLE)),
    ),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    function, inputs = GRADCHECKS[name]()
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", GRADCHECKS)
def test_double_backward_is_an_error(name):
    function, inputs = GRADCHECKS[name]()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)


@pytest.mark.slow
@covering
@pytest.mark.parametrize("op", samples())
def test_compiles_without_a_graph_break(op):
    torch._dynamo.reset()
    arguments = samples()[op]

    def call(*arguments):
        if op.endswith("_"):  # any of its tensors may be written
            given = tree_map_only(torch.Tensor, lambda t: t + 0, arguments)
            OPS[op].overload(*given)
            return [t * 2 for t in flat(given[0])]
        return [t + 1 for t in flat(OPS[op].overload(*arguments))]

    expected = call(*arguments)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
    for out, ref in zip(flat(compiled), flat(expected), strict=True):
        torch.testing.assert_close(out, ref)


@pytest.mark.parametrize("stream", [torch.int16, torch.float32], ids=str)
def test_fixed_point_coupling_compiles_without_a_graph_break(stream):
    torch._dynamo.reset()
    p, overflow = torch.full((2, 4, 8, 8), 100.0), torch.zeros(1, dtype=torch.int64)

    def call(y, p, overflow):
        y, overflow = y + 0, overflow + 0
        return revkernels.couple_(y, [p], [1], fraction_bits=12, overflow=overflow), overflow

    y = torch.ones(2, 4, 8, 8, dtype=stream)
    out, count = torch.compile(call, fullgraph=True, backend="aot_eager")(y, p, overflow)
    want, wanted_count = call(y, p, overflow)
    assert torch.equal(out, want) and torch.equal(count, wanted_count)
    assert count.item() == (y.numel() if stream == torch.int16 else 0)


Y = torch.zeros(2, 4, 8, 8)
COUNT = torch.zeros(1, dtype=torch.int64)


def couple_fixed(y=Y, fraction_bits=8, overflow=None):
    return revkernels.couple_(y, [Y], [1], fraction_bits=fraction_bits, overflow=overflow)


def couple_affine(scale=None, shift=None, y=Y):
    return revkernels.couple_(y, [y, y], [1, 1], scale=scale, shift=shift)


NAN, INF = float("nan"), float("inf")
BAD = {
    "y: expected 4 dim": lambda: revkernels.couple_(Y[0], [Y[0]], [1]),
    "y: expected one of": lambda: revkernels.couple_(Y.long(), [Y.long()], [1]),
    "y: expected memory without overlap": lambda: revkernels.couple_(
        torch.zeros(1, 4, 8, 8).expand(2, 4, 8, 8), [Y], [1]
    ),
    r"factors\[0\]: expected an upsampling factor": lambda: revkernels.couple_(Y, [Y], [3]),
    "factors: expected one per contribution": lambda: revkernels.couple_(Y, [Y], [1, 2]),
    r"p\[0\]: expected shape": lambda: revkernels.couple_(Y, [Y], [2]),
    r"p\[1\]: expected a Tensor": lambda: revkernels.couple_(Y, [Y, None], [1, 1]),
    r"scale\[0\]: expected shape": lambda: revkernels.couple_(Y, [Y], [1], scale=[torch.ones(3)]),
    "shift: expected one entry": lambda: revkernels.couple_(Y, [Y], [1], shift=[]),
    r"scale\[1\]: expected finite values, got nan": lambda: couple_affine(scale=[None, torch.tensor([1.0, NAN, 1, 1])]),
    r"scale\[0\]: expected finite values, got inf": lambda: couple_affine(scale=[torch.full((2, 4), INF), None]),
    r"shift\[0\]: expected finite values, got -inf": lambda: couple_affine(shift=[torch.full((4,), -INF).half(), None]),
    "mode: expected one of": lambda: revkernels.couple_(Y, [Y], [1], mode="cubic"),
    r"p\[0\]: expected a tensor on cpu": lambda: revkernels.couple_(Y, [Y.to("meta")], [1]),
    "fraction_bits: expected an int, as y is int16": lambda: couple_fixed(Y.short(), None),
    "fraction_bits: expected an int or None, got float": lambda: couple_fixed(fraction_bits=8.0),
    "fraction_bits: expected an int or None, got bool": lambda: couple_fixed(fraction_bits=True),
    "fraction_bits: expected -8 to 24, got 25": lambda: couple_fixed(fraction_bits=25),
    "fraction_bits: expected -8 to 24, got -9": lambda: couple_fixed(fraction_bits=-9),
    "y: expected one of .* as fraction_bits is given, got torch.float16": lambda: couple_fixed(Y.half()),
    "y: expected one of .* as fraction_bits is given, got torch.bfloat16": lambda: couple_fixed(Y.bfloat16()),
    r"p\[0\]: expected one of .* got torch.int16": lambda: revkernels.couple_(Y, [Y.short()], [1]),
    "dy: expected one of .* got torch.int16": lambda: revkernels.couple_adjoint(Y.short(), [2]),
    "overflow: expected None without fraction_bits": lambda: couple_fixed(Y, None, COUNT),
    "overflow: expected a Tensor or None, got int": lambda: couple_fixed(overflow=0),
    "overflow: expected torch.int64, got torch.int32": lambda: couple_fixed(overflow=COUNT.int()),
    r"overflow: expected one element, got shape \(2,\)": lambda: couple_fixed(overflow=COUNT.repeat(2)),
    "overflow: expected a tensor on cpu": lambda: couple_fixed(overflow=COUNT.to("meta")),
    r"factors\[0\]: expected a divisor": lambda: revkernels.couple_adjoint(Y[..., :7], [2]),
    "planes: expected at least": lambda: revkernels.space_to_depth(Y, 3, 2),
    "block: expected a divisor": lambda: revkernels.space_to_depth(Y, 4, 3),
    "channels: expected 1 to 1": lambda: revkernels.depth_to_space(Y, 2, 2),
    "weight: expected shape": lambda: revkernels.depthwise_conv(Y, torch.zeros(4, 1, 2, 2)),
    "stride: expected at least 1": lambda: revkernels.depthwise_conv(Y, torch.zeros(4, 1, 3, 3), stride=0),
    "factor: expected an upsampling factor": lambda: revkernels.upsample(Y, 5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_vectors_of_a_coupling_are_looked_at_only_where_they_have_values():
    y, bad = Y.clone(), torch.full((4,), NAN)
    torch._dynamo.reset()
    out = torch.compile(lambda y, bad: couple_affine([bad, None], y=y + 0), fullgraph=True, backend="aot_eager")(y, bad)
    assert out.isnan().all()
    assert couple_affine([bad.to("meta"), None], y=y.to("meta")).shape == y.shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert couple_affine([bad, None], y=mode.from_tensor(y)).shape == y.shape
        assert couple_affine([mode.from_tensor(bad), None], y=mode.from_tensor(y)).shape == y.shape


def test_an_implementation_asked_for_by_name_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match="couple_ cannot run as 'cuda' on cpu: "):
        dispatch.implementation("couple_", "cuda", torch.device("cpu"))
    with pytest.raises(ValueError, match="implementation: 'fortran' is unknown"):
        dispatch.can_run("couple_", "fortran", torch.device("cpu"))
    with pytest.raises(ValueError, match="op: 'decouple' is not registered"):
        dispatch.can_run("decouple", "cpp", torch.device("cpu"))


def test_public_functions_are_exported():
    assert all(hasattr(functional, name) for name in functional.__all__)
    assert all(hasattr(revkernels, name) for name in revkernels.__all__)
