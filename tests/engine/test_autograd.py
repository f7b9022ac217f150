"""RevBiFPN under autograd: gradients are those of stored activations, or there is an error that says why not."""

import copy
import gc
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revbifpn
from revbifpn.memory import measure_step
from revbifpn.reversible import is_recomputing
from tests.marks import covering, mostly_slow
from tests.networks import (
    F32,
    F64,
    MOSTLY_FAST,
    REVERSIBLE,
    TWO_LEVELS,
    assert_same_as_stored,
    difference,
    error,
    gradients,
    image,
    narrow,
    scalar,
    stored_gradients,
)

pytestmark = covering

DEPTHS = {"s0": (2, 0.0), "s3": (3, 0.05), "s6": (5, 0.3)}  # num_ext_layers, stochastic_depth


# Equality with stored activations -----------------------------------------------------------------


@MOSTLY_FAST
@pytest.mark.parametrize("depth", mostly_slow(DEPTHS))
def test_gradients_and_statistics_at_the_depth_of_a_scale(module, depth):
    ext, drop = DEPTHS[depth]
    options = {"num_ext_layers": ext, "inv_blk_rep": 2, "stochastic_depth": drop, "head_dropout": 0.3}
    model, twin = (narrow(module, reversible=reversible, **options) for reversible in (True, False))
    found, wanted = gradients(model, image(n=3)), gradients(twin, image(n=3))
    assert difference(found, wanted) < 1e-9
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name
        if name.endswith("num_batches_tracked"):
            assert a == 1, name
    assert difference(found, stored_gradients(image(n=3), **options)) < 1e-9


@MOSTLY_FAST
@pytest.mark.parametrize("wanted", [".f.", ".g.", "rev_stack.2.rev_transform_0.g", "rev_stack.2.rev_transform_0.f"])
def test_some_transforms_of_blocks_are_trained(module, wanted):
    """The couplings of a block share a node: its backward ends where nothing before wants a gradient."""
    twins = [narrow(module, reversible=reversible, inv_blk_rep=2) for reversible in (True, False)]
    for twin in twins:
        for name, q in twin.named_parameters():
            q.requires_grad_(wanted in name)
    trained = [[q for q in twin.parameters() if q.requires_grad] for twin in twins]
    assert trained[0]
    for twin in twins:
        scalar(twin(image(n=3))).backward()
    assert all(q.grad is not None for q in trained[1])
    assert difference(*([q.grad for q in some] for some in trained)) < 1e-9


@MOSTLY_FAST
def test_random_masks_matter_and_are_replayed(module):
    options = {"stochastic_depth": 0.5, "head_dropout": 0.5}
    model = narrow(module, **options)
    state = copy.deepcopy(model.state_dict())
    first = gradients(model, image(), seed=2)
    model.load_state_dict(state)
    other = gradients(model, image(), seed=3)
    model.load_state_dict(state)
    again = gradients(model, image(), seed=2)
    assert difference(other, first) > 1e-2
    assert difference(again, first) == 0.0


@MOSTLY_FAST
def test_float32_gradients_are_close_to_float64(module):
    options = {"num_ext_layers": 2, "inv_blk_rep": 2}
    x = image(n=4)
    wanted = stored_gradients(x, **options)
    found = gradients(narrow(module, F32, **options), x.float())
    assert error(found, wanted) < 1e-4
    largest = max(g.norm() for g in wanted)
    for a, b in zip(found, wanted, strict=True):
        if b.norm() > 1e-6 * largest:
            assert abs(a.double().norm() - b.norm()) < 1e-3 * b.norm()


@MOSTLY_FAST
@pytest.mark.parametrize(
    "off", [{"disable_rev": True}, {"disable_recomp": True}, {"disable_rev": True, "disable_recomp": True}]
)
def test_each_switch_gives_equal_gradients(module, off):
    options = {"stochastic_depth": 0.3, "head_dropout": 0.3}
    assert difference(gradients(narrow(module, **off, **options), image()), stored_gradients(image(), **options)) < 1e-9


@MOSTLY_FAST
def test_switches_store_what_their_names_say(module):
    """Kept between forward and backward: the neck's activations, the stack's, or both."""
    options = {"num_ext_layers": 2, "classes": None}
    kept = {
        (rev, recomp): measure_step(
            narrow(module, F32, disable_rev=rev, disable_recomp=recomp, **options), (3, 64, 64), batch=4
        ).kept_bytes
        for rev in (False, True)
        for recomp in (False, True)
    }
    neck, stack = kept[False, True] - kept[False, False], kept[True, False] - kept[False, False]
    assert neck > 0.1 * kept[False, False]
    assert stack > 3 * kept[False, False]
    assert kept[True, True] - kept[False, False] == pytest.approx(neck + stack, rel=0.25)


