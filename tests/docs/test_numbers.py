"""Numbers in README and docs, in tables and in sentences, are those of the files in benchmarks/results."""

import csv
import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from statistics import fmean, stdev

import pytest

from revbifpn.configs import CONFIGS
from revbifpn.dual_residual.precision import precise_beta
from revbifpn.dual_residual.schedule import PREDICTED_ERRORS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="the tests are not in a checkout")


def rows_of(result: str) -> list[dict]:
    return json.loads((RESULTS / result).read_text())["rows"]


def lines_of(result: str) -> list[dict[str, str]]:
    with open(RESULTS / result, newline="") as file:
        return list(csv.DictReader(file))


def assert_said(page: str, *sentences: str) -> None:
    """The page has these words, however its lines are broken."""
    text = " ".join((ROOT / page).read_text().split())
    for sentence in sentences:
        assert sentence in text, f"{page} does not say: {sentence}"


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
    rows, of_textures = rows_of("tile2vec_cpu.json"), rows_of("tile2vec_textures_cpu.json")
    probes, textures, analogies = tables(sections("docs/recipes.md")["Map tiles without labels"])
    for table, measured in (
        (probes, rows),
        (textures, of_textures),
        (analogies, [row["analogies"] for row in rows]),
    ):
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


def test_times_are_what_was_measured():
    ours, exported, compiled = tables(sections("docs/throughput.md")["What was measured"])

    def measured(suffix: str, task: str, batch: str) -> dict[str, dict]:
        rows = rows_of(f"throughput_cpu_float32{suffix}.json")
        return {r["variant"]: r for r in rows if r["task"] == task and str(r["batch"]) == batch and r.get("ratio")}

    for name, pixels, batch, step, *cells in ours[1:]:
        suffix = "" if name == "S0" else f"_{name.lower()}"
        train, inference = (measured(suffix, task, batch) for task in ("train", "inference"))
        assert train["fast"]["resolution"] == int(pixels)
        assert_is(step, 1e3 * train["fast"]["seconds"], name)
        assert_is(cells[3], 1e3 * inference["fast"]["seconds"], name)
        for cell, row in zip(cells[:3], map(train.get, ("published", "stored", "reversible")), strict=True):
            assert_is(cell, row["ratio"], (name, "train"))
        for cell, row in zip(cells[4:], map(inference.get, ("published", "stored")), strict=True):
            assert_is(cell, row["ratio"], (name, "inference"))
    for batch, time, *cells in exported[1:]:
        rows = measured("_onnxruntime", "inference", batch)
        assert_is(time, 1e3 * rows["fast"]["seconds"], batch)
        for variant, cell in zip(exported[0][2:], cells, strict=True):
            assert_is(cell, rows[variant]["ratio"], (batch, variant))
    for task, *cells in compiled[1:]:
        rows = measured("_compiled", {"training step": "train"}.get(task, task), "8")
        for variant, cell in zip(compiled[0][1:], cells, strict=True):
            assert_is(cell, rows[variant]["ratio"], (task, variant))


def test_counts_of_operations_are_what_was_counted():
    count = Counter()
    for row in lines_of("launches.csv"):
        count[row["model"], row["variant"]] += int(row["value"])
    of = {scale: [count[f"revbifpn_{scale}", v] for v in ("fast", "stored", "published")] for scale in ("s0", "s6")}
    assert_said(
        "docs/throughput.md",
        "S0 {} operations, the plain stored model {}, the published code {};".format(*of["s0"]),
        "S6 {}, {} and {}.".format(*of["s6"]),
    )


def test_products_are_what_was_measured():
    cases = {}
    for row in lines_of("kernels_cpu_pointwise_float32.csv"):
        if row["metric"] in ("calls", "seconds"):
            case = cases.setdefault((row["op"], row["scale"], row["case"]), {})
            case[row["metric"], row["implementation"]] = float(row["value"])
    assert {implementation for case in cases.values() for _, implementation in case} == {"pytorch", "cpp"}

    def ratio(op: str, scale: str) -> float:
        found = [case for (name, of, _), case in cases.items() if (name, of) == (op, scale)]
        total = {i: sum(case["calls", i] * case["seconds", i] for case in found) for i in ("pytorch", "cpp")}
        return total["pytorch"] / total["cpp"]

    def least(op: str) -> float:
        return min(c["seconds", "pytorch"] / c["seconds", "cpp"] for (name, *_), c in cases.items() if name == op)

    product, weight = "pointwise_conv_", "pointwise_conv_grad_weight"
    assert_said(
        "docs/kernels.md",
        *(
            "`{}` {:.1f}, {:.1f} and {:.1f}".format(op, *(ratio(op, s) for s in ("s0", "s3", "s6")))
            for op in (product, weight)
        ),
        f"the least of any was {least(product):.2f} and {least(weight):.2f}.",
    )


