"""Gradients that arrive at a level's reading node: written over where they are its own, left alone where not."""

import pytest
import torch

import revbifpn
from revbifpn import fast
from revbifpn.engine.nodes import repetition
from revbifpn.fused import chunks_of
from revbifpn.memory import PeakMemory
from tests.networks import F32, F64, difference, image, narrow

SIZE = {"height": 96, "width": 128}
BODY = {"classes": None, "head_channels": [48, 16, 16, 16]}  # the largest map is as wide as its stream


def weights(maps):
    return [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in maps]


def loss_of(maps):
    return sum((w * y).sum() for w, y in zip(weights(maps), maps, strict=True))


def step(model, look=None):
    """Gradients of the parameters; ``look`` sees the largest map before."""
    model.zero_grad()
    maps = model(image(F64, **SIZE))
    if look is not None:
        look(maps[0])
    loss_of(maps).backward()
    return [p.grad for p in model.parameters()]


def hook(held):
    def look(y):
        y.register_hook(lambda g: held.append(g))

    return look


def prehook(held):
    def look(y):
        y.grad_fn.register_prehook(lambda gs: held.append(gs[0]))

    return look


@pytest.mark.parametrize("looks", [hook, prehook])
def test_a_gradient_that_a_hook_keeps_stays_as_it_is(looks):
    model, held = narrow(fast, **BODY), []
    found = step(model, looks(held))
    wanted = weights(model(image(F64, **SIZE)))[0]
    assert torch.equal(held[0], wanted)
    assert difference(found, step(narrow(fast, **BODY))) == 0


def test_a_gradient_that_the_caller_asked_for_stays_as_it_is():
    model = narrow(fast, **BODY)
    maps = model(image(F64, **SIZE))
    first, *_ = torch.autograd.grad(loss_of(maps), [maps[0], *model.parameters()])
    assert torch.equal(first, weights(maps)[0])


def test_a_gradient_that_belongs_to_another_node_too_stays_as_it_is():
    def run(module, **options):
        first, second = narrow(module, **BODY, **options), narrow(module, **BODY, seed=1, **options)
        x = image(F64, **SIZE)
        total = first(x)[0] + second(x)[0]  # both get the same gradient
        (weights([total])[0] * total).sum().backward()
        return [p.grad for model in (first, second) for p in model.parameters()]

    assert difference(run(fast), run(revbifpn, reversible=False)) < 1e-9


def test_a_gradient_of_its_own_becomes_that_of_the_stream_and_takes_no_memory():
    peaks = []
    for looks in (None, hook([])):
        model = narrow(fast, F32, **BODY)
        with PeakMemory() as meter:
            maps = model(image(F32, **SIZE))
            if looks is not None:
                looks(maps[0])
            loss = loss_of(maps)
            size = maps[0].nbytes
            del maps
            loss.backward()
            peaks.append(meter.peak_without([p.grad for p in model.parameters()]))
    assert peaks[1] - peaks[0] >= size


@pytest.mark.parametrize("stream", ["float32", "fixed32", "fixed16"])
def test_a_map_is_repeated_in_the_backward_of_what_reads_it(stream):
    model, found = narrow(fast, F32, **BODY, stream=stream), []

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, again):
            ctx.again = again
            return y.sum()

        @staticmethod
        def backward(ctx, g):
            found.append(ctx.again())
            return torch.ones_like(found[0]), None

    maps = model(image(F32, **SIZE))
    Reads.apply(maps[0], repetition(maps[0])).backward()
    assert difference(found, maps[:1]) < 1e-6 and found[0].data_ptr() != maps[0].data_ptr()


def test_what_a_body_stores_or_computes_by_modules_is_not_repeated():
    for model in (narrow(fast, **BODY, reversible=False), narrow(revbifpn, **BODY)):
        assert repetition(model(image())[0]) is None
    assert repetition(torch.ones(1)) is None


@pytest.mark.parametrize("expand", [1, 2])
def test_samples_that_frozen_norms_leave_on_their_own_are_pulled_some_at_a_time(expand):
    def run(module, **options):
        options = BODY | {"head_expand_ratios": [expand] * 4} | options
        model = narrow(module, **options).freeze_norms()
        loss_of(model(image(F64, n=3, **SIZE))).backward()
        return [p.grad for p in model.parameters()]

    with chunks_of(1):
        found = run(fast)
    assert difference(found, run(revbifpn, reversible=False)) < 1e-9