@MOSTLY_FAST
def test_memory_does_not_grow_with_depth(module):
    peak = {
        (reversible, ext): measure_step(
            narrow(module, F32, reversible=reversible, num_ext_layers=ext), (3, 64, 64), batch=16
        ).peak_bytes
        for reversible, ext in ((True, 0), (True, 10), (False, 0), (False, 10))
    }
    assert peak[True, 10] < 1.1 * peak[True, 0]
    assert peak[False, 10] > 2.5 * peak[False, 0]


@MOSTLY_FAST
@pytest.mark.parametrize("mode", ["eval", "frozen norms"])
def test_gradients_with_running_statistics(module, mode):
    def run(model):
        gradients(model, image())
        model.train(mode != "eval")
        if mode != "eval":
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d) and m.num_features != 16:
                    m.eval()
        return gradients(model, image() + 1)

    assert_same_as_stored(module, run, stochastic_depth=0.2)


@MOSTLY_FAST
@pytest.mark.parametrize(
    "options", [{"norm_fn": lambda c, **_: nn.GroupNorm(4, c)}, {"norm": False}, {"act_fn": nn.ReLU}]
)
def test_other_layers(module, options):
    assert difference(gradients(narrow(module, **options), image()), stored_gradients(image(), **options)) < 1e-9


@MOSTLY_FAST
@pytest.mark.parametrize("reversible", mostly_slow([True, False]))
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x[:, :, ::2, ::2].repeat(1, 1, 2, 2)[..., :32],
    ],
    ids=["channels_last", "transposed", "expanded", "sliced"],
)
def test_any_layout_of_the_image(module, reversible, change):
    x = change(image()).requires_grad_()
    results = []
    for given in (x, x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()):
        model = narrow(module, reversible=reversible)
        results.append(torch.autograd.grad(scalar(model(given)), [given, *model.parameters()]))
    assert difference(*results) < 1e-9


@MOSTLY_FAST
def test_channels_last_weights(module):
    model = narrow(module).to(memory_format=torch.channels_last)
    assert difference(gradients(model, image().to(memory_format=torch.channels_last)), stored_gradients(image())) < 1e-9


@MOSTLY_FAST
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(module, training):
    model = narrow(module).train(training)
    logits = model(image()[:0])
    logits.sum().backward()
    assert logits.shape == (0, 10)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# The protocol -----------------------------------------------------------------------------------


@MOSTLY_FAST
def test_autograd_grad_of_image_and_parameters(module):
    x = image().requires_grad_()

    def run(model):
        twin = copy.deepcopy(model)
        found = torch.autograd.grad(scalar(model(x)), [x, *model.parameters()])
        assert all(p.grad is None for p in model.parameters()) and x.grad is None
        assert difference(torch.autograd.grad(scalar(twin(x)), x), found[:1]) < 1e-12
        return found

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_learnable_layer_before_the_model(module):
    def run(model):
        torch.manual_seed(0)
        return gradients(nn.Sequential(nn.Conv2d(3, 3, 1), model).double(), image())

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_gradients_accumulate(module):
    model = narrow(module)
    once = [g.clone() for g in gradients(model, image())]
    scalar(model(image())).backward()
    assert difference([p.grad for p in model.parameters()], [2 * g for g in once]) < 1e-12


@MOSTLY_FAST
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_two_backwards(module, order):
    def run(model):
        torch.manual_seed(5)
        losses = [scalar(model(image())), scalar(model(image() * 2))]
        by_forward = {i: torch.autograd.grad(losses[i], list(model.parameters())) for i in order}
        return [*by_forward[0], *by_forward[1]]

    assert_same_as_stored(module, run, stochastic_depth=0.3, head_dropout=0.3)


FREEZE = {
    "first layers": lambda name: name.startswith(("rev_stack.1.", "rev_stack.2.", "rev_stack.3.")),
    "a layer in between": lambda name: name.startswith("rev_stack.4."),
    "norms": lambda name: ".norm." in name,
    "stack": lambda name: name.startswith("rev_stack.") and "recomp_op" not in name,
    "stack and neck": lambda name: name.startswith("rev_stack."),
    "all but the classifier": lambda name: not name.startswith("head.fc"),
    "neck and head": lambda name: name.startswith("head") or "recomp_op" in name,
    "everything": lambda name: True,
}


