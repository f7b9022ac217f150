"""What an error advises is done word by word, and then the same call works."""

import re

import pytest
import torch

import revbifpn
from revbifpn import fast
from tests.marks import covering

pytestmark = covering

NETWORK = dict(
    channels=(48, 16, 24, 32),
    head_channels=(16, 16, 24, 32),
    num_ext_layers=1,
    inv_blk_rep=1,
    fc_features=64,
    classes=10,
)
sources = pytest.mark.parametrize("source", [revbifpn.RevBiFPN, fast.RevBiFPN], ids=["plain", "fast"])


def error_of(call, kind):
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def options_in(message):
    """``name=value`` of a message, as keyword arguments."""
    pairs = re.findall(r"(\w+)=('\w+'|True|False|torch(?:\.\w+)+)", message)
    return {name: eval(value, {"torch": torch}) for name, value in pairs}


@sources
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_an_image_of_another_dtype_is_converted_as_the_message_says(source, dtype):
    model, x = source(**NETWORK).eval(), torch.ones(2, 3, 64, 64, dtype=dtype)
    message = error_of(lambda: model(x), ValueError)
    assert str(dtype) in message
    (remedy,) = re.findall(r"as in (x\.\w+\([\w.]*\)(?: / \d+)?)", message)
    with torch.no_grad():
        assert model(eval(remedy, {"torch": torch, "x": x})).isfinite().all()


@sources
def test_under_autocast_an_image_of_16_bits_is_taken(source):
    model, x = source(**NETWORK).eval(), torch.ones(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_one_value_per_channel_trains_with_frozen_norms_as_the_message_says():
    model, x = fast.RevBiFPN(**NETWORK), torch.randn(1, 3, 32, 32)
    message = error_of(lambda: model(x), ValueError)
    (remedy,) = re.findall(r"model\.\w+\(\)", message)
    eval(remedy, {"model": model})
    model(x).sum().backward()
    x = x.repeat(2, 1, 1, 1)  # the other remedy
    model.freeze_norms(False)(x).sum().backward()


@sources
def test_second_derivatives_work_with_the_options_that_the_message_names(source):
    x = torch.randn(2, 3, 32, 32, requires_grad=True)

    def second_derivative(model):
        (dx,) = torch.autograd.grad(model.train()(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    message = error_of(lambda: second_derivative(source(**NETWORK)), RuntimeError)
    options = options_in(message.split("For second derivatives", 1)[1])
    assert "reversible" in options
    assert second_derivative(revbifpn.RevBiFPN(**NETWORK, **options)).isfinite().all()


@sources
@pytest.mark.parametrize("remedy", ["retain_graph=True", "reversible=False"])
def test_a_second_backward_works_with_either_option_that_the_message_names(source, remedy):
    x = torch.randn(2, 3, 32, 32)

    def two_losses(model):
        out = model(x)
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()

    assert remedy in error_of(lambda: two_losses(source(**NETWORK)), RuntimeError)
    two_losses(source(**NETWORK, **options_in(remedy)))
