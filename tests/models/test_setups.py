"""What frameworks and users do to a model before they train it: layouts, devices, other norms, other weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import revbifpn
from revbifpn import fast
from revbifpn.fused import why_not_fused
from revbifpn.mbconv import MBConv
from tests.adapters import frameworks
from tests.marks import mostly_slow, product
from tests.networks import (
    BOTH,
    F64,
    MODULES,
    MOSTLY_FAST,
    NARROW,
    difference,
    gradients,
    identical,
    image,
    narrow,
    scalar,
    stored_gradients,
)

# Layouts and devices -----------------------------------------------------------------------------


@MOSTLY_FAST
def test_channels_last_changes_no_value(module):
    """Maps of the fast class are contiguous; plain ones have the layout of their convolutions."""
    layout = torch.channels_last
    model, x = narrow(module, classes=None).to(memory_format=layout), image().to(memory_format=layout)
    maps = model(x)
    wanted = narrow(revbifpn, classes=None, reversible=False)(image())
    assert difference(maps, wanted) < 1e-9
    assert all(y.is_contiguous(memory_format=torch.contiguous_format if module is fast else layout) for y in maps)
    assert difference(gradients(model, x), stored_gradients(image(), classes=None)) < 1e-9
    assert all(p.grad.is_contiguous(memory_format=layout) for p in model.parameters() if p.dim() == 4)


@MOSTLY_FAST
@pytest.mark.parametrize("made", mostly_slow(["context", "default device"]))
def test_a_model_made_on_meta_takes_weights_by_assignment(module, made):
    if made == "context":
        with torch.device("meta"):
            model = module.RevBiFPN(**NARROW)
    else:
        torch.set_default_device("meta")
        try:
            model = module.RevBiFPN(**NARROW)
        finally:
            torch.set_default_device(None)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.load_state_dict(narrow(module).state_dict(), assign=True)
    assert difference(gradients(model, image()), stored_gradients(image())) < 1e-9


@MOSTLY_FAST
def test_a_default_device_is_no_concern_of_a_step(module):
    """As torch.set_default_device("cuda") with a model on a CPU."""
    model, x = narrow(module), image()
    with torch.device("meta"):
        outputs = model(x)
    loss = scalar(outputs)
    with torch.device("meta"):
        loss.backward()
    assert difference([p.grad for p in model.parameters()], stored_gradients(image())) < 1e-9


# Norms with constant statistics ------------------------------------------------------------------


def with_statistics(module, dtype=F64, **options):
    model = narrow(module, dtype, **options)
    for i, m in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(i)
        m.running_mean.normal_(generator=generator)
        m.running_var.uniform_(0.5, 2, generator=generator)
        m.weight.data.normal_(generator=generator)
    return model


def frozen_by_torchvision(model):
    ops = frameworks.on_torchvision("torchvision.ops")
    for parent in list(model.modules()):
        for name, m in parent.named_children():
            if isinstance(m, nn.BatchNorm2d):
                norm = ops.FrozenBatchNorm2d(m.num_features, eps=m.eps).to(m.weight.dtype)
                norm.load_state_dict(m.state_dict())
                setattr(parent, name, norm)
    return model


def frozen_by_timm(model):
    return frameworks.on_torchvision("timm.layers").freeze_batch_norm_2d(model)


@pytest.mark.parametrize("freeze", [frozen_by_torchvision, frozen_by_timm])
def test_frozen_norms_run_fused_with_the_gradients_of_eval_mode(freeze):
    model = freeze(with_statistics(fast))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for m in model.modules():
        if isinstance(m, MBConv):
            assert why_not_fused(m, image()) == ""
    before = [b.clone() for b in model.buffers()]
    found = gradients(model, image())
    wanted = gradients(with_statistics(revbifpn, reversible=False).freeze_norms(), image())
    assert difference(found, [g for g in wanted if g is not None]) < 1e-9
    assert identical(model.buffers(), before)
    with torch.no_grad():
        assert difference([model(image()[:1])], [model(image())[:1]]) < 1e-9


def test_a_class_that_is_merely_called_so_is_not_fused():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.register_buffer("weight", torch.ones(channels))

        def forward(self, x):
            return x

    mbconv = narrow(fast).rev_stack.blocks[0].get_submodule("rev_transform_0.f.xform_0_1")
    assert why_not_fused(mbconv, image()) == ""
    mbconv.project_conv.norm = FrozenBatchNorm2d(mbconv.project_conv.conv.out_channels)
    assert "projection" in why_not_fused(mbconv, image())


def test_norms_that_count_batches_in_floats_run_as_they_are():
    """As after loading a checkpoint whose tensors were all converted."""
    model, twin = narrow(fast), narrow(revbifpn, reversible=False)
    for each in (model, twin):
        each.load_state_dict({name: x.to(F64) for name, x in each.state_dict().items()}, assign=True)
    assert difference(gradients(model, image()), gradients(twin, image())) < 1e-9
    assert difference(list(model.buffers()), list(twin.buffers())) < 1e-9


# Weights that are computed -----------------------------------------------------------------------


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)][::3]


def pruned(model):
    for m in convolutions(model):
        prune.l1_unstructured(m, "weight", amount=0.4)


def parametrised(wrap):
    def put(model):
        torch.manual_seed(3)  # power iterations start at random
        for m in convolutions(model):
            wrap(m)

    return put


COMPUTED = {
    "weight norm": parametrised(parametrizations.weight_norm),
    "spectral norm": parametrised(parametrizations.spectral_norm),
    "prune": pruned,
}


@product("plain-weight norm", "fast-spectral norm", "fast-prune", module=BOTH, put=COMPUTED)
def test_computed_weights_have_the_gradients_of_the_stored_run(module, put):
    found, wanted = narrow(module), narrow(revbifpn, reversible=False)
    put(found)
    put(wanted)
    assert difference(gradients(found, image()), gradients(wanted, image())) < 1e-9


@MOSTLY_FAST
def test_computed_weights_that_are_cached_have_gradients(module):
    model, wanted = narrow(module), narrow(revbifpn, reversible=False)
    for m in (model, wanted):
        COMPUTED["weight norm"](m)
    with parametrize.cached():
        found = gradients(model, image())
    assert all(g is not None for g in found)
    assert difference(found, gradients(wanted, image())) < 1e-9


# Transforms of functions -------------------------------------------------------------------------


def functional(module):
    model = narrow(module).eval()  # statistics of a batch are no function of one image
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return scalar(torch.func.functional_call(model, parameters, (x,)))

    return model, parameters, loss


@MODULES
def test_grad_of_a_function_is_its_gradient(module):
    model, parameters, loss = functional(module)
    found = torch.func.grad(loss)(parameters, image())
    assert difference(list(found.values()), gradients(narrow(revbifpn, reversible=False).eval(), image())) < 1e-9


@MOSTLY_FAST
def test_vmap_of_grad_gives_gradients_of_every_image(module):
    model, parameters, loss = functional(module)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, image()[:, None])
    for i, x in enumerate(image()):
        wanted = gradients(narrow(revbifpn, reversible=False).eval(), x[None])
        assert difference([g[i] for g in found.values()], wanted) < 1e-9


@pytest.mark.slow
@MODULES
def test_forward_and_reverse_derivatives_agree(module):
    model, parameters, _ = functional(module)
    x, v = image(n=1, height=32, width=32), torch.randn_like(image(n=1, height=32, width=32))
    out, tangent = torch.func.jvp(model, (x,), (v,))
    assert difference([out], [model(x)]) < 1e-9
    jacobian = torch.func.jacrev(model)(x)  # [1, classes, 1, 3, H, W]
    assert difference([tangent], [torch.einsum("aknchw,nchw->ak", jacobian, v)]) < 1e-9