@MOSTLY_FAST
@pytest.mark.parametrize("part", FREEZE)
@pytest.mark.parametrize("image_gradient", mostly_slow([True, False]))
def test_frozen_parameters(module, part, image_gradient):
    def run(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FREEZE[part](name))
        x = image().requires_grad_(image_gradient)
        loss = scalar(model(x))
        if loss.requires_grad:
            loss.backward()
        return [x.grad] + [p.grad for p in model.parameters()]

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_requires_grad_changed_between_forward_and_backward(module):
    def run(model):
        loss = scalar(model(image()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("rev_stack.2" not in name)
        loss.backward()
        return [p.grad for p in model.parameters()]

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_train_flag_changed_between_forward_and_backward(module):
    def run(model):
        torch.manual_seed(3)
        loss = scalar(model(image()))
        model.eval()
        loss.backward()
        assert not any(m.training for m in model.modules())
        return [p.grad for p in model.parameters()]

    assert_same_as_stored(module, run, stochastic_depth=0.4)


@MOSTLY_FAST
def test_eval_pass_then_training_pass_then_the_first_backward(module):
    """Statistics that the first pass used are changed by the second: right gradients or an error, as PyTorch's."""
    model = narrow(module, classes=None)
    wanted = gradients(copy.deepcopy(model).eval(), image())
    loss = scalar(model.eval()(image()))
    model.train()(image())
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified" in str(error)
    else:
        assert difference([p.grad for p in model.parameters()], wanted) < 1e-9


@MOSTLY_FAST
def test_hooks_of_parameters_fire_once(module):
    model = narrow(module)
    seen = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: seen.update([name]))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.update([name + " accumulated"]))
    gradients(model, image())
    assert set(seen.values()) == {1}
    assert len(seen) == 2 * len(list(model.parameters()))


@MOSTLY_FAST
def test_forward_hooks_fire_as_in_the_stored_model(module):
    def calls(model):
        seen = Counter()
        for name, m in model.named_modules():
            m.register_forward_hook(lambda *_, name=name: None if is_recomputing() else seen.update([name]))
        gradients(model, image())
        return seen

    found = calls(narrow(module))
    assert found == calls(narrow(revbifpn, reversible=False))
    assert "rev_stack.1.rev_transform_0" in found and "rev_stack.recomp_op" in found
    assert {"", "head", "stem", "rev_stack", "rev_stack.1", "rev_stack.2.f.xform_0_1"} <= found.keys()


@MOSTLY_FAST
def test_what_hooks_hold_is_not_overwritten(module):
    model = narrow(module)
    held = []
    for m in (model.stem, model.rev_stack.blocks[0].rev_transform_0.f.xform_0_1):
        m.register_forward_hook(lambda _, x, y: None if is_recomputing() else held.append((y, y.clone())))
    gradients(model, image())
    assert len(held) == 2
    assert all(torch.equal(y, copied) for y, copied in held)


@MOSTLY_FAST
def test_own_stem_keeps_its_output(module):
    """A stem that autograd or the caller reads later must not be overwritten in place."""

    class SavingStem(nn.Module):
        def __init__(self, stem):
            super().__init__()
            self.stem, self.gain = stem, nn.Parameter(torch.ones(48, 1, 1, dtype=F64))

        def forward(self, x):
            return torch.sigmoid(self.stem(x) * self.gain)  # sigmoid's gradient reads its output

    def run(model):
        model.stem = SavingStem(model.stem)
        return gradients(model, image())

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_replaced_head_is_used(module):
    model = narrow(module)
    model.head = nn.Identity()
    pyramid = model(image())
    assert [tuple(level.shape) for level in pyramid] == [(2, 16, 16 >> i, 16 >> i) for i in range(4)]
    model.head = None
    assert difference(model(image()), pyramid) < 1e-12


@MOSTLY_FAST
@pytest.mark.parametrize("where", ["head.fc", "rev_stack.1.rev_transform_0.f.xform_0_1.dw_conv.conv"])
def test_patched_forward_of_a_layer_is_called(module, where):
    """Running statistics tell a scaled layer from the original, where a norm of the batch would undo the scale."""

    def run(model):
        model.eval()
        layer = model.get_submodule(where)
        original, unchanged = layer.forward, model(image())
        layer.forward = lambda x: 2 * original(x)
        patched = model(image())
        assert difference([patched], [unchanged]) > 1e-6
        return [patched]

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_changed_convolution_is_called(module):
    """Another padding and dilation, same output size: kernels must not assume what the constructor made."""

    def run(model):
        for name in ("rev_stack.1.rev_transform_0.f.xform_0_1", "rev_stack.4.f.xform_0_1"):
            conv = model.get_submodule(name).dw_conv.conv
            conv.padding, conv.dilation = tuple(2 * p for p in conv.padding), (2, 2)
        return gradients(model, image())

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_weight_tying(module):
    def run(model):
        blocks = model.rev_stack.blocks
        blocks[2].rev_transform_0 = blocks[0].rev_transform_0
        return gradients(model, image())

    assert_same_as_stored(module, run, stochastic_depth=0.3)


