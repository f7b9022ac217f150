"""Graphed steps: captured once, replayed with the results of ordinary steps, whatever changes meanwhile."""

import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import revbifpn
from revbifpn import GraphedModule, GraphedStep, NotCapturableError, StreamOverflowWarning, fast, graphed
from revbifpn.configs import CONFIGS

MODULES = pytest.mark.parametrize("module", [revbifpn, fast], ids=["plain", "fast"])


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, of ops on the CPU: the same calls on the same memory, whatever Python has become since."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        storages = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [i for i, t in enumerate(results) if t.untyped_storage().data_ptr() not in storages]
        self.calls.append((func, args, kwargs, results, fresh))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results, fresh in self.calls:
            again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
            for i in fresh:
                results[i].copy_(again[i])


class OnCpu:
    """In the place of :class:`revbifpn.engine.graphs.Cuda`."""

    def __init__(self):
        self.captures = self.replays = 0

    def current(self):
        return nullcontext()

    def aside(self):
        return nullcontext()

    def capture(self, run, generators):
        self.captures += 1
        recorded, state = Recorded(), self.state()
        with recorded:
            outputs = run()
        self.restore(state)  # a capture computes nothing

        def replay():
            self.replays += 1
            recorded.replay()

        return replay, outputs

    def state(self):
        return [(t, t.detach().clone()) for t in self.memory()], torch.get_rng_state()

    def restore(self, state):
        torch.set_rng_state(state[1])
        for t, value in state[0]:
            with torch.no_grad():
                t.copy_(value)


@pytest.fixture
def side(monkeypatch):
    """Steps made in the test capture on the CPU."""
    side = OnCpu()
    monkeypatch.setattr(graphed, "_side", lambda device, stream: side)
    return side


def narrow(module, **options):
    torch.manual_seed(0)
    arguments = CONFIGS["revbifpn_s0"].arguments()
    arguments |= {"channels": [48, 16, 16, 24], "head_channels": [16, 16, 16, 16], "fc_features": 32, "classes": 10}
    arguments |= {"head_dropout": 0.0, "stochastic_depth": 0.0, "inv_blk_rep": 1, "num_ext_layers": 0}
    return module.RevBiFPN(**(arguments | options)).train()


def batch(i, size=2, pixels=32):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9, "fused": True} | options))


def tensors(*owners):
    found = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += [*owner.parameters(), *owner.buffers()]
        elif isinstance(owner, torch.optim.Optimizer):
            found += [v for state in owner.state.values() for v in state.values() if isinstance(v, Tensor)]
    return found


def assert_close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def pair(side, module, make=sgd, options=None, **arguments):
    """A graphed step and an ordinary one, each with its own copy of everything."""
    models = [narrow(module, **(options or {})) for _ in range(2)]
    optimizers = [make(model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = GraphedStep(models[0], F.cross_entropy, optimizers[0], **arguments)
    side.memory = lambda: tensors(models[0], optimizers[0])

    def ordinary(images, labels):
        loss = F.cross_entropy(models[1](images), labels)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        return loss.detach()

    return step, ordinary, models, optimizers


# --- a replay is a step ---------------------------------------------------------------------------


@MODULES
def test_replayed_steps_equal_ordinary_ones(side, module):
    step, ordinary, models, optimizers = pair(side, module)
    for i in range(8):
        torch.testing.assert_close(step(*batch(i)), ordinary(*batch(i)), rtol=1e-4, atol=1e-5)
    assert (side.captures, side.replays, step.captured) == (1, 5, 1)
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))
    assert all(p.grad is None for p in models[0].parameters())
