"""Exact streams: bit for bit invertible at any depth, with gradients that equal the stored run's bit for bit."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revbifpn import (
    RevBlock,
    ReversibleSequence,
    StreamFormat,
    StreamOverflowWarning,
    check_invertible,
    fast,
    monitor_drift,
    range_report,
)
from revbifpn.configs import CONFIGS
from revbifpn.fused import mbconv as fused_mbconv
from revbifpn.memory import MIB, measure_sample
from tests.marks import covering, product
from tests.networks import BOTH, F32, MOSTLY_FAST, NARROW, REVERSIBLE, identical
from tests.networks import image as draw

pytestmark = covering

FORMATS = pytest.mark.parametrize("stream", ["fixed32", "fixed16"])
MATRIX = product(
    "plain-s0-fixed32-float32",
    "fast-s0-fixed32-float32",
    "fast-s0-fixed16-bfloat16",
    module=BOTH,
    scale={name: name for name in ("s0", "s3", "s6")},
    stream={name: name for name in ("fixed32", "fixed16")},
    reduced={"float32": False, "bfloat16": True},
)


def narrow(module, scale="s0", **options):
    """A published scale's depth, ratios and kernels, on few channels."""
    torch.manual_seed(0)
    few = ("channels", "head_channels", "fc_features", "classes", "head_dropout")
    arguments = CONFIGS[f"revbifpn_{scale}"].arguments() | {name: NARROW[name] for name in few}
    return module.RevBiFPN(**(arguments | options))


def image(batch=4):
    return draw(F32, batch)


def autocast(reduced=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=reduced)


def step(model, x, reduced, optimizer=None):
    model.zero_grad()
    torch.manual_seed(2)
    with autocast(reduced):
        loss = F.cross_entropy(model(x).float(), torch.arange(len(x)) % 10)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return [p.grad for p in model.parameters()]


# --- inversion ------------------------------------------------------------------------------------


@MATRIX
def test_image_comes_back_bit_for_bit_after_ten_steps(module, scale, stream, reduced):
    model = narrow(module, scale, stream=stream, stochastic_depth=0.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(10):
        step(model, image(2), reduced, optimizer)
    on_grid = torch.round(image(2) * 512) / 512
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), autocast(reduced):
            streams = model.forward_streams(on_grid)
            assert torch.equal(model.inverse(streams), on_grid)


@FORMATS
def test_any_image_enters_on_the_grid(stream):
    model = narrow(fast, stream=stream).eval()
    with torch.no_grad():
        inverted = model.inverse(model.forward_streams(image()))
    grid = 2.0 ** model.rev_stack.stream.bits(0)
    assert torch.equal(inverted, torch.round(image() * grid) / grid)


@MOSTLY_FAST
@FORMATS
def test_random_layers_are_replayed_exactly(module, stream):
    model = narrow(module, stream=stream, stochastic_depth=0.4).train()
    with autocast():
        assert check_invertible(model.rev_stack, model.stem(image()), rtol=0.0) == [0.0]


@MOSTLY_FAST
def test_values_are_close_to_those_of_float_streams(module):
    outputs = {s: narrow(module, stream=s).eval()(image()).detach() for s in ("float32", "fixed32", "fixed16")}
    scale = outputs["float32"].abs().max()
    assert 0 < (outputs["fixed32"] - outputs["float32"]).abs().max() < 2e-3 * scale
    assert 0 < (outputs["fixed16"] - outputs["float32"]).abs().max() < 2e-2 * scale


# --- gradients ------------------------------------------------------------------------------------


@MATRIX
def test_reversible_gradients_equal_stored_ones_bit_for_bit(module, scale, stream, reduced):
    options = {"stream": stream, "stochastic_depth": 0.2}
    models = [narrow(module, scale, reversible=reversible, **options) for reversible in (True, False)]
    gradients = [step(model, image(), reduced) for model in models]
    assert identical(*gradients)
    assert identical(models[0].buffers(), models[1].buffers())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients[0])


@MOSTLY_FAST
def test_float_streams_are_not_exact_in_bfloat16(module):
    """The reason for it all."""
    found, wanted = (
        step(narrow(module, stream="float32", reversible=reversible), image(), True) for reversible in (True, False)
    )
    assert not identical(found, wanted)


