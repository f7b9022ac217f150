"""The benchmarks of dual-residual networks write what they print, and add to it."""

import json

import pytest

from benchmarks import dual_residual, dual_residual_digits, dual_residual_text
from benchmarks.harness import finetuning
from tests.adapters.frameworks import on_torchvision

pytestmark = pytest.mark.slow


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_runs_of_fine_tuning_are_added_to_those_of_the_same_settings(tmp_path):
    def run(*arguments):
        options = ["--pretrain", "1", "--epochs", "1", "--output", str(tmp_path)]
        assert dual_residual_digits.main([*options, *arguments]) == 0
        return [(row["way"], row["seed"]) for row in rows_of(tmp_path / "dual_residual_digits_cpu.json")]

    first = run("--seeds", "0", "--ways", "ordinary")
    assert first == [("ordinary", 0), ("ordinary", "mean")]
    both = run("--seeds", "0", "--ways", "int32 k=7", "--add")
    assert both == [("ordinary", 0), ("int32 k=7", 0), ("ordinary", "mean"), ("int32 k=7", "mean")]
    assert (tmp_path / "dual_residual_digits_cpu.png").exists()


def test_means_are_compared_with_the_ordinary_one():
    rows = [finetuning.Row(way, seed, 90.0 + 2 * seed + (way != "ordinary"), 0.5) for seed in (0, 1) for way in
            ("ordinary", "int32 k=7")]  # fmt: skip
    ordinary, exact = finetuning.means(rows)
    assert (ordinary.test_accuracy, ordinary.difference, exact.difference) == (91.0, 0.0, 1.0)
    assert exact.deviation == pytest.approx(2**0.5)


def test_a_missing_archive_and_a_bad_seed_are_one_line(tmp_path, capsys):
    assert dual_residual_text.main(["--data", str(tmp_path / "none.zip")]) == 2
    assert "get it with: pip download --no-deps vaderSentiment==0.5" in capsys.readouterr().err
    assert dual_residual_digits.main(["--seeds", "a"]) == 2
    assert "--seeds: expected numbers" in capsys.readouterr().err


def test_memory_of_the_ways_to_train(tmp_path):
    on_torchvision("timm")
    ways = ["--ways", "checkpointed,int32 k=1", "--models", "vit_small*/224", "--dtypes", "float32"]
    assert dual_residual.main([*ways, "--memory", "--output", str(tmp_path)]) == 0
    checkpointed, exact = rows_of(tmp_path / "dual_residual_memory.json")
    assert exact["kept_ratio"] == exact["kept_bytes"] / checkpointed["kept_bytes"] < 0.26
    assert exact["peak_ratio"] < 0.85
