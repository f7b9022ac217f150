"""The first training that the page Start shows."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits.py"

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_training_ends_with_its_memory_and_a_picture(example, monkeypatch, tmp_path, capsys):
    few = [tensor[:80] for tensor in example.digits(64)]
    monkeypatch.setattr(example, "digits", lambda size: few)
    monkeypatch.setattr(example, "TRAINED", 64)
    monkeypatch.setattr(
        "sys.argv", ["train_digits.py", "--epochs=1", "--batch=16", f"--plot={tmp_path / 'digits.png'}"]
    )
    example.main()
    text = capsys.readouterr().out
    assert "epoch 1: loss " in text and "activations recomputed, a step needs " in text
    assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