@MOSTLY_FAST
@pytest.mark.parametrize("off", [{"disable_rev": True}, {"disable_recomp": True}])
def test_either_part_may_be_stored(module, off):
    wanted = step(narrow(module, stream="fixed16"), image(), True)
    assert identical(step(narrow(module, stream="fixed16", **off), image(), True), wanted)


@MOSTLY_FAST
@FORMATS
def test_gradient_of_the_image_is_straight_through(module, stream):
    found = []
    for reversible in (True, False):
        x = image().requires_grad_()
        step(narrow(module, stream=stream, reversible=reversible), x, False)
        found.append(x.grad)
    assert torch.equal(*found)
    x = image().requires_grad_()
    step(narrow(module, stream="float32"), x, False)
    assert (found[0] - x.grad).norm() < 0.05 * x.grad.norm()


@MOSTLY_FAST
def test_default_under_autocast_is_exact(module):
    models = [narrow(module, reversible=reversible) for reversible in (True, False)]
    assert models[0].rev_stack.stream is None
    assert identical(*(step(model, image(), True) for model in models))
    plain, float32 = narrow(module), narrow(module, stream="float32")
    assert identical(step(plain, image(), False), step(float32, image(), False)), "no grid without autocast"


def test_fused_branches_run_in_the_dtype_of_autocast(monkeypatch):
    dtypes = set()
    forward = fused_mbconv._forward

    def record(*arguments):
        dtypes.update(plane.dtype for plane in arguments[-3:-1] if plane is not None)  # p, d
        return forward(*arguments)

    monkeypatch.setattr(fused_mbconv, "_forward", record)
    step(narrow(fast, stream="fixed16"), image(), True)
    assert dtypes == {torch.bfloat16}


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "batch", "most"), [("s0", 8, 1.4), pytest.param("s3", 4, 6, marks=pytest.mark.slow)])
def test_memory_of_sixteen_bit_streams(scale, batch, most):
    config = CONFIGS[f"revbifpn_{scale}"]
    model = getattr(fast, config.arch)(stream="fixed16")
    shape = (3, config.resolution, config.resolution)
    memory = measure_sample(model, shape, batch=batch, dtype=torch.bfloat16, fake=True)
    assert memory.bytes_per_sample / MIB <= most


# --- range ----------------------------------------------------------------------------------------


@MOSTLY_FAST
def test_overflow_is_reported_and_still_inverts(module):
    model = narrow(module, stream=StreamFormat("fixed16", (14,))).eval()  # |y| < 2
    x = torch.full((2, 3, 64, 64), 1.75)
    with torch.no_grad(), pytest.warns(StreamOverflowWarning, match=r"fixed16 .* in level 0 \(\|y\| < 2\)"):
        streams = model.forward_streams(x)
        assert torch.equal(model.inverse(streams), x)


@MOSTLY_FAST
def test_no_warning_within_range(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamOverflowWarning)
        step(narrow(module, stream="fixed16"), image(), True)


@MOSTLY_FAST
def test_range_report(module):
    model = narrow(module, stream="fixed16").eval()
    before = [b.clone() for b in model.buffers()]
    report = range_report(model, image())
    assert not model.training and identical(model.buffers(), before)
    assert [r.level for r in report] == [0, 1, 2, 3]
    assert all(0.1 < r.largest < 64 == r.limit and not r.overflows for r in report)
    assert all(2 * r.largest < 2.0 ** (15 - r.fraction_bits) <= 4 * r.largest for r in report)
    assert model.rev_stack.stream == StreamFormat("fixed16") and model.rev_stack.observer is None
    model.rev_stack.stream = StreamFormat("fixed16", tuple(r.fraction_bits for r in report))
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamOverflowWarning)
        model(image())


# --- self-check and drift ----------------------------------------------------------------------------


