"""torch.compile: inference and training with stored activations are one graph, a reversible pass is two ops of one."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import revbifpn
from revbifpn import RevBlock, ReversibleSequence, fast
from revbifpn.engine import region
from tests.marks import product, slow
from tests.networks import F32, TWO_LEVELS, allocator_peak, gradients, image, narrow

RANDOM = TWO_LEVELS | {"stochastic_depth": 0.2}
MODULES = {"plain": revbifpn, "fast": fast}
BACKENDS = {name: name for name in ("eager", "aot_eager", "inductor")}
INFERENCE = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}
WITH_HEAD = {"classifier": {}, "pyramid": {"classes": None}}
SHAPES = {"static": [(2, 64, 32)], "dynamic": [(2, 64, 32), (3, 96, 64)]}  # samples, rows, columns


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend="eager", shapes=SHAPES["static"]):
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=len(shapes) > 1)


def graphs():
    return counters["stats"]["unique_graphs"]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@product(
    "fast-eager-no_grad-classifier-static",
    others=[
        *("plain-eager-inference_mode-pyramid-dynamic", "fast-eager-enable_grad-pyramid-dynamic"),
        *("plain-aot_eager-no_grad-classifier-dynamic", "fast-aot_eager-enable_grad-pyramid-static"),
        *("plain-inductor-no_grad-pyramid-static", "fast-inductor-inference_mode-classifier-dynamic"),
    ],
    module=MODULES,
    backend=BACKENDS,
    mode=INFERENCE,
    options=WITH_HEAD,
    shapes=SHAPES,
)
def test_inference_compiles_whole_for_any_batch_and_size(module, backend, mode, options, shapes):
    model = narrow(module, F32, **(TWO_LEVELS | options)).eval()
    again = compiled(model, backend, shapes)
    with mode():
        for shape in shapes:
            close(again(image(F32, *shape)), model(image(F32, *shape)))
    assert graphs() == 1


TRAINED = {
    "reversible": {},
    "pyramid": {"classes": None},
    "recomputed-neck": {"disable_rev": True},
    "fixed32": {"stream": "fixed32", "reversible": False},
}


@product(
    "fast-eager-reversible-static",
    others=[
        *("plain-eager-reversible-dynamic", "plain-eager-recomputed-neck-static", "fast-eager-fixed32-dynamic"),
        *("plain-aot_eager-pyramid-static", "fast-aot_eager-reversible-dynamic", "fast-aot_eager-pyramid-dynamic"),
        *("plain-inductor-fixed32-static", "fast-inductor-reversible-dynamic", "fast-inductor-recomputed-neck-static"),
    ],
    module=MODULES,
    backend=BACKENDS,
    options=TRAINED,
    shapes=SHAPES,
)
def test_a_reversible_step_is_one_op_each_way(module, backend, options, shapes):
    model, eager = (narrow(module, F32, **(RANDOM | options)) for _ in range(2))
    again = compiled(model, backend, shapes)
    for shape in (shapes[0], *shapes):
        close(gradients(again, image(F32, *shape)), gradients(eager, image(F32, *shape)))
    close(list(model.buffers()), list(eager.buffers()))
    assert graphs() == 1
    assert counters["stats"]["calls_captured"] < 20
    gc.collect()
    assert not region._passes


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_stored_model_trains_in_one_graph(module, backend):
    model, eager = (narrow(module, F32, **TWO_LEVELS, reversible=False) for _ in range(2))
    x = image(F32)
    torch.testing.assert_close(gradients(compiled(model, backend), x), gradients(eager, x), rtol=1e-3, atol=1e-3)
    assert graphs() == 1
    assert counters["stats"]["calls_captured"] > 50  # the network's own operations


def revnet(blocks=2):
    def transform():
        return nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Hardswish())

    torch.manual_seed(0)
    return ReversibleSequence(*(RevBlock(transform(), transform()) for _ in range(blocks)))


@pytest.mark.parametrize("backend", ["eager", *slow(["aot_eager", "inductor"])])
def test_stored_networks_of_ones_own_train_in_one_graph(backend):
    model, eager, x = revnet(), revnet(), data()
    model.reversible = eager.reversible = False
    close(trained(compiled(model, backend), x), trained(eager, x))
    assert graphs() == 1
    assert counters["stats"]["calls_captured"] > 12  # four transforms of three layers each


class Between(nn.Module):
    """A reversible network among layers that a compiler may fuse, called twice."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.tanh(self.net(torch.sin(x))) + self.net(x)


def data(n=2):
    return torch.randn(n, 16, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def trained(model, x):
    model.zero_grad(set_to_none=True)
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("backend", ["aot_eager", *slow(["inductor"])])
def test_networks_of_ones_own_are_regions_of_a_compiled_model(backend):
    model, eager, x = Between(revnet()), Between(revnet()), data()
    again = compiled(model, backend)
    for _ in range(2):
        close(trained(again, x), trained(eager, x))
    close(list(model.buffers()), list(eager.buffers()))  # of both calls
    assert graphs() == 1


def test_a_copy_trains_its_own_parameters():
    model, x = revnet(), data()
    trained(compiled(model), x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for q in other.parameters():
            q.mul_(2)
    close(trained(compiled(other), x), trained(copy.deepcopy(other), x))


def test_a_pass_goes_with_its_outputs():
    model = compiled(revnet(), "aot_eager")
    y = model(data())
    assert len(region._passes) == 1
    del y
    gc.collect()
    assert not region._passes


@pytest.mark.parametrize("retain", [True, False])
def test_a_second_backward_needs_retain_graph_on_the_model(retain):
    model, x = revnet(), data()
    model.retain_graph = retain
    y = compiled(model)(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    if retain:
        close(torch.autograd.grad(y.sum(), x), first)
    else:
        with pytest.raises(RuntimeError, match="set retain_graph=True on the model"):
            torch.autograd.grad(y.sum(), x)


def test_autocast_around_a_compiled_model_reaches_its_pass():
    model, eager, x = revnet(), revnet(), data()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(model, "aot_eager")(x), eager(x)
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)]
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", *slow(["inductor"])])
def test_a_compiled_step_takes_no_more_memory(backend):
    x = torch.randn(2, 16, 128, 128)
    peaks = []
    for model in (compiled(revnet(8), backend), revnet(8)):

        def step(model=model):
            model(x).sum().backward()

        step()
        peaks.append(allocator_peak(step))
    stored = revnet(8)
    stored.reversible = False
    most = allocator_peak(lambda: stored(x).sum().backward())
    output = x.nbytes  # a compiled graph has a copy of it, and holds its gradient during the call
    assert peaks[0] <= 1.05 * peaks[1] + 2 * output < 0.5 * most


def test_torch_func_transforms_see_ordinary_operations():
    model, x = narrow(fast, F32, **TWO_LEVELS).eval(), image(F32)

    def loss(z):
        return model(z).square().sum()

    leaf = x.clone().requires_grad_()
    close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    with torch.no_grad():
        close(torch.func.vmap(lambda z: model(z[None])[0])(x), model(x))
    _, derivative = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    close(derivative, torch.func.grad(loss)(x).sum())
