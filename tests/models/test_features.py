"""A model in parts, as timm's are: features, head, classifier, and maps of some levels."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import revbifpn
from revbifpn import check_invertible, fast
from tests.marks import covering
from tests.networks import F32, F64, MODULES, MOSTLY_FAST, assert_same_as_stored, image, narrow, scalar


def gradients_of(model, outputs):
    """Of the parameters that the outputs depend on, the same ones in every model."""
    used = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(scalar(outputs), used, allow_unused=True)


@MODULES
def test_features_and_head_are_the_model(module):
    model, x = narrow(module).eval(), image()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(x)) and pooled.shape[1] == model.head_hidden_size
    assert torch.allclose(model.forward_features(x[0]), features[0])
    assert (model.num_classes, model.in_chans) == (10, 3)


@MODULES
def test_maps_are_those_of_the_model_without_head(module):
    model, backbone, x = narrow(module).eval(), narrow(module, classes=None).eval(), image()
    assert not backbone.load_state_dict(model.state_dict(), strict=False).missing_keys
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(maps, backbone(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features, model.forward_features(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(backbone.forward_features(x), maps[-1], rtol=1e-9, atol=1e-9)
    assert [info["num_chs"] for info in model.feature_info] == [y.shape[1] for y in maps]
    assert [64 // info["reduction"] for info in model.feature_info] == [y.shape[2] for y in maps]


@pytest.mark.parametrize("classes", [10, None], ids=["classifier", "pyramid"])
def test_at_inference_features_and_maps_come_from_one_op(classes):
    model, plain = (narrow(module, F32, classes=classes).eval() for module in (fast, revbifpn))

    def outputs(model):
        found = [model(image(F32)), model.forward_features(image(F32))]
        return found if classes else [*found, model.forward_intermediates(image(F32), [2, 0], intermediates_only=True)]

    with torch.no_grad():
        torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-4, atol=1e-4)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            outputs(model)
    calls = {event.key: event.count for event in record.key_averages()}
    assert calls["revkernels::mbconv_infer_"] == (2 if classes else 3)
    assert not {"revkernels::mbconv", "revkernels::couple_"} & calls.keys()


@covering
@MOSTLY_FAST
@pytest.mark.parametrize("indices", [None, [1, 3], [0]], ids=str)
@pytest.mark.parametrize("only", [False, True], ids=["with features", "maps alone"])
def test_gradients_of_maps_are_those_of_the_stored_model(module, indices, only):
    def run(model):
        found = model.forward_intermediates(image(), indices, intermediates_only=only)
        return gradients_of(model, found if only else [found[0], *found[1]])

    assert_same_as_stored(module, run)


@covering
@MOSTLY_FAST
@pytest.mark.parametrize("indices", [[1], [3, 2], [0]], ids=str)
def test_a_pruned_model_is_a_reversible_network(module, indices):
    def run(model):
        assert model.prune_intermediate_layers(indices) == indices
        return gradients_of(model, model(image()))

    assert_same_as_stored(module, run)
    model = narrow(module)
    model.prune_intermediate_layers(indices)
    assert all(g is not None for g in gradients_of(model, model(image())))
    assert max(check_invertible(model.rev_stack, model.stem(image()))) < 1e-9
    with torch.no_grad():
        torch.testing.assert_close(model.eval().inverse(model.forward_streams(image())), image(), rtol=0, atol=1e-9)


def test_what_the_head_needs_is_kept():
    model = narrow(revbifpn)
    names = model.state_dict().keys()
    assert model.prune_intermediate_layers([0], prune_head=False) == [0]
    assert model.state_dict().keys() == names and model(image()).shape == (2, 10)


@MODULES
def test_a_classifier_is_replaced_in_its_place(module):
    model = narrow(module).eval()
    fc = model.get_classifier()
    model.reset_classifier(3)
    assert model(image()).shape == (2, 3) and model.num_classes == 3
    new = model.get_classifier()
    assert new is not fc and new.weight.dtype == F64 and not new.training
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
    assert model(image()).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(image()).shape == (2, model.num_features, 2, 2)
    with pytest.raises(ValueError, match="global_pool: expected a pooling before a classifier of 3 classes"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="global_pool: expected 'avg', or '' for none, got 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="it has no head; construct it with classes="):
        narrow(module, classes=None).reset_classifier(3)