def test_errors_of_streams_are_what_was_measured():
    rows = [row for row in rows_of("precision_cpu.json") if row["network"] == "narrow"]
    found = {(r["branches"], r["stream"], r["reversible"]): r["difference"] for r in rows}
    float32 = [100 * found["float32", stream, False] for stream in ("fixed32", "fixed16")]
    bfloat16 = [100 * found["bfloat16", stream, False] for stream in ("float32", "fixed32", "fixed16")]
    assert all(found[branches, s, True] == 0 for branches in ("float32", "bfloat16") for s in ("fixed32", "fixed16"))
    rounding = f"{found['float32', 'float32', True]:.1e}".replace("e-0", "e-")
    assert_said(
        "docs/streams.md",
        f"differ from stored ones by rounding, {rounding} in the narrow S0",
        f"differ from stored ones by {100 * found['bfloat16', 'float32', True]:.1f} %",
        'by {:.3f} % (`"fixed32"`) and {:.2f} % (`"fixed16"`)'.format(*float32),
        '{:.1f} % with stored floats, {:.1f} % with `"fixed32"` and {:.1f} % with `"fixed16"`'.format(*bfloat16),
    )


def test_training_by_streams_is_what_was_measured():
    rows = rows_of("parity_digits_cpu.json")
    ((_, *lines),) = tables(sections("docs/streams.md")["Training"])
    for (variant, *cells), name in zip(lines, ("float32", "fixed32", "fixed16"), strict=True):
        assert f'"{name}"' in variant
        of_seed = {row["seed"]: row for row in rows if row["variant"] == name}
        for cell, seed in zip(cells[:4], (0, 1, 2, "mean"), strict=True):
            assert_is(cell, of_seed[seed]["test_accuracy"], (name, seed))
        assert_is(cells[4] or "0", of_seed["mean"]["difference"], name)
        assert_is(cells[5], of_seed["mean"]["train_loss"], name)
    assert_said("docs/streams.md", f"largest value was {max(row['largest_value'] for row in rows):.0f}, of 64")


NETWORKS = {
    "ViT-S/16, 224": ("vit_small_patch16_224", 224),
    "ViT-S/16, 384": ("vit_small_patch16_224", 384),
    "ViT-B/16, 224": ("vit_base_patch16_224", 224),
    "ViT-B/16, 384": ("vit_base_patch16_224", 384),
    "ViT-L/16, 224": ("vit_large_patch16_224", 224),
    "ViT-L/16, 384": ("vit_large_patch16_224", 384),
    "Swin-B, 224": ("swin_base_patch4_window7_224", 224),
    "ConvNeXt-B, 224": ("convnext_base", 224),
    "ResNet-101, 224": ("resnet101", 224),
    "Swin3D-T, 16 frames, 224": ("swin3d_t", 224),
}


