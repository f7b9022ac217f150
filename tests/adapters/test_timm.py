"""timm makes the models, and finds in them what its own tests ask of every model."""

import dataclasses
import hashlib
import math
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from revbifpn import checkpoints, configs, fast, save_checkpoint
from revbifpn.fused import why_not_fused
from revbifpn.mbconv import MBConv
from revbifpn.memory import measure_sample
from tests.adapters import frameworks
from tests.marks import slow
from tests.networks import F32, NARROW, identical, scalar

timm = frameworks.on_torchvision("timm")
optim = pytest.importorskip("timm.optim")
layers = pytest.importorskip("timm.layers.norm_act")
adapter = pytest.importorskip("revbifpn.adapters.timm")
create_model = timm.create_model

SMALL = {name: value for name, value in NARROW.items() if name not in ("classes", "head_dropout")}

SCALES = pytest.mark.parametrize("arch", ["revbifpn_s0", *slow(["revbifpn_s3"])])
FUSED = pytest.mark.parametrize("fused", [True, *slow([False])])


def images(n=2, size=64, c=3, dtype=F32):
    return torch.randn(n, c, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def small(**options):
    """A few narrow layers by the name of S0."""
    return create_model("revbifpn_s0", **(SMALL | options))


@pytest.fixture(scope="module")
def ordinary():
    torch.manual_seed(0)
    return fast.RevBiFPN(**SMALL, head_dropout=0.0, classes=1000)


@pytest.fixture(scope="module")
def weights(ordinary, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "revbifpn_s0.pth.tar"
    save_checkpoint(ordinary, path)
    return path


def from_file(path, **options):
    return small(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)


# What timm's own tests ask of every model -------------------------------------------------------


def test_all_scales_are_there_with_their_weights():
    assert timm.list_models("revbifpn*") == sorted(configs.CONFIGS)
    assert timm.list_pretrained("revbifpn*") == [f"{arch}.cerebras_in1k" for arch in sorted(configs.CONFIGS)]
    assert not adapter.RevBiFPN.__init__.__doc__  # one description, of TimmModel


@SCALES
@FUSED
def test_every_parameter_gets_a_gradient(arch, fused):
    model = create_model(arch, num_classes=42, fused=fused).train()
    logits = model(images())
    logits.mean().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


@SCALES
def test_the_configuration_is_that_of_the_model(arch):
    model = create_model(arch).eval()
    cfg, config = model.default_cfg, configs.CONFIGS[arch]
    assert cfg is model.pretrained_cfg and cfg["url"] == config.url
    assert cfg["input_size"] == (3, config.resolution, config.resolution)
    assert (cfg["mean"], cfg["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    assert (model.num_classes, model.in_chans, model.num_features) == (1000, 3, config.fc_features)
    names, x = model.state_dict().keys(), torch.randn(1, *cfg["input_size"])
    assert cfg["classifier"] + ".weight" in names and all(name + ".weight" in names for name in cfg["first_conv"])
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0 and model(x).shape == pooled.shape
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)


@pytest.mark.parametrize("pool", ["avg", "catavgmax", *slow(["max", "avgmax", "fast"])])
def test_poolings_are_timms(pool):
    model = small(num_classes=5, global_pool=pool)
    assert model(images()).shape == (2, 5)
    assert (
        model.head_hidden_size
        == (2 if pool == "catavgmax" else 1) * model.num_features
        == model.get_classifier().in_features
    )
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, model.num_features, 2, 2)
    model.reset_classifier(7, pool)
    assert model(images()).shape == (2, 7) and model.num_classes == 7


def test_a_model_without_classifier_or_pooling_is_made_as_such():
    assert small(num_classes=0)(images()).shape == (2, 32)
    assert small(num_classes=0, global_pool="")(images()).shape == (2, 32, 2, 2)
    with pytest.raises(ValueError, match="global_pool: expected a pooling before a classifier"):
        small(global_pool="")


@SCALES
def test_features_have_the_channels_and_sizes_that_they_promise(arch):
    model = create_model(arch, features_only=True).eval()
    info, maps = model.feature_info, model(images(size=96))
    assert info.reduction() == [4, 8, 16, 32] and info.channels() == configs.CONFIGS[arch].head_channels
    assert [tuple(y.shape) for y in maps] == [
        (2, c, math.ceil(96 / r), math.ceil(96 / r)) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert all(dict(model.model.named_modules())[name] for name in info.module_name())


@SCALES
def test_intermediates_are_the_features(arch):
    model = create_model(arch).eval()
    x = images()
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        only = model.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
        torch.testing.assert_close(features, model.forward_features(x))
    torch.testing.assert_close(only, [maps[3], maps[0]])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")
    for indices in ([4], 5, []):
        with pytest.raises(ValueError, match="indices: expected levels out of"):
            model.forward_intermediates(x, indices=indices)


@SCALES
def test_gradient_checkpointing_is_recomputation_and_changes_no_output(arch):
    model, x = create_model(arch).eval(), images()
    assert model.grad_checkpointing
    recomputed = model(x)
    model.set_grad_checkpointing(False)
    assert model.disable_rev and model.disable_recomp
    torch.testing.assert_close(model(x), recomputed, rtol=1e-4, atol=1e-5)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing and not model.disable_recomp


def test_an_unknown_argument_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'widen'"):
        create_model("revbifpn_s0", widen=2)


# Features own nothing that they do not need -----------------------------------------------------


@pytest.mark.parametrize("fused", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("indices", [None, (0,), *slow([(1,), (3,), (0, 2), (3, 1), 2])], ids=str)
def test_features_are_those_of_the_whole_model_and_every_parameter_gets_a_gradient(ordinary, fused, indices):
    options = {} if indices is None else {"out_indices": indices}
    model = small(features_only=True, fused=fused, **options)
    assert model.model.head is None
    found = model.model.load_state_dict(ordinary.state_dict(), strict=False)
    assert not found.missing_keys
    maps = model(images())
    wanted = ordinary.forward_intermediates(images(), indices=indices, intermediates_only=True)
    torch.testing.assert_close(maps, wanted, rtol=1e-3, atol=1e-4)
    scalar(maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_maps_that_were_left_out_are_refused():
    model = small(features_only=True, out_indices=(1, 2)).model
    assert [tuple(y.shape[1:]) for y in model(images())] == [(16, 8, 8), (16, 4, 4)]
    assert model.num_classes == 0 and model.num_features == 16
    with pytest.raises(ValueError, match=r"indices: expected levels out of \[1, 2\].*got \[0\]"):
        model.forward_intermediates(images(), indices=[0])
    with pytest.raises(ValueError, match="has no head"):
        model.reset_classifier(10)


def test_other_ways_to_take_features_are_refused():
    with pytest.raises(ValueError, match="feature_cls: expected 'getter', got 'hook'"):
        create_model("revbifpn_s0", features_only=True, feature_cls="hook")


# The network is the ordinary one ----------------------------------------------------------------


@pytest.mark.slow
@SCALES
def test_gradients_and_memory_are_those_of_the_ordinary_model(arch):
    ordinary, model = getattr(fast, arch)(head_dropout=0.0, stochastic_depth=0.0), create_model(arch)
    model.load_state_dict(ordinary.state_dict())
    gradients = [torch.autograd.grad(scalar(m.train()(images())), m.parameters()) for m in (model, ordinary)]
    assert identical(*gradients)
    memory = [measure_sample(m, (3, 64, 64), batch=2) for m in (model, ordinary)]
    assert memory[0] == memory[1]


def test_arguments_of_the_network_are_taken():
    model = small(in_chans=1, pad=True, stream="fixed32", drop_rate=0.1, drop_path_rate=0.2)
    assert model.stream.name == "fixed32" and model.in_chans == 1
    assert model.drop_rate == model.head.dropout.p == 0.1
    depths = {m.stochastic_depth for m in model.modules() if hasattr(m, "stochastic_depth")}
    assert max(depths) == pytest.approx(0.2)
    maps = small(features_only=True, in_chans=1, pad=True)(torch.randn(2, 1, 45, 70))
    assert [tuple(y.shape[-2:]) for y in maps] == [(12, 18), (6, 9), (3, 5), (2, 3)]
    wide = small(in_chans=4, channels=[64, 16, 16, 16], num_classes=2)
    assert wide(images(c=4)).shape == (2, 2)
    on_meta = create_model("revbifpn_s1", in_chans=4, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", torch.float64)}


# Weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"num_classes": 0, "in_chans": 1}], ids=str)
def test_a_file_of_weights_is_adapted_to_classes_and_channels(ordinary, weights, options):
    model, wanted = from_file(weights, **options), ordinary.state_dict()
    loaded = {name: value for name, value in model.state_dict().items() if options == {} or "head.fc" not in name}
    assert len(loaded) >= len(wanted) - 2
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.items())


def test_a_file_of_weights_is_adapted_to_features_and_taken_as_a_checkpoint(ordinary, weights, tmp_path):
    with torch.no_grad():
        wanted = ordinary.eval().forward_intermediates(images(), intermediates_only=True)
        torch.testing.assert_close(from_file(weights, features_only=True).eval()(images()), wanted)
        safetensors = tmp_path / "s0.safetensors"
        save_checkpoint(ordinary, safetensors)
        model = small(checkpoint_path=str(safetensors))
        assert torch.equal(model.eval()(images()), ordinary(images()))


@pytest.fixture
def published(weights, tmp_path, monkeypatch):
    """The published file of S0 in the cache, with values of our own."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = shutil.copy(weights, directory / "revbifpn_s0.pth.tar")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = dataclasses.replace(configs.CONFIGS["revbifpn_s0"], sha256=sha256)
    monkeypatch.setitem(configs.CONFIGS, "revbifpn_s0", config)
    return path


def test_published_weights_are_verified_and_loaded(ordinary, published):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("revbifpn_s0.cerebras_in1k", pretrained=True, **SMALL)
    assert identical(model.state_dict().values(), ordinary.state_dict().values())
    small(pretrained=True, features_only=True, in_chans=1)
    with pytest.warns(UserWarning, match="the checkpoint has 1000 classes, the model 5; only head.fc"):
        small(pretrained=True, num_classes=5)
    with published.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(checkpoints.CheckpointError, match="wrong sha256"):
        small(pretrained=True)


def test_a_download_that_fails_says_where_the_file_goes(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(checkpoints.CheckpointError, match=f"{tmp_path}.*put the file there by hand"):
        small(pretrained=True, cache_dir=tmp_path)


def test_a_model_that_timm_saved_is_made_again(tmp_path):
    model = small(num_classes=3, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images(c=1)), model(images(c=1)))


# Training utilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("coarse, groups", [(False, 15 + 3), (True, 5 + 3)])
def test_parameters_are_grouped_by_depth(coarse, groups):
    model = create_model("revbifpn_s0")
    found = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(found.values()) == set(range(groups)) and found.keys() == dict(model.named_parameters()).keys()
    order = ["rev_stack.1.", "rev_stack.3.", "rev_stack.15.", "rev_stack.recomp_op.", "head.final_conv.", "head.fc."]
    depths = [{depth for name, depth in found.items() if name.startswith(prefix)} for prefix in order]
    assert all(len(depth) == 1 for depth in depths)
    depths = [depth.pop() for depth in depths]
    assert depths == sorted(depths) and len(set(depths)) == len(order) - coarse


def test_layer_decay_gives_deeper_layers_larger_steps():
    model = create_model("revbifpn_s0")
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    first, last = next(model.rev_stack.children()), model.get_classifier()
    assert len(set(scale.values())) == 18
    assert scale[id(next(first.parameters()))] == 0.5**17 and scale[id(last.weight)] == 1
    assert model.no_weight_decay() == set()


def test_timms_frozen_norms_compute_what_freeze_norms_does_on_fused_kernels():
    frozen, model = small(num_classes=3).train(), small(num_classes=3).train()
    frozen.load_state_dict(model.state_dict())
    frozen = layers.freeze_batch_norm_2d(frozen)
    found = frozen(images())
    assert all(why_not_fused(m, images()) == "" for m in frozen.modules() if isinstance(m, MBConv))
    torch.testing.assert_close(found, model.freeze_norms()(images()), rtol=1e-4, atol=1e-5)


def test_distributed_training_of_some_maps_finds_no_unused_parameters():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(small(features_only=True, out_indices=(1, 2)))
        for _ in range(2):  # the second forward complains of what had no gradient
            scalar(model(images())).backward()
    finally:
        dist.destroy_process_group()


def test_data_is_prepared_as_the_model_says():
    config = timm.data.resolve_model_data_config(small())
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
