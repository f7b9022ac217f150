import csv
import importlib
import json
import re

import pytest
import torch
from torch import nn

import revbifpn
from benchmarks import launches
from benchmarks import memory_vs_hrnet as memory
from benchmarks.harness import command, networks, results, rivals
from revbifpn.memory import measure_step
from tests.marks import slow


def row(model, variant, top1, size, *, family="RevBiFPN", setting="equal"):
    return memory.Row(
        setting=setting,
        model=model,
        variant=variant,
        family=family,
        label=model.upper(),
        resolution=224,
        top1=top1,
        parameters=10**6,
        batch=1,
        dtype="float32",
        meter="tensors",
        bytes_per_sample=size,
        kept_bytes_per_sample=size / 2,
        fixed_bytes=0,
        peak_bytes=size,
        peak_bytes_twice_batch=2 * size,
        parameter_bytes=4,
        gradient_bytes=4,
    )


def timm_or_skip():
    pytest.importorskip("matplotlib")
    try:
        return rivals.import_timm()
    except command.UsageError as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny(monkeypatch):
    """The catalogue with two networks that take no time, one of each side."""

    def net(width):
        return lambda: nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
        )

    pytest.importorskip("matplotlib")
    found = [
        networks.Network("ours", "fast", "RevBiFPN", "RevBiFPN-T", 70.0, net(2), 64, 100, 1e-3),
        networks.Network("theirs", "stored", "HRNet", "HRNet-T", 60.0, net(8), 32, 200, 1e-3),
    ]
    monkeypatch.setattr(memory, "candidates", lambda: found)
    monkeypatch.setattr(networks, "import_timm", lambda: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "hrnet_w19"], r"'hrnet_w19' is unknown; did you mean .*hrnet_w18"),
        (["--models", "revbifpn_s0,nothing*"], r"'nothing\*' is unknown; choose from .*revbifpn_s6"),
        (["--models", "revbifpn_s0/quick"], r"did you mean revbifpn_s0"),
        (["--resolution", "100"], r"--resolution: got 100, .*multiple of 32"),
        (["--resolution", "0"], r"--resolution: got 0"),
        (["--resolution", "big"], r"invalid int value"),
        (["--batch", "0"], r"--batch: got 0, needs at least 1"),
        (["--dtype", "int8"], r"invalid choice"),
        (["--output", "/dev/null/results"], r"--output /dev/null/results: cannot write"),
        (["--nonsense"], r"unrecognized arguments: --nonsense"),
        pytest.param(
            ["--device", "cuda"],
            r"--device cuda: torch .* use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about its absence"),
        ),
    ],
)
def test_usage_errors_are_one_line_and_code_2(arguments, message, capsys):
    assert memory.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err


@pytest.mark.parametrize("missing", ["timm", "matplotlib"])
def test_missing_extras_are_one_line_with_the_command(missing, monkeypatch, tmp_path, capsys):
    find_spec, import_module = importlib.util.find_spec, importlib.import_module

    def absent(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *r: None if name == missing else find_spec(name, *r))
    monkeypatch.setattr(importlib, "import_module", absent)
    assert memory.main(["--models", "hrnet_w18", "--output", str(tmp_path)]) == 2
    assert f"error: {missing} is not installed: pip install '.[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["revbifpn_s3"], {"revbifpn_s3/fast", "revbifpn_s3/reversible", "revbifpn_s3/stored"}),
        (["revbifpn_s3/fast"], {"revbifpn_s3/fast"}),
        (["hrnet*/checkpointed"], {f"hrnet_w{w}/checkpointed" for w in (18, 32, 48)}),
        (
            ["revbifpn_s[01]/stored", "hrnet_w18"],
            {f"revbifpn_s{s}/stored" for s in (0, 1)} | {"hrnet_w18/stored", "hrnet_w18/checkpointed"},
        ),
    ],
)
def test_models_are_chosen_by_wildcards(patterns, expected):
    assert {c.key for c in memory.select(",".join(patterns))} == expected


def test_everything_is_every_scale_and_every_rival_in_all_variants():
    chosen = memory.select("*")
    assert len(chosen) == 7 * 3 + len(rivals.RIVALS) * 2
    assert {c.family for c in chosen} == {"RevBiFPN", "HRNet", "EfficientNet", "EfficientNetV2"}
    assert {c.key for c in memory.select(memory.QUICK)} < {c.key for c in chosen}


def test_ratio_is_to_the_smallest_fast_model_that_is_as_accurate():
    rows = [
        row("s0", "fast", 70.0, 10),
        row("s1", "fast", 80.0, 20),
        row("s1", "stored", 80.0, 300),
        row("a", "stored", 65.0, 50, family="HRNet"),
        row("b", "stored", 70.1, 50, family="HRNet"),
        row("c", "checkpointed", 79.0, 5, family="HRNet"),
        row("d", "stored", 81.0, 50, family="HRNet"),
        row("a", "stored", 65.0, 50, family="HRNet", setting="native"),
    ]
    memory.add_ratios(rows)
    ratios = [(r.ratio, r.ratio_to) for r in rows]
    assert ratios == [
        (1.0, "S0"),
        (1.0, "S1"),
        (15.0, "S1"),
        (5.0, "S0"),
        (2.5, "S1"),
        (0.25, "S1"),  # where a rival needs less, it shows
        (None, None),
        (None, None),
    ]


