"""Hugging Face hub: what is saved makes the same model again; the converter; what is refused with which words."""

import dataclasses
import functools
import hashlib
import io
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from revbifpn import StreamFormat, fast, save_checkpoint
from revbifpn.checkpoints import CheckpointError
from revbifpn.configs import CONFIGS
from tests.networks import NARROW, identical, image, narrow

huggingface_hub = pytest.importorskip("huggingface_hub")
hub = pytest.importorskip("revbifpn.adapters.hub")

OTHER_ARGUMENTS = {
    "channels": (64, 32, 32, 16),
    "dwk": (3, 3, 5, 3),
    "dwkp": (0, 2, 0, 2),
    "inv_blk_rep": 2,
    "expand_ratios": (1, 2, 2, 1.5),
    "se_ratios": (0.25, 0.0, 0.125, 0.5),
    "num_ext_layers": 1,
    "stochastic_depth": 0.25,
    "upscale_mode": "nearest",
    "disable_recomp": True,
    "head_dwk": [5, 3, 3, 3],
    "head_expand_ratios": [2, 1, 2, 1],
    "head_dropout": 0.5,
    "norm_fn": nn.SyncBatchNorm,
    "norm_kwargs": {"eps": 1e-5, "momentum": 0.2},
    "act_fn": nn.SiLU,
    "se_sig_act": nn.Sigmoid,
    "stream": StreamFormat("fixed16", (9, 10, 8)),
    "retain_graph": True,
    "in_chans": 4,
    "pad": True,
}


def scrambled(model):
    """Every parameter and buffer has values of its own."""
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) / 2)
    return model


def make(cls=None, **options):
    return scrambled((cls or hub.RevBiFPN)(**(NARROW | options)))


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and identical(
        a.state_dict().values(), b.state_dict().values()
    )


@pytest.fixture
def saved(tmp_path):
    """The folder of ``make()``."""
    make().save_pretrained(tmp_path / "my model")
    return tmp_path / "my model"


@pytest.mark.parametrize("writer, reader", [("RevBiFPN", "PlainRevBiFPN"), ("PlainRevBiFPN", "RevBiFPN")])
def test_either_class_loads_what_the_other_saved_bit_for_bit(tmp_path, writer, reader):
    model = make(getattr(hub, writer)).eval()
    model.save_pretrained(tmp_path)
    loaded = getattr(hub, reader).from_pretrained(tmp_path)
    assert same(loaded, model) and not loaded.training
    x = image(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


def test_all_constructor_arguments_survive(tmp_path):
    model = make(**OTHER_ARGUMENTS)
    model.save_pretrained(tmp_path)
    loaded = hub.RevBiFPN.from_pretrained(tmp_path)
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in model.arguments.items()}
    assert loaded.arguments == as_lists
    assert as_lists | {name: OTHER_ARGUMENTS[name] for name in ("stream", "norm_kwargs", "act_fn")} == as_lists
    assert same(loaded, model) and str(loaded) == str(model)


def test_what_was_set_after_construction_is_what_is_saved(tmp_path):
    model = make(reversible=False)
    model.disable_rev, model.stream, model.head.fc = False, "fixed32", nn.Linear(32, 7)
    model.save_pretrained(tmp_path)
    loaded = hub.RevBiFPN.from_pretrained(tmp_path)
    assert (loaded.disable_rev, loaded.disable_recomp, loaded.stream.name) == (False, True, "fixed32")
    assert loaded.head.fc.out_features == 7 and same(loaded, model)


