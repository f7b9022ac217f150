"""``pad=True``: images of any size, padded below and on the right, and maps cropped to ``ceil(size / stride)``."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import revbifpn
from revbifpn import GraphedStep, estimate_memory, fast
from revbifpn.memory import measure_step
from tests.marks import product
from tests.networks import (
    BOTH,
    F32,
    F64,
    MODULES,
    MOSTLY_FAST,
    TWO_LEVELS,
    assert_same_as_stored,
    identical,
    image,
    narrow,
    scalar,
)

STRIDE = 8
OPTIONS = TWO_LEVELS | {"head_dropout": 0.0}
SIZES = [(1, 1), (13, 22), (16, 24), (7, 40)]


def network(module, dtype=F64, **options):
    return narrow(module, dtype, **(OPTIONS | options))


def padded(x):
    return F.pad(x, (0, -x.shape[-1] % STRIDE, 0, -x.shape[-2] % STRIDE))


@MODULES
@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("classes", [10, None])
def test_results_are_those_of_the_padded_image_cropped(module, height, width, classes):
    x = image(height=height, width=width)
    found = network(module, classes=classes, pad=True).eval()(x)
    wanted = network(module, classes=classes).eval()(padded(x))
    if classes:
        assert torch.equal(found, wanted)
        return
    for stride, y, whole in zip((4, 8), found, wanted, strict=True):
        h, w = math.ceil(height / stride), math.ceil(width / stride)
        assert y.shape[-2:] == (h, w)
        assert torch.equal(y, whole[..., :h, :w])


def gradients_of_all(model, x):
    x = x.requires_grad_()
    return torch.autograd.grad(scalar(model(x)), [x, *model.parameters()])


@product("fast-pyramid", "fast-logits", "plain-logits", module=BOTH, classes={"logits": 10, "pyramid": None})
def test_gradients_are_those_of_the_stored_model(module, classes):
    options = OPTIONS | {"classes": classes, "pad": True}
    assert_same_as_stored(module, lambda model: gradients_of_all(model, image(height=13, width=22)), **options)


@MOSTLY_FAST
def test_gradients_of_exact_streams_are_those_of_stored_ones_bit_for_bit(module):
    options = {"pad": True, "stream": "fixed32"}
    models = [network(module, F32, reversible=reversible, **options) for reversible in (True, False)]
    assert identical(*(gradients_of_all(model, image(F32, height=13, width=22)) for model in models))


@MODULES
def test_an_unbatched_image_gives_unbatched_maps(module):
    model = network(module, classes=None, pad=True).eval()
    x = image(height=13, width=22)
    assert all(torch.allclose(a, b[0]) for a, b in zip(model(x[0]), model(x[:1]), strict=True))


@MOSTLY_FAST
def test_the_inverse_takes_the_streams_of_the_padded_image_and_gives_it_back(module):
    model = network(module, pad=True).eval()
    x = image(height=13, width=22)
    with torch.no_grad():
        streams = model.forward_streams(x)
        found = model.inverse(streams)
    assert [tuple(y.shape[2:]) for y in streams] == [(4, 6), (2, 3)]
    torch.testing.assert_close(found, padded(x), rtol=0, atol=1e-9)


def test_cropped_maps_have_no_inverse():
    model = network(revbifpn, head_channels=None, classes=None, pad=True).eval()
    with pytest.raises(ValueError, match="streams: .*forward_streams"):
        model.inverse(model(image(height=12, width=20)))


@MODULES
def test_without_it_the_error_names_it_and_then_the_call_works(module):
    model, x = network(module), image(height=13, width=22)
    with pytest.raises(ValueError, match="positive multiples of 8, got 13 x 22; .*pad=True"):
        model(x)
    model.pad = True
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match="expected height and width to be positive, got 0 x 22"):
        model(x[..., :0, :])


@MOSTLY_FAST
def test_a_cropped_map_changed_in_place_before_backward_is_noticed(module):
    model = network(module, head_channels=None, classes=None, pad=True)
    high, low = model(image(height=13, width=22))
    high.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        low.sum().backward()


def test_a_step_under_autocast_and_as_a_graph():
    model, x = network(fast, F32, pad=True), image(F32, height=13, width=22)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no CUDA graphs on a CPU
        step = GraphedStep(model, F.cross_entropy, optimizer)
    labels = torch.tensor([1, 2])
    losses = [step(x, labels).item() for _ in range(2)]
    step.rehearse(x, labels)
    assert losses[1] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_memory_is_estimated_for_the_size_that_comes():
    model = network(fast, F32, pad=True)
    assert estimate_memory(model, 2, (13, 22)).activations == measure_step(model, (3, 13, 22), batch=2).peak_bytes