def test_run_prints_tables_and_writes_json_csv_and_plot(tiny, tmp_path, capsys):
    directory = tmp_path / "made" / "for it"
    assert memory.main(["--output", str(directory), "--resolution", "64", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "at 64 pixels" in printed and "each at its own training resolution" in printed
    assert printed.count("RevBiFPN-T") == printed.count("HRNet-T") == 2

    stem = directory / "memory_vs_hrnet_cpu_float32"
    document = json.loads(stem.with_suffix(".json").read_text())
    assert document["environment"]["torch"] == torch.__version__
    assert set(document["environment"]) >= {"date", "commit", "device", "threads", "kernels"}
    rows = {(r["model"], r["setting"]): r for r in document["rows"]}
    assert len(rows) == 4
    for r in rows.values():
        assert 0 < r["kept_bytes_per_sample"] <= r["bytes_per_sample"] <= r["peak_bytes"]
        per_sample = (r["peak_bytes_twice_batch"] - r["peak_bytes"]) / r["batch"]
        assert per_sample == r["bytes_per_sample"]
        assert r["fixed_bytes"] == r["peak_bytes"] - r["batch"] * per_sample
    ours, theirs = rows["ours", "equal"], rows["theirs", "equal"]
    assert theirs["ratio"] == theirs["bytes_per_sample"] / ours["bytes_per_sample"] > 3
    assert f"{theirs['ratio']:.2f} x T" in printed
    assert (rows["theirs", "equal"]["resolution"], rows["theirs", "native"]["resolution"]) == (64, 32)

    with stem.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["unit"] for line in lines if line["metric"] == "bytes_per_sample"} == {"B"}
    by_key = {(line["model"], line["setting"], line["metric"]): float(line["value"]) for line in lines}
    assert by_key["theirs", "equal", "bytes_per_sample"] == theirs["bytes_per_sample"]
    assert all(line["device"] and line["torch"] == torch.__version__ for line in lines)

    png = stem.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


COMMITTED = [path for path in sorted(results.RESULTS.glob("memory_*.json")) if not path.stem.endswith("_quick")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_can_be_shown_and_drawn(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    document = json.loads(path.read_text())
    rows = [memory.Row(**r) for r in document["rows"]]
    memory.show(rows, document["environment"])
    assert capsys.readouterr().out.count("RevBiFPN-S6") >= 6
    memory.plots.memory(memory.tables(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_fake_run_gives_the_same_numbers(tiny, tmp_path):
    found = {}
    for flag in ("--fake", "--no-fake"):
        assert memory.main(["--output", str(tmp_path), "--device", "cpu", flag]) == 0
        document = json.loads((tmp_path / "memory_vs_hrnet_cpu_float32.json").read_text())
        found[flag] = [(r["model"], r["bytes_per_sample"], r["peak_bytes"]) for r in document["rows"]]
        assert {r["meter"] for r in document["rows"]} == {"fake tensors" if flag == "--fake" else "tensors"}
    assert found["--fake"] == found["--no-fake"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["revbifpn_s0/fast", *slow(["tf_efficientnet_b0/checkpointed", "hrnet_w18/checkpointed"])]
)
def test_fake_steps_have_the_bytes_of_real_ones(key):
    if not key.startswith("revbifpn"):
        timm_or_skip()
    (candidate,) = memory.select(key)
    model = candidate.make()
    real, fake = (measure_step(model, (3, 64, 64), batch=2, fake=f) for f in (False, True))
    assert (real.peak_bytes, real.kept_bytes) == (fake.peak_bytes, fake.kept_bytes)
    assert real.meter != fake.meter


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", *slow(["hrnet_w18"])])
def test_checkpointing_rivals_keeps_their_numbers_and_saves_memory(name):
    timm_or_skip()
    rival = rivals.RIVALS[name]
    plain, checkpointed = rival.build(), rival.build(checkpointed=True)
    assert round(sum(p.numel() for p in plain.parameters()) / 1e6, 2) == rival.parameters
    for ours, theirs in zip(plain.state_dict().values(), checkpointed.state_dict().values(), strict=True):
        theirs.copy_(ours)
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(0)
        model(x).sum().backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(ours.grad.abs().max()))
    kept = [measure_step(m, (3, 64, 64), batch=2, fake=True).kept_bytes for m in (plain, checkpointed)]
    assert kept[0] > 2 * kept[1]


def test_operations_are_counted_without_views_and_allocations():
    with launches.Operations() as operations:
        torch.empty(4, 4).t()[1:].reshape(12).add_(1).mul(2)
    assert operations.calls == {"clone": 1, "add_": 1, "mul": 1}


def test_the_fast_step_takes_fewer_operations_than_the_reversible(tmp_path, capsys):
    assert launches.main(["--models", "revbifpn_s0/fast", "--output", str(tmp_path)]) == 0
    assert "RevBiFPN-S0" in capsys.readouterr().out
    with (tmp_path / "launches.csv").open() as file:
        calls = {row["operation"]: int(row["value"]) for row in csv.DictReader(file)}
    assert 0 < sum(calls.values()) < 0.8 * launches.count(revbifpn.revbifpn_s0).total()
    assert calls["couple_"] > 0 and "empty" not in calls
    assert launches.main(["--models", "nothing"]) == 2
