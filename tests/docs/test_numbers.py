"""Numbers in README and docs are those of the files in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="the tests are not in a checkout")


def rows_of(result: str) -> list[dict]:
    return json.loads((RESULTS / result).read_text())["rows"]


def sections(page: str) -> dict[str, str]:
    """Text by heading, without blocks of code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[0::2], strict=True))


def tables(text: str) -> list[list[list[str]]]:
    """Cells by row, heads first."""
    found = re.findall(r"^(\|.*\n)\|[-|]+\n((?:\|.*\n)+)", text + "\n", re.MULTILINE)
    return [[[c.strip() for c in row.split("|")[1:-1]] for row in [head, *body.splitlines()]] for head, body in found]


def assert_is(cell: str, value: float, about: object) -> None:
    """The cell's number is the value, rounded as the cell is."""
    number = cell.removesuffix(" %").replace("−", "-")  # noqa: RUF001
    decimals = len(number.partition(".")[2])
    assert float(number) == pytest.approx(value, abs=0.5001 * 10**-decimals), f"{about}: {cell}, measured {value}"


def test_the_table_of_memory_is_what_was_measured():
    rows = {}
    for row in rows_of("memory_vs_hrnet_cpu_float32.json"):
        if row["setting"] == "native":
            about = (row["label"], float(row["top1"]), row["resolution"])
            rows.setdefault(about, {})[row["variant"]] = row["bytes_per_sample"] / 2**20
    (head, *lines), *_ = tables(sections("README.md")["Memory"])
    variants = head[3:]
    assert variants == ["fast", "stored", "checkpointed"] and len(lines) >= 6
    for label, top1, pixels, *cells in lines:
        found = rows[label, float(top1), int(pixels)]
        for variant, cell in zip(variants, cells, strict=True):
            assert (cell == "") == (variant not in found)
            if cell:
                assert_is(cell, found[variant], f"{label}, {variant}")


MEASURED = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_a_table_of_decimals_names_its_file(page):
    for heading, text in sections(page).items():
        numbers = [n for table in tables(text) for row in table[1:] for cell in row for n in MEASURED.findall(cell)]
        named = re.findall(r"benchmarks/results/([\w*.]*[\w*])", text)
        if len(numbers) > 2:
            assert named, f"{page}, {heading}: {numbers}"
            assert all(any(RESULTS.glob(name)) for name in named), f"{page}, {heading}: not all of {named} are there"
