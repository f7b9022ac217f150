"""benchmarks/detection_memory.py: a step without arithmetic has the bytes of a real one; tables, files and plots."""

import json

import pytest
import torch

from tests.adapters import frameworks
from tests.marks import slow

frameworks.torchvision("torchvision.models.detection")
pytest.importorskip("matplotlib")
from benchmarks import detection_memory  # noqa: E402
from benchmarks.harness import detectors  # noqa: E402
from benchmarks.harness.detectors import FASTER, MASK, RETINA, STATISTICS, Candidate  # noqa: E402

CASES = [
    (FASTER, "revbifpn_s0", "fast"),
    *slow(
        [
            (FASTER, "resnet50", "stored"),
            (FASTER, "resnet50", "checkpointed"),
            (FASTER, "hrnet_w18", "heads recomputed"),
            (FASTER, "hrnet_w18", "checkpointed"),
            (FASTER, "revbifpn_s0", "reversible"),
            (MASK, "revbifpn_s0", "fast"),
            (RETINA, "revbifpn_s0", "fast"),
        ]
    ),
]


@pytest.fixture
def small(monkeypatch):
    """Images of 256 x 320, in which there are 512 anchors to propose."""
    for name in detectors.SIZES:
        monkeypatch.setitem(detectors.SIZES, name, (256, 320))


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case) if isinstance(case, tuple) else None)
def test_a_step_without_arithmetic_has_the_bytes_of_a_real_one(small, case):
    candidate, found = Candidate(*case), []
    for real in (True, False):
        model = detectors.make(candidate, STATISTICS)
        torch.manual_seed(2)
        found.append(detection_memory.step(candidate, model, 1, real))
    assert found[0] == found[1]
    parts = [found[0][f"{part}_bytes"] for part in detection_memory.PARTS]
    assert sum(parts) == found[0]["peak_bytes"] and all(parts)


@pytest.mark.slow
def test_tables_raw_results_and_plots_are_written(small, tmp_path, capsys):
    chosen = "revbifpn_s0/fast,resnet50/checkpointed"
    assert detection_memory.main(["--models", chosen, "--size", "256x320", "--output", str(tmp_path)]) == 0
    assert "largest batch" in capsys.readouterr().out
    rows = json.loads((tmp_path / "detection_memory_cpu_256x320.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["fast", "checkpointed"]
    assert all(row["per_image_bytes"] > 0 and row["published_ap"] for row in rows)
    written = {path.suffix for path in tmp_path.iterdir()}
    assert written == {".json", ".csv", ".png"} and (tmp_path / "detection_parts_cpu_256x320.png").exists()


def test_a_run_goes_on_with_the_rows_of_its_commit(tmp_path, monkeypatch, capsys):
    environment, calls = detection_memory.results.environment(torch.device("cpu")), []

    def measure(c, norms, real):
        calls.append(c.key)
        names = ("peak", "kept", "backbone", "FPN", "heads", "gradient", "two_images", "per_image", "parameter")
        return {
            **{"detector": c.detector, "model": c.model, "variant": c.variant},
            **{f"{name}_bytes": 2**20 for name in names},
            **{"published_ap": 30.0, "published_gb": 1.0},
        }

    def run(models, commit):
        calls.clear()
        monkeypatch.setattr(detection_memory.results, "environment", lambda _: environment | {"commit": commit})
        assert detection_memory.main(["--models", models, "--resume", "--output", str(tmp_path)]) == 0
        rows = json.loads((tmp_path / "detection_memory_cpu.json").read_text())["rows"]
        return list(calls), [f"{row['model']}/{row['variant']}" for row in rows]

    monkeypatch.setattr(detection_memory, "measure", measure)
    assert run("resnet50/stored", "a") == (["resnet50/stored"], ["resnet50/stored"])
    both = ["revbifpn_s0/fast", "resnet50/stored"]
    assert run("revbifpn_s0/fast,resnet50/stored", "a") == (both[:1], both)
    assert "s0 x " in capsys.readouterr().out  # the largest network that fits
    assert run("resnet50/stored", "b") == (both[1:], both[1:])
    assert run("resnet50/stored", "b-dirty") == (both[1:], both[1:])
    assert run("resnet50/stored", "b-dirty") == (both[1:], both[1:])


@pytest.mark.parametrize("size", ["800", "100x200", "320x256"])
def test_a_size_that_does_not_fit_is_named(size, tmp_path, capsys):
    assert detection_memory.main(["--size", size, "--output", str(tmp_path)]) == 2
    assert f"--size: got '{size}'" in capsys.readouterr().err
