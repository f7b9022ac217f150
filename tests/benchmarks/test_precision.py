"""The precision benchmark: what it compares, and its files."""

import json

import pytest
import torch

from benchmarks import precision


def test_a_difference_is_relative_to_what_is_expected():
    assert precision.difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(1 / 18**0.5)


def test_exact_streams_are_the_stored_ones_and_floats_under_autocast_are_not(tmp_path, capsys):
    assert precision.main(["--parts", "streams", "--output", str(tmp_path)]) == 0
    assert "Gradients and memory by streams" in capsys.readouterr().out
    rows = json.loads((tmp_path / "precision_cpu.json").read_text())["rows"]
    found = {(r["branches"], r["stream"], r["against"]): r["difference"] for r in rows}
    assert all(
        found[branches, stream, "stored"] == 0
        for branches in ("float32", "bfloat16")
        for stream in ("fixed32", "fixed16")
    )
    assert found["float32", "float32", "stored"] < 1e-5 < 1e-3 < found["bfloat16", "float32", "stored"]
    assert 0 < found["float32", "fixed32", "float32"] < found["float32", "fixed16", "float32"]
