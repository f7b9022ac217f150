import dataclasses
import json
import re

import pytest
import torch

import revbifpn
from benchmarks import fits as table_maker
from revbifpn import fits, revbifpn_s0
from revbifpn.estimate import StepEstimator
from revbifpn.fits import Step
from tests.networks import F32, narrow

GB = 2**30


def narrow_step(**options) -> tuple[Step, StepEstimator]:
    with torch.device("meta"):
        model = narrow(fits.fast, F32)
    step = fits.simulate(
        lambda: narrow(fits.fast, F32), (64, 64), network="narrow", label="narrow", variant="fast", **options
    )
    return step, StepEstimator(model, (64, 64), optimizer_states=2, device="cuda")


@pytest.mark.slow
def test_a_simulated_step_is_the_estimators_at_any_batch():
    step, estimator = narrow_step()
    for batch in (*estimator.line_batches(), 5000):
        assert step.estimate(batch, 2) == estimator.estimate(batch)
    assert step.largest_batch(GB, 2) == estimator.largest_batch(GB)


@pytest.mark.slow
@pytest.mark.parametrize("states", [fits.OPTIMIZERS["momentum"]])
def test_where_few_images_fit_the_answer_is_the_estimators(states):
    """A stored network of which eight images are more than a card holds: small batches are simulated as well."""
    with torch.device("meta"):
        model = revbifpn_s0(reversible=False)
    step = fits.simulate_revbifpn("revbifpn_s0", (512, 512), "float32", "", "stored")
    estimator = StepEstimator(model, 512, optimizer_states=states, device="cuda")
    for gigabytes in (1, 2.2):
        assert step.largest_batch(gigabytes * GB, states) == estimator.largest_batch(gigabytes * GB) < 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_of_stored_activations_two_batches_say_everything(dtype):
    with torch.device("meta"):
        model = narrow(revbifpn, F32, reversible=False)
    about = {"network": "narrow", "label": "narrow", "variant": "stored", "on_a_line": True}
    precision = next(name for name, value in fits.PRECISIONS.items() if value == dtype)
    step = fits.simulate(lambda: narrow(revbifpn, F32, reversible=False), (64, 96), precision, **about)
    estimator = StepEstimator(model, (64, 96), dtype, device="cuda")
    for batch in (2, 8):
        assert step.estimate(batch).total == pytest.approx(estimator.estimate(batch).total, rel=5e-3)


def test_what_a_table_is_to_have_and_has_not_is_told():
    _, steps = fits.load()
    absent = table_maker.absent(steps)
    assert len(table_maker.absent([])) == len(absent) + len(steps)
    (row,) = table_maker.absent([step for step in steps if step != steps[0]])[:1]
    assert (row["task"], row["network"], row["size"]) == (steps[0].task, steps[0].network, steps[0].size)
    assert row["label"] == steps[0].label
    assert table_maker.absent(table_maker.jobs() + list(table_maker.detectors())) == []


def a_step(**changes) -> Step:
    step = Step(
        task="classification",
        network="some",
        label="Some",
        variant="fast",
        size=(224, 224),
        precision="float32",
        stream="float32",
        score=None,
        image_bytes=10,
        parameter_bytes=1000,
        gradient_bytes=900,
        state_bytes=800,
        peaks=((2, 300), (4, 400), (8, 1200)),
        slope=200.0,
    )
    return dataclasses.replace(step, **changes)


def test_memory_is_on_lines_through_what_is_known():
    step = a_step()
    assert [step.activations(n) for n in (1, 2, 3, 4, 6, 8, 9, 18)] == [150, 300, 350, 400, 800, 1200, 1400, 3200]
    parts = step.estimate(6, 2)
    assert (parts.activations, parts.images, parts.parameters, parts.gradients, parts.optimizer) == (
        800,
        60,
        1000,
        900,
        1600,
    )


@pytest.mark.parametrize("memory", [2059, 2060, 2061, 2500, 3000, 10_000, 10**9])
def test_the_largest_batch_fits_and_one_more_does_not(memory):
    step = a_step()
    batch = step.largest_batch(memory)
    assert batch == 0 or step.estimate(batch).total <= memory
    assert step.estimate(batch + 1).total > memory
    assert (batch == 0) == (memory < 2060)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GB", 12 * GB), ("11.5 GiB", 23 * GB // 2), ("900mb", 900 * 2**20), ("1073741824", GB)],
)
def test_amounts_of_memory_are_read(text, expected):
    assert fits.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "12", "GB", "-3GB", "twelve", "0GB", "12TB", "1e3GB"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(ValueError, match="needs an amount of memory"):
        fits.parse_bytes(text)