@MOSTLY_FAST
def test_replaced_blocks_and_transforms_are_used(module):
    def run(model):
        setattr(model.rev_stack, "1", narrow(module, seed=9).rev_stack.blocks[0])
        torch.manual_seed(4)
        transform = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()).double()
        model.rev_stack.blocks[2].rev_transform_1.f.xform_0_1 = transform
        return gradients(model, image())

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_parametrised_layers(module):
    def run(model):
        torch.manual_seed(6)
        for m in list(model.rev_stack.blocks[0].modules()):
            if isinstance(m, nn.Conv2d):
                nn.utils.parametrizations.spectral_norm(m)
        return gradients(model.double(), image())

    assert_same_as_stored(module, run)


@MOSTLY_FAST
def test_copies_after_a_step(module):
    model = narrow(module)
    wanted = gradients(model, image())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert difference(gradients(twin, image()), wanted) < 1e-12


@MOSTLY_FAST
def test_functional_call_gives_gradients_to_the_substitutes(module):
    model, other = narrow(module), narrow(revbifpn, seed=7, reversible=False)
    substitutes = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    scaled = {name: 2 * p for name, p in substitutes.items()}  # not leaves
    scalar(torch.func.functional_call(model, scaled, (image(),))).backward()
    scalar(torch.func.functional_call(other, {n: 2 * p for n, p in other.named_parameters()}, (image(),))).backward()
    assert all(p.grad is None for p in model.parameters())
    assert difference([p.grad for p in substitutes.values()], [p.grad for p in other.parameters()]) < 1e-9


