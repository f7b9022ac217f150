"""Couplings with coefficients: scaled targets and linear sources, as dual-residual networks have them."""

import copy

import pytest
import torch
from torch import nn

from revbifpn import ReversibleSequence, check_invertible, monitor_drift
from revbifpn.engine.lowered import Coupler
from revbifpn.fused import FusedCoupler
from revbifpn.reversible import Coupling, Part, Reversible

F64 = torch.float64


class DualResidual(Reversible):
    """``x' = B(x) + (alpha - 1) x + y``, ``y' = beta x`` on two slots that change their roles (arXiv 2401.04105)."""

    def __init__(self, block, alpha, beta, slot):
        super().__init__()
        self.block, self.alpha, self.beta, self.slot = block, alpha, beta, slot

    def couplings(self):
        x, y = Part(self.slot), Part(1 - self.slot)
        yield Coupling(y, ((x, self.block),), linear=((x, self.alpha - 1),))
        yield Coupling(x, scale=self.beta)


def block(channels=6):
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Tanh())


def network(alpha=0.5, beta=0.5, depth=4, coupler=Coupler, dtype=F64):
    torch.manual_seed(0)
    net = ReversibleSequence(*(DualResidual(block(), alpha, beta, i % 2) for i in range(depth))).to(dtype)
    for module in net.modules():
        if isinstance(module, Reversible):
            module.coupler = coupler()
    return net


def streams(dtype=F64, channels=6):
    torch.manual_seed(1)
    return torch.randn(3, channels, 5, 7, dtype=dtype), torch.randn(3, channels, 5, 7, dtype=dtype)


def written_out(net, x, y):
    for dual in net.blocks:
        x, y = dual.block(x) + (dual.alpha - 1) * x + y, dual.beta * x
    return (x, y) if len(net.blocks) % 2 == 0 else (y, x)


def step(run, net, inputs):
    net.zero_grad()
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = run(*inputs)
    sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs)).backward()
    return list(outputs), [x.grad for x in inputs] + [p.grad for p in net.parameters()]


@pytest.mark.parametrize("coupler", [Coupler, FusedCoupler])
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.25), (0.7, 0.3)])
def test_dual_residual_steps_have_the_gradients_of_their_formula(alpha, beta, reversible, coupler):
    net = network(alpha, beta, coupler=coupler)
    net.reversible = reversible
    twin = copy.deepcopy(net)
    outputs, gradients = step(net, net, streams())
    expected, expected_gradients = step(lambda *inputs: written_out(twin, *inputs), twin, streams())
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coupler", [Coupler, FusedCoupler])
def test_inverse_of_forward_is_identity(coupler):
    net = network(coupler=coupler).eval()
    inputs = streams()
    torch.testing.assert_close(net.inverse(*net(*inputs)), tuple(inputs), rtol=0, atol=1e-9)
    check_invertible(net, *inputs)


def test_drift_is_monitored():
    net = network(depth=2)
    with monitor_drift(net) as drift:
        step(net, net, streams())
    assert len(drift.errors) == 4 and drift.largest < 1e-9


def test_a_pass_goes_back_with_its_own_coefficients():
    net = network(0.5, 0.5)
    expected = step(net, net, streams())[1]
    net.zero_grad()
    inputs = [x.clone().requires_grad_() for x in streams()]
    outputs = net(*inputs)
    for dual in net.blocks:
        dual.alpha, dual.beta = 0.1, 0.9
    sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs)).backward()
    torch.testing.assert_close([x.grad for x in inputs] + [p.grad for p in net.parameters()], expected)


class Weighted(Reversible):
    """``y <- y + F(x) + c x``: no scaling, so that a grid can hold it."""

    def __init__(self):
        super().__init__()
        self.f = block()

    def couplings(self):
        yield Coupling(Part(1), ((Part(0), self.f),), linear=((Part(0), -0.5),))


@pytest.mark.parametrize("coupler", [Coupler, FusedCoupler])
@pytest.mark.parametrize("stream", ["fixed32", "fixed16"])
def test_linear_sources_are_exact_on_a_grid(stream, coupler):
    torch.manual_seed(0)
    net = ReversibleSequence(Weighted(), stream=stream).eval()
    net.coupler = coupler()
    inputs = [net.stream.decode(net.stream.encode(x, 0), 0) for x in streams(torch.float32)]
    inputs = [x if isinstance(x, torch.Tensor) else x.to(torch.float32) for x in inputs]
    for x, back in zip(inputs, net.inverse(*net(*inputs)), strict=True):
        assert torch.equal(x, back)
    gradients = step(net, net, inputs)[1]
    net.reversible = False
    for a, b in zip(gradients, step(net, net, inputs)[1], strict=True):
        assert torch.equal(a, b)


def test_scaling_an_exact_stream_is_refused():
    net = network(dtype=torch.float32)
    net.stream = "fixed32"
    with pytest.raises(ValueError, match="scale: a fixed32 stream"):
        net(*streams(torch.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": ((Part(0), 2.0),)}, "linear: .* overlaps the target"),
        ({"linear": ((Part(0, half=1), 2.0),)}, "linear: .* overlaps the target"),
        ({"scale": 0.0}, "scale: expected a number other than 0"),
        ({"creates": True}, "creates: a new level starts from zero"),
        ({"terms": ((Part(1), nn.Identity()),), "creates": True, "scale": 2.0}, "creates: a new level"),
    ],
)
def test_couplings_without_an_inverse_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Coupling(Part(0), **arguments)
