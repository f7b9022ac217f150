"""Several backwards through one forward: two losses, gradients per task, with ``retain_graph=True`` on the model."""

import pytest
import torch

from tests.marks import mostly_slow
from tests.networks import F32, F64, MOSTLY_FAST, image, narrow

STREAMS = pytest.mark.parametrize("stream", ["float32", "fixed32", "fixed16"])
KINDS = {"classes": {}, "pyramid": {"classes": None}, "streams": {"classes": None, "head_channels": None}}
HEADS = pytest.mark.parametrize("head", KINDS)


def model(module, head="pyramid", dtype=F64, **options):
    return narrow(module, dtype, **KINDS[head], **options)


def losses(outputs):
    """Two losses of what a model gives."""
    if isinstance(outputs, torch.Tensor):
        return outputs.square().sum(), outputs.sin().sum()
    return sum(y.square().mean() for y in outputs), sum(y.sin().mean() for y in outputs[1:])


def gradients(loss, net, **options):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, **options)


def expected(net, x):
    """The gradients of each loss, from a forward of its own."""
    return [gradients(losses(net(x))[i], net) for i in range(2)]


@MOSTLY_FAST
@HEADS
def test_each_loss_has_its_own_gradients(module, head):
    want = expected(model(module, head), image())
    net = model(module, head, retain_graph=True)
    first, second = losses(net(image()))
    found = [gradients(first, net, retain_graph=True), gradients(second, net, retain_graph=True)]
    again = gradients(first, net)
    for a, b in zip([*found, again], [*want, want[0]], strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@MOSTLY_FAST
@STREAMS
@pytest.mark.parametrize("reversible", mostly_slow([True, False]))
def test_repeated_backwards_of_exact_streams_are_the_same_bits(module, stream, reversible):
    net = model(module, "classes", F32, stream=stream, retain_graph=True, reversible=reversible)
    loss = losses(net(image(F32)))[0]
    first, second = gradients(loss, net, retain_graph=True), gradients(loss, net)
    if stream == "float32" and reversible:
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    else:
        assert all(map(torch.equal, first, second))


@MOSTLY_FAST
def test_gradients_accumulate_over_backwards(module):
    net, x = model(module, retain_graph=True), image()
    first, second = losses(net(x))
    first.backward(retain_graph=True)
    second.backward()
    found = [p.grad for p in net.parameters()]
    net = model(module)
    sum(losses(net(x))).backward()
    for a, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-9)


@MOSTLY_FAST
def test_a_backward_that_stopped_on_its_way_can_be_followed_by_another(module):
    want = expected(model(module), image())
    net = model(module, retain_graph=True)
    first, second = losses(net(image()))
    parameters = list(net.parameters())
    middle = len(parameters) // 2
    (part,) = torch.autograd.grad(first, [parameters[middle]], retain_graph=True)
    torch.testing.assert_close(part, want[0][middle], rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(second, net), want[1], strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@MOSTLY_FAST
@HEADS
def test_by_default_a_second_backward_is_refused_and_the_message_leads(module, head):
    net = model(module, head)
    loss = losses(net(image()))[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph=True on the model"):
        loss.backward()
    net.retain_graph = True  # as it says
    loss = losses(net(image()))[0]
    loss.backward(retain_graph=True)
    loss.backward()


@MOSTLY_FAST
def test_without_retain_graph_in_the_call_autograd_refuses(module):
    net = model(module, retain_graph=True)
    loss = losses(net(image()))[0]
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