@pytest.mark.parametrize("text", ["", "0x0", "31", "800x", "x800", "800x1344x3", "-8x64", "8.5x64"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="needs a height and a width"):
        fits.parse_size(text)


def test_sizes_are_read():
    assert fits.parse_size("800x1344") == (800, 1344)
    assert fits.parse_size(" 224 ") == (224, 224)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_prints_largest_batches_and_parts_from_the_table(capsys):
    assert fits.main(["--card", "12GB", "--size", "224", "--optimizer", "adamw"]) == 0
    text = capsys.readouterr().out
    environment, steps = fits.load()
    for step in fits.choose(steps, "classification", (224, 224), "float32", "float32", []):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{step.label} ") and step.variant in line]
        batch = step.largest_batch(12 * GB, 2)
        assert line.split()[-6] == (str(batch) if batch else "none")
        assert line.split()[-5] == f"{step.estimate(batch or 1, 2).activations / GB:.2f}"
    assert "nothing was measured on a GPU" in text
    assert "Predicted: the table of" in text and environment["date"] in text and environment["torch"] in text


@pytest.mark.slow
def test_a_size_that_the_table_has_not_is_simulated(capsys):
    assert fits.main(["--card", "12GB", "--size", "96x160", "--models", "revbifpn_s0"]) == 0
    text = capsys.readouterr()
    step = fits.simulate_revbifpn("revbifpn_s0", (96, 160), "float32", "float32")
    assert f" {step.largest_batch(12 * GB, 1)} " in text.out
    assert "simulated now" in text.out and "simulating revbifpn_s0" in text.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--card"),
        (["--card", "12"], "argument --card: got '12', needs an amount of memory of at least 1 MB, as in 12GB"),
        (["--card", "12GB", "--size", "800*1344"], "argument --size: got '800\\*1344', needs a height and a width"),
        (["--card", "12GB", "--models", "revbifpn_s9"], "'revbifpn_s9' is unknown; choose from hrnet_w18"),
        (["--card", "12GB", "--task", "Faster R-CNN"], "argument --size: Faster R-CNN is in the table at 800x1344"),
        (["--card", "12GB", "--precision", "float8"], "--precision: invalid choice: 'float8'"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_wanted(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        fits.main(arguments)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


# --- the table --------------------------------------------------------------------------------------


def test_the_table_has_every_scale_and_rivals_at_its_settings():
    _, steps = fits.load()
    assert len({table_maker.key(step) for step in steps}) == len(steps)
    own = [step for step in steps if step.task == "classification" and not step.is_rival]
    for size, precision in {(step.size, step.precision) for step in own}:
        same = [step for step in steps if (step.task, step.size, step.precision) == ("classification", size, precision)]
        assert {step.network for step in same if not step.is_rival} == set(fits.CONFIGS)
        if precision == "float32":
            assert {step.network for step in same} >= {"hrnet_w18", "hrnet_w48", "tf_efficientnet_b4"}
            assert {step.variant for step in same} == {"fast", "stored", "checkpointed"}


def test_detectors_are_read_from_what_was_measured(tmp_path):
    bytes_of = {"peak_bytes": 600, "two_images_bytes": 1000, "parameter_bytes": 40, "gradient_bytes": 32}
    row = {"detector": "fasterrcnn", "model": "resnet50", "variant": "stored", "published_ap": 37.4} | bytes_of
    sixteen = row | {"detector": "retinanet", "model": "new", "variant": "fast bf16 fixed16", "published_ap": None}
    settings = {"sizes": {"fasterrcnn": [800, 1344], "retinanet": [64, 96]}}
    content = {"settings": settings, "rows": [row, sixteen, row | {"detector": "segmentation"}]}
    (tmp_path / "detection_memory_cpu.json").write_text(json.dumps(content))
    resnet, new = table_maker.detectors(tmp_path)
    assert (resnet.task, resnet.label, resnet.size, resnet.stream) == ("Faster R-CNN", "ResNet-50", (800, 1344), "")
    assert [resnet.activations(n) for n in (1, 2, 3)] == [600, 1000, 1400]
    assert (new.task, new.size, new.is_rival) == ("RetinaNet", (64, 96), False)
    assert (new.network, new.precision, new.stream) == ("new", "bfloat16", "fixed16")


def test_the_table_is_written_and_read_as_it_was(tmp_path):
    steps = [a_step(), a_step(network="other", variant="stored", stream="", score=75.5)]
    table_maker.write(tmp_path / "fits.json", steps)
    environment, read = fits.load(tmp_path / "fits.json")
    assert read == steps
    assert {"date", "commit", "torch", "version"} <= environment.keys()
