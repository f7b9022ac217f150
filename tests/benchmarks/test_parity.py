"""The parity benchmark: its images, its training, its files, and what was measured with it."""

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import parity_digits as parity

CPU = torch.device("cpu")
NARROW = {"channels": (48, 8, 8, 8), "num_ext_layers": 0, "head_channels": (8, 8, 8, 8), "fc_features": 8}


@pytest.fixture
def small(monkeypatch):
    """Noise for images, and a network that takes no time."""
    monkeypatch.setattr(parity, "NETWORK", parity.NETWORK | NARROW)
    images = torch.randn(36, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(36) % 10
    digits = parity.Digits(images[:24], labels[:24], images[24:], labels[24:])
    monkeypatch.setattr(parity.Digits, "load", lambda device: digits)
    return digits


def test_every_fifth_image_of_a_class_is_for_testing():
    pytest.importorskip("sklearn")
    digits = parity.Digits.load(CPU)
    assert digits.images.shape == (1442, 3, 64, 64) and digits.test_images.shape == (355, 3, 64, 64)
    for labels, total in ((digits.labels, 1442), (digits.test_labels, 355)):
        assert all(abs(n - total / 10) < 5 for n in labels.bincount().tolist())
    assert abs(digits.images.mean()) < 1e-3 and abs(digits.images.std() - 1) < 1e-3


@pytest.mark.parametrize("variant", [v for v in parity.VARIANTS.values() if v.reversible], ids=lambda v: v.name)
def test_reversible_training_ends_with_the_weights_of_stored_training(small, variant):
    """Bit for bit, statistics of the norms included."""
    found, wanted = (
        parity.train(replace(variant, reversible=reversible), seed=1, digits=small, epochs=3, batch=8)
        for reversible in (True, False)
    )
    assert found[1] == wanted[1]
    for (name, a), b in zip(found[0].state_dict().items(), wanted[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_variants_start_from_the_same_weights(small):
    models = [parity.train(v, seed=1, digits=small, epochs=1, batch=24) for v in parity.VARIANTS.values()]
    losses = [loss for _, loss in models]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.01)
    assert len(set(losses)) == len(losses), "they do compute in different ways"


def test_quick_run_writes_every_run_and_the_means(small, tmp_path, capsys):
    assert parity.main(["--quick", "--batch", "8", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "Training parity on handwritten digits" in capsys.readouterr().out
    rows = json.loads((tmp_path / "parity_digits_cpu_quick.json").read_text())["rows"]
    assert [(r["variant"], r["seed"]) for r in rows] == [(v, s) for v in parity.VARIANTS for s in (0, "mean")]
    for run, mean in zip(rows[::2], rows[1::2], strict=True):
        assert run["test_accuracy"] == mean["test_accuracy"]
        assert mean["difference"] == pytest.approx(mean["test_accuracy"] - rows[1]["test_accuracy"])
    with (tmp_path / "parity_digits_cpu_quick.csv").open() as file:
        assert {line["metric"] for line in csv.DictReader(file)} == set(parity.UNITS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "float16"], "--variants: 'float16' is unknown; choose from float32, fixed32, fixed16"),
        (["--epochs", "0"], "--epochs: got 0, needs at least 1"),
        (["--batch", "25"], "--batch: got 25, needs 2 to 24, the images for training"),
    ],
)
def test_usage_errors_are_one_line(small, tmp_path, capsys, arguments, message):
    assert parity.main(["--device", "cpu", "--output", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_missing_scikit_learn_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert parity.main(["--device", "cpu", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: scikit-learn is not installed: pip install scikit-learn\n"


def test_differences_of_means_are_to_the_stored_float32_run():
    def run(variant, seed, accuracy, largest):
        return parity.Row(variant, seed, variant, True, "float32", accuracy, 0.5, largest, 1.0)

    accuracies = {"float32": (98.0, 97.0), "fixed32": (98.0, 97.5), "fixed16": (90.0, 92.0)}
    rows = [run(v, seed, a, 2.0 + seed) for v, found in accuracies.items() for seed, a in enumerate(found)]
    assert [(r.variant, r.difference) for r in parity.means(rows)] == [
        ("float32", 0),
        ("fixed32", 0.25),
        ("fixed16", -6.5),
    ]
    assert {(r.seed, r.largest_value) for r in parity.means(rows)} == {("mean", 3.0)}
    assert [r.difference for r in parity.means([r for r in rows if r.variant != "float32"])] == [None, None]