class Forgetful(nn.Module):
    """A convolution that changes a little with every call, without a buffer to tell."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(channels, channels, 3, padding=1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * (1 + 1e-3 * self.calls)


def blocks(stream, hidden=False):
    torch.manual_seed(0)
    f = Forgetful(4) if hidden else nn.Conv2d(4, 4, 3, padding=1)
    return ReversibleSequence(
        RevBlock(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), RevBlock(f, nn.Conv2d(4, 4, 1)), stream=stream
    )


@FORMATS
def test_self_check_names_the_transform_in_the_first_step(stream):
    net = blocks(stream, hidden=True)
    x = torch.randn(2, 8, 8, 8)
    with pytest.raises(RuntimeError, match=rf"1\.f\.xform_0_1 computed other values .* {stream} stream"):
        net(x).sum().backward()
    blocks("float32", hidden=True)(x).sum().backward()


@MOSTLY_FAST
def test_self_check_is_over_after_a_step_that_passes(module):
    model = narrow(module, stream="fixed16")
    assert model.rev_stack.self_check
    step(model, image(), True)
    assert not model.rev_stack.self_check
    assert identical(step(copy.deepcopy(model), image(), True), step(model, image(), True))


@MOSTLY_FAST
def test_drift_monitor(module):
    for stream, reduced in (("float32", False), ("fixed32", True), ("fixed16", True)):
        model = narrow(module, stream=stream)
        with monitor_drift(model) as drift:
            step(model, image(), reduced)
        created = sum(c.creates for c in model.rev_stack.couplings())
        couplings = len(list(model.rev_stack.couplings()))
        assert len(drift.errors) == couplings - created - 1, "the first is not undone: its input needs no gradient"
        assert "rev_stack" not in next(iter(drift.errors)) and any("xform" in name for name in drift.errors)
        assert 0 < drift.largest < 1e-3 if stream == "float32" else drift.largest == 0.0
        assert model.rev_stack.observer is None


# --- the engine's own containers, bad input --------------------------------------------------------


def test_monitor_refuses_a_model_that_reconstructs_nothing():
    with pytest.raises(ValueError, match="expected a reversible one"), monitor_drift(narrow(fast, reversible=False)):
        pass


@MOSTLY_FAST
def test_stream_may_be_set_and_is_shown(module):
    model = narrow(module)
    model.rev_stack.self_check = False
    model.stream = "fixed16"
    assert model.rev_stack.self_check, "another stream is checked anew"
    assert model.rev_stack.stream == model.stream == StreamFormat("fixed16")
    assert "stream=fixed16[9]" in repr(model)


@MOSTLY_FAST
def test_images_of_sixteen_bits_under_autocast_are_exact_too(module):
    models = [narrow(module, reversible=reversible) for reversible in (True, False)]
    assert identical(*(step(model, image().bfloat16(), True) for model in models))


@MOSTLY_FAST
def test_float64_is_what_an_exact_stream_cannot_give_back(module):
    with pytest.raises(ValueError, match="stream: fixed16 holds float32 values, got an input of torch.float64"):
        narrow(module, stream="fixed16").double()(image().double())


@MOSTLY_FAST
@REVERSIBLE
def test_second_and_double_backward_say_what_to_use(module, reversible):
    model = narrow(module, stream="fixed32", reversible=reversible)
    loss = model(image()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="stream='float32'"):
        torch.autograd.grad(model(image()).sum(), list(model.parameters()), create_graph=True)


@FORMATS
@REVERSIBLE
def test_containers_take_a_stream(stream, reversible):
    net = blocks(stream)
    net.reversible = reversible
    x = torch.round(torch.randn(2, 8, 8, 8) * 16) / 16
    y = net(x.requires_grad_())
    assert y.dtype == torch.float32
    assert torch.equal(net.inverse(y), x)
    y.pow(2).sum().backward()
    assert x.grad.isfinite().all()


def test_blocks_take_a_stream_too():
    block = RevBlock(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    block.stream = "fixed16"
    x = torch.round(torch.randn(2, 8, 8, 8) * 16) / 16
    assert torch.equal(block.inverse(block(x)), x)


@pytest.mark.parametrize("stream", ["float16", "", 16, "fixed8"])
def test_unknown_streams(stream):
    with pytest.raises(ValueError, match="stream: expected 'float32', 'fixed32' or 'fixed16'"):
        narrow(fast, stream=stream)


@pytest.mark.parametrize(("name", "bits"), [("fixed16", (16,)), ("fixed32", (25,)), ("fixed16", (1.5,))])
def test_bits_outside_their_range(name, bits):
    with pytest.raises(ValueError, match="fraction_bits: expected integers from -8 to"):
        StreamFormat(name, bits)


def test_floats_have_no_bits():
    with pytest.raises(ValueError, match="fraction_bits: float32 streams have no grid"):
        StreamFormat("float32", (3,))