@MOSTLY_FAST
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("off", mostly_slow([{}, {"disable_rev": True}, {"disable_recomp": True}]))
def test_no_graph_where_none_is_wanted(module, mode, training, off):
    model, twin = narrow(module, **off).train(training), narrow(revbifpn, reversible=False).train(training)
    with mode():
        logits = model(image())
    assert not logits.requires_grad and logits.grad_fn is None
    assert difference([logits], [twin(image()).detach()]) < 1e-9
    assert all(torch.allclose(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@MOSTLY_FAST
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_around_the_model(module, use_reentrant):
    model = narrow(module, stochastic_depth=0.3)
    x = image().requires_grad_()
    torch.manual_seed(2)
    scalar(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
    assert difference([p.grad for p in model.parameters()], stored_gradients(image(), stochastic_depth=0.3)) < 1e-9


@MOSTLY_FAST
@REVERSIBLE
def test_saved_tensor_hooks(module, reversible):
    model = narrow(module, reversible=reversible)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model, image())
    assert difference(found, stored_gradients(image())) < 1e-9


@MOSTLY_FAST
def test_anomaly_mode(module):
    with torch.autograd.set_detect_anomaly(True):
        found = gradients(narrow(module), image())
    assert difference(found, stored_gradients(image())) < 1e-9


@MOSTLY_FAST
def test_gradients_are_deterministic(module):
    assert difference(gradients(narrow(module), image()), gradients(narrow(module), image())) == 0.0


@MOSTLY_FAST
def test_partial_gradients_of_one_pass(module):
    """The neck of one level first, then the stack through another: the second must not see the first's gradient."""

    def run(model):
        pyramid = model(image())
        neck = list(model.neck.recomp_transform_0.parameters())
        stack = list(model.rev_stack.blocks[0].parameters())
        first = torch.autograd.grad(scalar(pyramid[0]), neck, retain_graph=True)
        return [*first, *torch.autograd.grad(scalar(pyramid[1]), stack)]

    assert_same_as_stored(module, run, classes=None)


@MOSTLY_FAST
def test_head_first_then_everything(module):
    def run(model):
        loss = scalar(model(image()))
        head = torch.autograd.grad(loss, list(model.head.parameters()), retain_graph=True)
        loss.backward()
        return [*head, *(p.grad for p in model.parameters())]

    assert_same_as_stored(module, run)


# What is refused --------------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    "options", [{}, {"head_channels": None}, {"classes": None}], ids=["head", "no neck", "pyramid"]
)


@MOSTLY_FAST
@SHAPES
@pytest.mark.parametrize("retain_graph", mostly_slow([True, False]))
def test_second_backward_is_an_error(module, options, retain_graph):
    loss = scalar(narrow(module, **options)(image()))
    loss.backward(retain_graph=retain_graph)
    with pytest.raises(RuntimeError, match="second time|second backward"):
        loss.backward()


@MOSTLY_FAST
@SHAPES
def test_backward_after_a_failed_backward_is_an_error(module, options):
    """The failed one left the streams between two couplings."""
    model = narrow(module, **options)
    layer = model.rev_stack.blocks[-1].g.xform_0_1[0].project_conv.conv  # of the last coupling
    handle = layer.register_full_backward_hook(lambda *_: 1 / 0)
    loss = scalar(model(image()))
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@MOSTLY_FAST
@pytest.mark.parametrize(
    "options", [{"head_channels": None, "classes": None}, {"classes": None}], ids=["streams", "pyramid"]
)
def test_backward_on_each_output_apart_is_an_error(module, options):
    outputs = narrow(module, **options)(image())
    outputs[0].sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        outputs[1].sum().backward()


@MOSTLY_FAST
@SHAPES
def test_double_backward_is_an_error(module, options):
    model = narrow(module, **options)
    loss = scalar(model(image()))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@MOSTLY_FAST
@pytest.mark.parametrize(
    "options", [{"head_channels": None, "classes": None}, {"classes": None}], ids=["streams", "pyramid"]
)
def test_output_changed_in_place_is_an_error_or_right(module, options):
    """Streams are read again by backward, so autograd must notice; the neck's maps are not."""
    model = narrow(module, **options)
    outputs = model(image())
    loss = outputs[1].relu_().sum() + outputs[3].sum()
    twin = narrow(revbifpn, reversible=False, **options)
    wanted = twin(image())
    (wanted[1].relu().sum() + wanted[3].sum()).backward()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert options["classes"] is None and "head_channels" in options
    else:
        assert difference([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()]) < 1e-9


@MOSTLY_FAST
@pytest.mark.parametrize("where", ["rev_stack.1", "rev_stack.recomp_op", "head.pyramid_heads.0"])
def test_weight_changed_in_place_is_an_error(module, where):
    model = narrow(module)
    loss = scalar(model(image()))
    with torch.no_grad():
        next(model.get_submodule(where).parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Lifetime ---------------------------------------------------------------------------------------


@MOSTLY_FAST
@SHAPES
@pytest.mark.parametrize("backward", mostly_slow([True, False]))
def test_streams_are_freed_without_the_cycle_collector(module, options, backward, passes):
    loss = scalar(narrow(module, **options)(image()))
    if backward:
        loss.backward()
        assert passes[0]().streams == [] and passes[0]().grads == [], "freed with the loss still alive"
    del loss
    assert [owner() for owner in passes] == [None]


@pytest.mark.slow
@MOSTLY_FAST
def test_live_memory_does_not_grow_over_steps(module):
    model = narrow(module, F32)
    kept = []
    for _ in range(4):
        gradients(model, image(F32))
        kept.append(sum(isinstance(t, torch.Tensor) for t in gc.get_objects()))
    assert kept[3] == kept[2] == kept[1]


@pytest.mark.slow
@MOSTLY_FAST
def test_compiled_model_agrees(module):
    """Tracing is what can go wrong here; the code that inductor generates is not under test."""
    model = narrow(module, **TWO_LEVELS)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert difference(gradients(compiled, image()), gradients(model, image())) < 1e-9


@MOSTLY_FAST
def test_optimizer_inside_backward(module):
    """Every gradient is applied and freed as it arrives; the result is that of an ordinary step."""
    models = [narrow(module) for _ in range(2)]
    nn.functional.cross_entropy(models[0](image()), torch.arange(len(image()))).backward()
    torch.optim.SGD(models[0].parameters(), lr=0.1).step()

    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in models[1].parameters()}
    held = []

    def apply_and_free(p):
        optimizers[p].step()
        p.grad = None
        held.append(sum(q.grad is not None for q in models[1].parameters()))

    for p in models[1].parameters():
        p.register_post_accumulate_grad_hook(apply_and_free)
    nn.functional.cross_entropy(models[1](image()), torch.arange(len(image()))).backward()
    assert max(held) == 0 and len(held) == len(optimizers)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
