"""The table of docs/detection.md is that of benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.detection_memory import GIGABYTES, capacity
from benchmarks.harness.detectors import FASTER, LARGE, SIZES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "detection_memory_cpu.json"
MORE = RESULTS.with_stem("detection_memory_cpu_more")

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="the tests are not in a checkout")


def measured() -> dict:
    rows = [row for path in (RESULTS, MORE) for row in json.loads(path.read_text())["rows"]]
    return {(r["detector"], r["model"], r["variant"]): r for r in rows}


def test_the_table_of_detectors_is_what_was_measured():
    rows, text = measured(), (ROOT / "docs" / "detection.md").read_text()
    table = [line for line in text.splitlines() if line.startswith(tuple(f"| {name} |" for name in SIZES))]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(lines) >= 7
    for detector, model, variant, *cells in lines:
        row = rows[detector, model, variant]
        names = ("peak_bytes", "per_image_bytes", "two_images_bytes", "gradient_bytes")
        assert cells[:4] == [f"{row[name] / 2**20:.0f}" for name in names], f"{detector} {model} {variant}"


def test_the_table_of_cards_is_what_was_measured():
    rows, text = measured(), (ROOT / "docs" / "detection.md").read_text()
    lines = text.partition("| | 800 x 1344: 6 GB |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(lines) >= 7
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        model, variant = name.split(", ")
        found = [capacity(rows[detector, model, variant], g) for detector in (FASTER, LARGE) for g in GIGABYTES]
        assert cells == list(map(str, found)), name


def test_the_sentence_in_readme_is_what_was_measured():
    rows = {
        (r["model"], r["variant"]): r for r in json.loads(RESULTS.read_text())["rows"] if r["detector"] == "fasterrcnn"
    }
    names = ("revbifpn_s3", "fast"), ("resnet50", "stored"), ("hrnet_w18", "stored")
    s3, resnet, hrnet = (f"{rows[name]['peak_bytes'] / 2**20:.0f}" for name in names)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {s3} MiB with S3, {resnet} with ResNet-50 and {hrnet} with HRNet-W18" in text


def test_the_average_precision_of_shapes_is_what_was_printed():
    runs = (RESULTS.parent / "detect_shapes_cpu.txt").read_text().split("seed 0")
    (ap, ap50), (ap_10, ap50_10) = (
        (round(float(value), 1) for value in re.findall(r"best epoch: AP ([\d.]+), AP50 ([\d.]+)", run)[0])
        for run in runs
    )
    text = " ".join((ROOT / "docs" / "detection.md").read_text().split())
    assert f"has AP {ap} and AP50 {ap50} (shapes of seed 7)" in text
    assert f"have AP {ap_10} and AP50 {ap50_10} (" in text