def test_memory_of_dual_residual_networks_is_what_was_measured():
    keys = ("network", "pixels", "dtype", "way")
    found = {tuple(row[key] for key in keys): row for row in rows_of("dual_residual_memory.json")}
    found_tables = tables(sections("docs/dual_residual.md")["What it costs"])[:2]
    for (_, *lines), dtype, stream in zip(found_tables, ("float32", "bfloat16"), ("int32", "fixed16"), strict=True):
        exact = [f"{stream} k={k}" for k in (7, 3, 1, 0)]
        for name, *cells in lines:
            of_way = {way: row for (*about, way), row in found.items() if tuple(about) == (*NETWORKS[name], dtype)}
            kept = [of_way[way] for way in ("checkpointed", "ordinary", "float", *exact)]
            peak = [of_way[way] for way in ("checkpointed", "float", *exact)]
            values = [kept[0]["kept_bytes"] / 2**20, *(row["kept_ratio"] for row in kept[1:])]
            values += [peak[0]["peak_bytes"] / 2**20, *(row["peak_ratio"] for row in peak[1:])]
            for cell, value in zip(cells, values, strict=True):
                assert_is(cell, value, (name, dtype))
    swin3d = {way: row for (*about, way), row in found.items() if about == ["swin3d_t", 224, "float32"]}
    worst = max(row["peak_ratio"] for way, row in swin3d.items() if "int32" in way)
    assert_said("docs/dual_residual.md", f"its peak is {100 * (worst - 1):.0f} % above checkpointing's in float32")
    resnet = [row for (name, _, _, way), row in found.items() if name == "resnet101" and way != "ordinary"]
    assert all(row["kept_ratio"] >= 1 and row["peak_ratio"] >= 1 for row in resnet)


def test_dual_residual_functions_and_times_are_what_was_measured():
    page = sections("docs/dual_residual.md")
    rows = {(r["depth"], r["alpha"], r["beta"]): r for r in rows_of("dual_residual_function.json")}
    ((_, *lines),) = tables(page["Float or exact"])
    for about, *cells in lines:
        alpha, beta = (eval(number) for number in about.split(" (")[0].split(", "))
        values = [rows[depth, alpha, beta][key] for depth in (12, 24) for key in ("cosine_sum", "cosine_x")]
        for cell, value in zip(cells, values, strict=True):
            assert_is(cell, value, about)
    times = {(row["network"], row["pixels"], row["way"]): row for row in rows_of("dual_residual_cpu.json")}
    (_, *lines) = tables(page["What it costs"])[2]
    for name, *cells, of_floats, of_integers in lines:
        own = {way: row for (*about, way), row in times.items() if tuple(about) == NETWORKS[name]}
        for cell, way in zip(cells, ("ordinary", "float", "int32 k=7", "int32 k=1"), strict=True):
            assert_is(cell, own[way]["time_ratio"], (name, way))
        assert float(of_floats) == pytest.approx(own["float"]["gradient_error"], rel=0.05)
        assert float(of_integers) == own["int32 k=7"]["gradient_error"] == own["int32 k=1"]["gradient_error"] == 0


def test_training_of_dual_residual_networks_is_what_was_measured():
    found = tables(sections("docs/dual_residual.md")["How well it trains"])
    of = {}
    for name, (_, *lines) in zip(("digits", "text"), found, strict=True):
        of[name] = rows = {(row["way"], row["seed"]): row for row in rows_of(f"dual_residual_{name}_cpu.json")}
        for way, *cells in lines:
            values = [rows[way, seed]["test_accuracy"] for seed in (0, 1, 2, "mean")]
            values += [rows[way, "mean"][key] for key in ("difference", "train_loss")]
            for cell, value in zip(cells, values, strict=True):
                assert_is(cell, value, (name, way))

    def cost(name: str, way: str) -> str:
        return f"{-of[name][way, 'mean']['difference']:.1f}"

    seeds = [
        [rows[way, s]["test_accuracy"] for s in range(3)] for rows in of.values() for way in ("ordinary", "int32 k=7")
    ]
    ordinary, exact = [*seeds[0], *seeds[2]], [*seeds[1], *seeds[3]]
    text = of["text"]
    pairs = [zip(*(text[way, s]["losses"] for way in ("int32 k=7", "ordinary")), strict=True) for s in range(3)]
    losses = 100 * max(abs(a / b - 1) for pair in pairs for a, b in pair)
    assert_said(
        "docs/dual_residual.md",
        f"to {max(abs(a - b) for a, b in zip(exact, ordinary, strict=True)):.1f} points for every seed, "
        f"with MiniLM's losses to {losses:.1f} %",
        f"k = 3 costs {cost('text', 'int32 k=3')} points and k = 1 {cost('text', 'int32 k=1')}, "
        f"a schedule to k = 1 as much; a schedule to k = 3 {cost('text', 'int32 scheduled to k=3')}.",
        f"ordinary runs of three seeds lie {max(ordinary[:3]) - min(ordinary[:3]):.1f} points apart",
        f"costs {cost('digits', 'float scheduled')} points on the digits "
        f"and {cost('text', 'float scheduled')} in MiniLM",
        f"over all steps it costs {cost('digits', 'float scheduled, all steps')} on the digits, "
        f"on to (0, 1) {cost('digits', 'float scheduled to (0, 1)')}, "
        f"and staying at its start {cost('digits', 'float, error 0.01')}.",
    )


