"""Numbers in README are those of the files in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "memory_vs_hrnet_cpu_float32.json"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="the tests are not in a checkout")


def test_the_table_of_memory_is_what_was_measured():
    rows = {}
    for row in json.loads(RESULTS.read_text())["rows"]:
        if row["setting"] == "native":
            about = (row["label"], float(row["top1"]), row["resolution"])
            rows.setdefault(about, {})[row["variant"]] = row["bytes_per_sample"] / 2**20
    table = re.search(r"^\| network \|(.*?)\n\|[-|]+\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S | re.M)
    variants = [name.strip() for name in table[1].split("|")][2:-1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2].splitlines()]
    assert variants == ["fast", "stored", "checkpointed"] and len(lines) >= 6
    for label, top1, pixels, *cells in lines:
        found = rows[label, float(top1), int(pixels)]
        for variant, cell in zip(variants, cells, strict=True):
            assert (cell == "") == (variant not in found)
            if cell:
                decimals = len(cell.partition(".")[2])
                assert float(cell) == round(found[variant], decimals), f"{label}, {variant}"
