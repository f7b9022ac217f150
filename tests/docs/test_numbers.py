"""Numbers in README and docs are those of the files in benchmarks/results."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

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


def test_start_shows_what_was_printed():
    shown = re.search(r"(?:^ {4}.*\n)+", (ROOT / "docs" / "start.md").read_text(), re.MULTILINE)[0]
    assert (
        "".join(line[4:] for line in shown.splitlines(keepends=True)) in (RESULTS / "train_digits_cpu.txt").read_text()
    )


def test_map_tiles_are_what_was_measured():
    rows = rows_of("tile2vec_cpu.json")
    probes, analogies = tables(sections("docs/recipes.md")["Map tiles without labels"])
    for table, measured in ((probes, rows), (analogies, [row["analogies"] for row in rows])):
        (_, *names), *lines = table
        assert [int(line[0]) for line in lines] == [row["seed"] for row in rows] == [0, 1, 2]
        for line, row in zip(lines, measured, strict=True):
            for name, cell in zip(names, line[1:], strict=True):
                assert_is(cell, row[name], name)


def test_latent_features_are_what_was_measured():
    rows = {name: rows_of(f"latent_features_{name}_cpu.json") for name in ("digits", "textures")}
    ((head, *lines),) = tables(sections("docs/recipes.md")["Hard samples and rare classes"])
    assert len(lines) == 5
    for method, *cells in lines:
        for about, cell in zip(head[1:], cells, strict=True):
            name, classes = about.split(", ")
            values = [row[classes.split()[0]] for row in rows[name] if row["method"] == method]
            assert len(values) == 5
            for number, value in zip(cell.split(", "), (fmean(values), stdev(values)), strict=True):
                assert_is(number, value, (method, about))


def test_gradients_in_16_bits_are_what_was_measured():
    keys = ("module", "branches", "stream", "reversible")
    found = {
        tuple(r[k] for k in keys): r["difference"] for r in rows_of("precision_cpu.json") if r["part"] == "16 bits"
    }
    ((_, *lines),) = tables(sections("docs/recipes.md")["Sixteen bits"])
    modules = ["revbifpn", "revbifpn", "revbifpn.fast", "revbifpn.fast"]
    for module, (_, stream, *cells) in zip(modules, lines, strict=True):
        stream = "float32" if "float32" in stream else "default"
        columns = [(dtype, reversible) for dtype in ("bfloat16", "float16") for reversible in (True, False)]
        for (dtype, reversible), cell in zip(columns, cells, strict=True):
            assert_is(cell, found[module, dtype, stream, reversible], (module, dtype, stream, reversible))


def test_memory_by_streams_is_what_was_measured():
    rows = [row for row in rows_of("precision_cpu.json") if row["part"] == "memory"]
    found = {(r["branches"], r["stream"], r["reversible"]): r["mib_per_sample"] for r in rows}
    ((_, *lines),) = tables(sections("docs/streams.md")["What it costs"])
    columns = [("float32", True), ("fixed32", True), ("fixed16", True), ("float32", False)]
    for branches, *cells in lines:
        for (stream, reversible), cell in zip(columns, cells, strict=True):
            assert_is(cell.split(",")[0], found[branches.split()[0], stream, reversible], (branches, stream))