def test_ends_of_schedules_are_what_the_prediction_says():
    ends = [precise_beta(depth, error) for depth in (6, 12, 24) for error in PREDICTED_ERRORS]
    words = "with 6 blocks beta = {:.2f} to {:.2f}, with 12 blocks {:.2f} to {:.2f}, with 24 blocks {:.2f} to {:.2f}."
    assert_said("docs/dual_residual.md", words.format(*ends))


def test_what_training_scripts_were_measured_at_is_said():
    (loop,) = rows_of("training_loop_cpu.json")
    pairs = json.loads((RESULTS / "training_loop_cpu.json").read_text())["settings"]["steps"]
    kills = json.loads((RESULTS / "training_kills_cpu.json").read_text())
    assert all(part["same_metrics"] and part["same_weights"] for part in kills["settings"]["parts"])
    runs = sum(part["runs"] for part in kills["settings"]["parts"])
    assert 2 * sum(row["when"] == "while writing" for row in kills["rows"]) == len(kills["rows"])
    curves = json.loads((RESULTS / "training_curves_cpu.json").read_text())["settings"]
    assert_said(
        "docs/training.md",
        f"{100 * loop['overhead']:.1f} % (median of the ratios of {pairs} pairs), "
        f"medians of {loop['bare']:.3f} and {loop['loop']:.3f} s",
        f"{len(kills['rows'])} kills, every second one while a checkpoint was being written",
        f"the {runs} runs of {kills['settings']['parts'][0]['steps_of_each']} steps",
        f"on {curves['images']:,} digits of MNIST",
    )
    ((_, *lines),) = tables(sections("docs/training.md")["What was measured"])
    for (about, *cells), row in zip(lines, curves["summary"], strict=True):
        for cell, key, unit in zip(cells, ("train_loss", "val_loss", "top1", "distance"), (1, 1, 1, 100), strict=True):
            assert_is(cell, unit * row[key], (about, key))


def test_ratios_of_detectors_are_what_was_measured():
    found = rows_of("detection_memory_cpu.json") + rows_of("detection_memory_cpu_more.json")
    rows = {(r["detector"], r["model"], r["variant"]): r for r in found}
    of = {(model, variant): row for (detector, model, variant), row in rows.items() if detector == "fasterrcnn"}
    s3, s6, hrnet = of["revbifpn_s3", "fast"], of["revbifpn_s6", "fast"], of["hrnet_w18", "stored"]
    with_gradients = [row["peak_bytes"] + row["gradient_bytes"] for row in (hrnet, s3)]
    two = [s6["two_images_bytes"] / of["resnet50", v]["two_images_bytes"] for v in ("stored", "heads recomputed")]
    assert_said(
        "docs/detection.md",
        f"S3 takes {hrnet['peak_bytes'] / s3['peak_bytes']:.1f} times less than HRNet-W18 stored "
        f"({hrnet['per_image_bytes'] / s3['per_image_bytes']:.1f} times for a second image, "
        f"{with_gradients[0] / with_gradients[1]:.1f} with the parameters' gradients on both sides), "
        f"where the paper has {hrnet['published_gb'] / s3['published_gb']:.1f}.",
        f"take {100 * two[0]:.0f} % of two of ResNet-50 under torchvision's heads, and {100 * two[1]:.1f} % where",
    )
    for detector in {r["detector"] for r in found}:
        own = [r["peak_bytes"] for (d, _, variant), r in rows.items() if d == detector and variant == "fast"]
        assert max(own) < min(r["peak_bytes"] for (d, _, v), r in rows.items() if d == detector and v == "checkpointed")


