"""Neck and head of the fast network, joined level by level: made once, and always of the modules that are there."""

import copy
import pickle

import pytest
import torch

from revbifpn import fast, model
from revbifpn.fused.segment import Segment
from tests.networks import F64, TWO_LEVELS, gradients, image, narrow


@pytest.fixture
def network():
    """A network that has run once."""
    network = narrow(fast, **TWO_LEVELS, head_dropout=0.0)
    network(image())
    return network


def logits(network, x):
    with torch.no_grad():
        return network.eval()(x)


def as_plain(network):
    """The plain network with the same values."""
    plain = narrow(model, **TWO_LEVELS, head_dropout=0.0)
    plain.load_state_dict(network.state_dict())
    return plain


def other_values(module):
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    return other


@pytest.mark.parametrize("classes", [10, None])
def test_segments_are_made_once_and_are_no_modules_of_the_network(monkeypatch, classes):
    network = narrow(fast, **(TWO_LEVELS | {"classes": classes}))
    modules, names = list(network.modules()), list(network.state_dict())
    made = []
    monkeypatch.setattr(fast, "Segment", lambda *parts: made.append(parts) or Segment(*parts))
    for _ in range(3):
        network(image())
    assert len(made) == 2
    assert list(network.modules()) == modules and list(network.state_dict()) == names


@pytest.mark.parametrize("parent, name", [("head.pyramid_heads", "0"), ("rev_stack.recomp_op", "recomp_transform_1")])
def test_a_replaced_module_is_the_one_that_runs(network, parent, name):
    before = logits(network, image())
    parts = network.get_submodule(parent)
    setattr(parts, name, other_values(getattr(parts, name)))
    after = logits(network, image())
    assert not torch.allclose(after, before)
    assert torch.allclose(after, logits(as_plain(network), image()), rtol=1e-9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_runs_and_trains_its_own_modules(network, duplicate):
    copied = duplicate(network)
    with torch.no_grad():
        for p in [*copied.neck.parameters(), *copied.head.parameters()]:
            p.mul_(1.5)
    assert torch.allclose(logits(copied, image()), logits(as_plain(copied), image()), rtol=1e-9)
    network.zero_grad()
    assert all(g is not None for g in gradients(copied.train(), image()))
    assert all(p.grad is None for p in network.parameters())


def test_a_conversion_after_the_first_call_converts_what_runs(network):
    assert network.float()(image(torch.float32)).dtype == torch.float32
    assert network.double()(image()).dtype == F64


@pytest.mark.parametrize("parent", ["neck", "head.pyramid_heads"])
def test_a_hook_set_after_the_first_call_is_called(network, parent):
    parts = list(network.neck.children()) if parent == "neck" else list(network.get_submodule(parent))
    called = []
    parts[0].register_forward_hook(lambda *_: called.append(parent))
    network(image())
    assert called
