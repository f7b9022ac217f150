"""Autocast: the recompute runs as the forward did, streams stay float32, and reversibility costs no accuracy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import revbifpn
from revbifpn import RevBlock, ReversibleSequence
from revbifpn.reversible import is_recomputing
from tests.marks import covering
from tests.networks import F32, F64, MOSTLY_FAST, REVERSIBLE, error, identical, image, narrow

pytestmark = covering

INSIDE = pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])


def deep(module, dtype=F32, **options):
    return narrow(module, dtype, num_ext_layers=2, **options)


def images(dtype=F32):
    return image(dtype, n=8)


def gradients(model, x, *, autocast=True, inside=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), torch.arange(len(x)))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [p.grad for p in model.parameters()]


@MOSTLY_FAST
@INSIDE
def test_reversible_gradients_are_as_accurate_as_stored_ones(module, inside):
    wanted = gradients(deep(revbifpn, F64, reversible=False), images(F64), autocast=False)
    stored = error(gradients(deep(revbifpn, reversible=False), images()), wanted)
    assert 1e-3 < stored < 0.3, "bfloat16 is in use, and says something"
    assert error(gradients(deep(module), images(), inside=inside), wanted) <= 2 * stored


@MOSTLY_FAST
def test_backward_is_the_same_inside_and_outside_the_region(module):
    results = [gradients(deep(module), images(), inside=inside) for inside in (False, True)]
    assert identical(*results)


@MOSTLY_FAST
@REVERSIBLE
def test_streams_stay_float32_and_branches_run_in_bfloat16(module, reversible):
    model = deep(module, reversible=reversible)
    seen = {False: [], True: []}
    for m in model.rev_stack.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda _, __, y: seen[is_recomputing()].append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        streams = model.forward_streams(images())
    assert [y.dtype for y in streams] == [torch.float32] * 4
    sum(y.sum() for y in streams).backward()
    assert set(seen[False]) == {torch.bfloat16}
    assert seen[True] == [] if not reversible else set(seen[True]) == {torch.bfloat16}


@MOSTLY_FAST
def test_parameters_and_their_gradients_stay_float32(module):
    model = deep(module)
    gradients(model, images())
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert torch.is_autocast_enabled("cpu") is False


@MOSTLY_FAST
def test_forward_outside_backward_inside_is_float32(module):
    """The region that counts is the forward's: only the classifier's own backward is PyTorch's, in bfloat16."""
    wanted = gradients(deep(module), images(), autocast=False)
    stored, model = deep(revbifpn, reversible=False), deep(module)
    for m in (stored, model):
        loss = F.cross_entropy(m(images()), torch.arange(8))
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
            assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ordinary = error([p.grad for p in stored.parameters()], wanted)
    assert error([p.grad for p in model.parameters()], wanted) <= 2 * ordinary < 2e-2


@MOSTLY_FAST
def test_training_in_one_autocast_region(module):
    """Autocast caches casts of weights per region: a recompute must neither take a stale one nor leave one."""
    losses = []
    for source, reversible in ((module, True), (revbifpn, False)):
        model = narrow(source, F32, reversible=reversible)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(2):  # the second forward of a region finds the first one's casts
                    loss = F.cross_entropy(model(images()), torch.arange(8))
                    optimizer.zero_grad()
                    loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_model_in_bfloat16_throughout():
    model = deep(revbifpn, torch.bfloat16)
    logits = model(images(torch.bfloat16))
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Asks(nn.Module):
    """Writes down the autocast state it runs in."""

    def __init__(self, log):
        super().__init__()
        self.conv, self.log = nn.Conv2d(4, 4, 1), log

    def forward(self, x):
        state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.log.append((is_recomputing(), *state))
        return self.conv(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_recompute_runs_in_the_state_of_the_forward(dtype, enabled):
    log = []
    net = ReversibleSequence(RevBlock(Asks(log), Asks(log)))
    with torch.autocast("cpu", dtype, enabled=enabled):
        y = net(torch.randn(2, 8, 4, 4))
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        y.sum().backward()
    assert [again for again, *_ in log] == [False, False, True, True]
    assert {enabled_there for _, enabled_there, _ in log} == {enabled}
    assert not enabled or {dtype_there for *_, dtype_there in log} == {dtype}