def test_the_floor_of_detectors_adds_up():
    def mib(*shape: int) -> float:
        return 4 * prod(shape) / 2**20

    def streams(arch: str) -> list[float]:
        return [mib(c, 800 // s, 1344 // s) for c, s in zip(CONFIGS[arch].channels, (4, 8, 16, 32), strict=True)]

    pyramid = sum(mib(256, -(-800 // s), -(-1344 // s)) for s in (4, 8, 16, 32, 64))
    parts = [pyramid, sum(streams("revbifpn_s3")), mib(512, 256, 7, 7), mib(3, 800, 1344)]
    neck = sum(mib(c, 800 // s, 1344 // s) for c, s in ((160, 8), (336, 16), (848, 32)))
    assert_said(
        "docs/detection.md",
        "{:.0f} are the FPN's maps, which RoIAlign reads as a whole, {:.0f} the streams, {:.1f} the features of "
        "512 RoIs and {:.0f} the image: {:.0f} that".format(*parts, sum(parts)),
        f"the body's smaller maps ({neck:.0f})",
        f"{2 * sum(streams('revbifpn_s6')):.0f} are the streams",
        f"{streams('revbifpn_s6')[0]:.0f} MiB each for S6",
    )


def test_scales_are_described_as_they_are():
    rows = [row for row in rows_of("memory_vs_hrnet_cpu_float32.json") if row["setting"] == "native"]
    memory = {(row["model"], row["variant"]): row["bytes_per_sample"] / 2**20 for row in rows}
    (_, *lines), *_ = tables(sections("docs/choosing.md")["The scale"])
    for (scale, *cells), (arch, config) in zip(lines, CONFIGS.items(), strict=True):
        values = [config.top1, config.resolution, config.parameters / 1e6, config.macs / 1e9]
        values += [memory[arch, variant] for variant in ("fast", "stored")]
        for cell, value in zip(cells, values, strict=True):
            assert_is(cell, value, scale)
    s0, s3, s6 = (CONFIGS[f"revbifpn_{scale}"].macs for scale in ("s0", "s3", "s6"))
    assert_said("docs/choosing.md", f"S3 has {s3 / s0:.0f} times", f"S6 has {s6 / s0:.0f} times")


def test_stored_activations_of_the_first_training_are_what_was_estimated():
    (stored,) = re.findall(r"reversible=False: (\d+) MiB", (RESULTS / "train_digits_cpu.txt").read_text())
    assert_said("docs/start.md", f"the same training needs {stored} MiB")


def test_margins_of_images_are_what_was_measured():
    rows = [row for row in rows_of("latent_features_digits_cpu.json") if row["method"] == "generated"]
    margin = fmean(row["margin of images at 0"] for row in rows)
    assert_said("docs/recipes.md", f"for digits about {margin:.0f} where the features were moved to 0")


def test_the_host_s_time_and_memory_on_the_null_gpu_are_what_was_measured():
    rows = {
        (row["model"], row["variant"].partition("@")[0], row["dtype"]): row for row in rows_of("host_null_gpu.json")
    }
    large = {(row["model"], row["dtype"]): row for row in rows_of("host_null_gpu_batch32.json")}
    ((_, *lines),) = tables(sections("docs/gpu.md")["Before there is a GPU: the host's time"])
    assert len(lines) == 6
    for about, *cells in lines:
        scale, dtype = about.split(", ")[:2]
        key = f"revbifpn_{scale.lower()}"
        three = [rows[key, variant, dtype] for variant in ("fast", "stored", "published")]
        values = [row[name] for name in ("cpu_ms", "launches") for row in three]
        for cell, value in zip(cells, [*values, large[key, dtype]["mib_per_sample"]], strict=True):
            assert_is(cell, value, about)
    first = rows["revbifpn_s0", "fast", "float32"]
    assert first["compilations_other_batch"] == first["compilations_other_size"] == 0
    said = f"compiles {first['compilations']} kernels in {first['compilation_s']:.1f} s in float32"
    assert_said("docs/gpu.md", f"The first step of S0 {said}, another batch or size none.")
    s0, s3, s6 = (f"{large[f'revbifpn_{scale}', 'float32']['mib_per_sample']:.1f}" for scale in ("s0", "s3", "s6"))
    assert_said("README.md", f"S0 takes {s0}, S3 {s3} and S6 {s6} MiB")
