"""Latent features: rare classes are rare, moved streams have the margins asked for, and the script runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[2] / "examples" / "latent_features.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("latent_features", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model(example):
    torch.manual_seed(0)
    return example.network(10).eval()


@pytest.fixture(scope="module")
def digits(example):
    return example.digits(few=6, seed=0)


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_rare_classes_have_few_training_images_and_as_many_test_images_as_others(example, name):
    if name == "textures":
        pytest.importorskip("skimage")
    data = example.DATA[name](few=5, seed=1)
    counts, tested = data.counts, torch.bincount(data.test_labels)
    assert [c for c in range(len(counts)) if counts[c] == 5] == list(data.rare)
    assert max(counts) > 100 and tested.max() - tested.min() <= 2
    assert data.images.shape[1:] == data.test_images.shape[1:] == (1, example.SIDE, example.SIDE)
    kept = {image.numpy().tobytes() for image in data.images}
    assert kept.isdisjoint(image.numpy().tobytes() for image in data.test_images)


def test_the_margin_is_positive_where_the_own_class_wins(example):
    logits, labels = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), torch.tensor([0, 1])
    assert example.margins(logits, labels).tolist() == [0.5, -2.0]


def test_hard_samples_are_those_with_the_smallest_margins(example, model, digits):
    hard = example.hard_samples(model, digits, share=0.1)
    margin = example.margins(example.logits_of(model, digits.images), digits.labels)
    easy = torch.ones(len(margin), dtype=torch.bool)
    easy[hard] = False
    assert len(hard) == len(margin) // 10 and margin[hard].max() <= margin[easy].min()


@pytest.mark.parametrize("target", [1.0, 0.0, -1.0])
def test_streams_move_to_the_margin_asked_for_each_sample_by_itself(example, model, digits, target, monkeypatch):
    monkeypatch.setattr(example, "NEWTON", 12)  # random weights respond weakly
    images, labels = digits.images[:8], digits.labels[:8]
    streams = example.features(model, images, labels, None)
    own = example.margins(example.classify(model, streams), labels)
    moved = example.move(model, streams, labels, torch.full((8,), target))
    found = example.margins(example.classify(model, moved), labels)
    assert ((found - target).abs() < 0.2 * (own - target).abs()).all()
    (alone, *_) = example.move(model, [y[3:4] for y in streams], labels[3:4], torch.tensor([target]))
    torch.testing.assert_close(alone[0], moved[0][3], rtol=0, atol=1e-2)


def test_streams_stand_for_their_image_and_moved_ones_for_another(example, model, digits):
    images, labels = digits.images[:8], digits.labels[:8]
    streams = example.features(model, images, labels, None)
    torch.testing.assert_close(model.inverse(streams), images, rtol=0, atol=1e-4)
    moved = example.move(model, streams, labels, torch.full((8,), -1.0))
    assert (model.inverse(moved) - images).abs().amax((1, 2, 3)).min() > 1e-3


def test_generated_features_lie_between_the_sample_and_the_boundary(example, model, digits):
    images, labels = digits.images[:64], digits.labels[:64]
    own = example.margins(example.logits_of(model, images), labels)
    made = example.features(model, images, labels, torch.Generator().manual_seed(0))
    assert not any(y.requires_grad for y in made)
    with torch.no_grad():
        found = example.margins(example.classify(model, made), labels)
    assert ((found > own.clamp(max=0) - 0.05) & (found < own.clamp(min=0) + 0.05)).float().mean() > 0.9
    assert (found - own).abs().mean() > 0.1


def test_the_script_ends_in_numbers_and_a_picture(example, tmp_path, monkeypatch):
    arguments = f"--data digits --output {tmp_path} --seeds 1 --steps 4 --batch 16 --few 4"
    monkeypatch.setattr("sys.argv", ["latent_features.py", *arguments.split()])
    example.main()
    rows = json.loads((tmp_path / "latent_features_digits.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(example.METHODS)
    assert all(0 <= row[name] <= 100 for row in rows for name in ("rare", "common", "balanced"))
    assert (tmp_path / "latent_features_digits.png").read_bytes()[:4] == b"\x89PNG"