def test_a_pruned_pyramid_survives(tmp_path):
    model = make().eval()
    model.prune_intermediate_layers([0, 2])
    model.save_pretrained(tmp_path)
    loaded = hub.RevBiFPN.from_pretrained(tmp_path)
    assert same(loaded, model) and loaded.head is None
    with torch.no_grad():
        assert identical(loaded(image(torch.float32)), model(image(torch.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_survives(tmp_path, dtype):
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    assert same(hub.RevBiFPN.from_pretrained(tmp_path), model)
    model.head.float()
    if dtype is torch.bfloat16:
        with pytest.raises(ValueError, match=r"one dtype, got \['torch.bfloat16', 'torch.float32'\]"):
            model.save_pretrained(tmp_path)


def test_overrides_replace_saved_arguments_and_strict_false_loads_what_fits(saved):
    loaded = hub.RevBiFPN.from_pretrained(saved, stream="fixed16", reversible=False)
    assert loaded.stream.name == "fixed16" and loaded.disable_rev
    with pytest.warns(UserWarning, match="the checkpoint has 10 classes, the model 3"):
        tuned = hub.RevBiFPN.from_pretrained(saved, strict=False, classes=3)
    assert torch.equal(
        tuned.neck.get_parameter("recomp_transform_0.dw_conv.conv.weight"),
        make().neck.get_parameter("recomp_transform_0.dw_conv.conv.weight"),
    )
    with pytest.raises(CheckpointError, match="the checkpoint has 10 classes, the model 3"):
        hub.RevBiFPN.from_pretrained(saved, classes=3)


def test_weights_are_an_ordinary_safetensors_file_of_published_names(saved):
    state = safetensors.torch.load_file(saved / "model.safetensors")
    ordinary = fast.RevBiFPN(**NARROW)
    ordinary.load_state_dict(state)
    assert same(ordinary, make())


def test_layers_that_have_no_name_in_json_are_refused(tmp_path):
    model = hub.RevBiFPN(**NARROW, act_fn=functools.partial(nn.LeakyReLU, 0.2))
    with pytest.raises(ValueError, match=r"act_fn: expected .* a class of torch.nn.*save_checkpoint"):
        model.save_pretrained(tmp_path)


def test_a_head_without_classifier_is_refused(tmp_path):
    model = make()
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="head.fc: expected a Linear.*got Identity.*reset_classifier"):
        model.save_pretrained(tmp_path)
    model.reset_classifier(4)
    model.save_pretrained(tmp_path)
    assert same(hub.RevBiFPN.from_pretrained(tmp_path), model)


def test_a_wrong_argument_is_refused_as_by_the_ordinary_class():
    with pytest.raises(TypeError, match="chanels"):
        hub.RevBiFPN(chanels=[48, 64, 80, 160])
    with pytest.raises(ValueError, match="channels"):
        hub.RevBiFPN(channels=[47, 64, 80, 160])


@pytest.mark.parametrize(
    "content, match",
    [
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "expected an object, got list"),
        (b'{"hidden_size": 768, "model_type": "bert"}', "no arguments of RevBiFPN: hidden_size, model_type"),
        (b'{"act_fn": "torch.nn.functional"}', "expected a layer of torch.nn, got 'torch.nn.functional'"),
        (b'{"dtype": "int8"}', "floating-point dtype"),
        (b'{"out_levels": "all"}', "out_levels: expected a list of integers, got 'all'"),
    ],
)
def test_a_damaged_or_foreign_config_is_named(saved, content, match):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        hub.RevBiFPN.from_pretrained(saved)
    assert str(saved / "config.json") in str(caught.value)


def test_damaged_and_missing_files_are_named(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated, damaged"):
        hub.RevBiFPN.from_pretrained(saved)
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
            hub.RevBiFPN.from_pretrained(saved)


def test_from_pretrained_reads_a_repository(saved, monkeypatch):
    asked = []

    def download(repository, file, *, revision, **options):
        asked.append((repository, file, revision))
        return str(saved / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert same(hub.RevBiFPN.from_pretrained("someone/model", revision="v2"), make())
    assert asked == [("someone/model", "config.json", "v2"), ("someone/model", "model.safetensors", "v2")]


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    loaded = []

    def create_repo(self, repo_id, **options):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **options):
        assert sorted(path.name for path in folder_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        loaded.append(hub.RevBiFPN.from_pretrained(folder_path))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    model = make()
    assert model.push_to_hub("someone/model") == "https://hub/someone/model"
    assert same(loaded[0], model)


def test_a_loaded_model_trains_to_the_gradients_of_the_ordinary_one(tmp_path):
    model = hub.RevBiFPN(**NARROW).double()
    model.load_state_dict(narrow(fast).state_dict())
    model.save_pretrained(tmp_path)
    loaded, ordinary, x = hub.RevBiFPN.from_pretrained(tmp_path).train(), narrow(fast), image()
    for each in (loaded, ordinary):
        each(x).square().sum().backward()
    assert identical([p.grad for p in loaded.parameters()], [p.grad for p in ordinary.parameters()])


def test_card_of_own_weights_claims_no_license_and_no_accuracy(saved):
    data = huggingface_hub.ModelCard.load(saved / "README.md").data
    assert data.library_name == "revbifpn-fast" and data.pipeline_tag == "image-classification"
    assert data.license is None and not data.eval_results


# Converter --------------------------------------------------------------------------------------


@functools.cache
def s0_model_and_bytes():
    """A file as the published one of S0, with values of its own."""
    model, file = scrambled(fast.revbifpn_s0()), io.BytesIO()
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, file)
    return model, file.getvalue()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """That file, whose hash counts as the published one, and its model."""
    model, content = s0_model_and_bytes()
    path = tmp_path / "revbifpn_s0.pth.tar"
    path.write_bytes(content)
    config = dataclasses.replace(CONFIGS["revbifpn_s0"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(CONFIGS, "revbifpn_s0", config)
    return path, model


def test_converter_makes_a_folder_with_published_values_and_a_card(published, tmp_path, capsys):
    path, model = published
    hub.main(["convert", str(path), "--arch", "revbifpn_s0", "--output", str(tmp_path / "s0")])
    assert "README.md, config.json, model.safetensors" in capsys.readouterr().out
    assert same(hub.RevBiFPN.from_pretrained(tmp_path / "s0"), model)
    card = huggingface_hub.ModelCard.load(tmp_path / "s0" / "README.md")
    assert card.data.license == "bsd-3-clause" and card.data.datasets == ["imagenet-1k"]
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", 72.8)]
    assert CONFIGS["revbifpn_s0"].sha256 in card.text and "2206.14098" in card.text
    assert "RevBiFPN.from_pretrained" in card.text


@pytest.mark.parametrize(
    "damage, arguments, match",
    [
        (lambda b: b[:-1], ["--arch", "revbifpn_s0"], "wrong sha256"),
        (lambda b: b[: len(b) // 2], ["--arch", "revbifpn_s0", "--unpublished"], "truncated, damaged"),
        (lambda b: b, ["--arch", "revbifpn_s1"], "wrong sha256"),
        (lambda b: b, ["--arch", "revbifpn_s1", "--unpublished"], "of revbifpn_s0, the model is revbifpn_s1"),
        (lambda b: b, ["--arch", "revbifpn_s0", "--unpublished", "--classes", "10"], "has 1000 classes, the model 10"),
        (lambda b: b"", ["--arch", "revbifpn_s0", "--unpublished"], "the file is empty"),
    ],
)  # fmt: skip
def test_converter_says_in_one_line_what_does_not_fit_and_writes_nothing(
    published, tmp_path, capsys, damage, arguments, match
):
    path, _ = published
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit) as caught:
        hub.main(["convert", str(path), *arguments, "--output", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert caught.value.code == 1 and match in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_keys_are_listed(published, tmp_path):
    path, model = published
    state = model.state_dict()
    del state["head.fc.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing names in head\.fc: head\.fc\.bias"):
        hub.convert(path, "revbifpn_s0", tmp_path / "out", published=False)


@pytest.mark.slow
def test_own_training_converts_without_claims(tmp_path):
    model = scrambled(fast.revbifpn_s0(classes=3))
    save_checkpoint(model, tmp_path / "best.safetensors")
    folder = hub.convert(tmp_path / "best.safetensors", "revbifpn_s0", tmp_path / "out", published=False, classes=3)
    assert same(hub.RevBiFPN.from_pretrained(folder), model)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert "revbifpn_s0" in card.text and not card.data.eval_results
    assert json.loads((folder / "config.json").read_text())["classes"] == 3
