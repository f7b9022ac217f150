import csv
import json
import re
import sys

import pytest
import torch
from torch import nn

import revbifpn
import revbifpn.fast
from benchmarks import throughput
from benchmarks.harness import agreement, command, networks, results, rivals, steps, timing
from tests.marks import slow
from tests.networks import TWO_LEVELS

VARIANTS = {"fast", "reversible", "stored", "compiled", "checkpointed"}

PUBLISHED = """
import os, sys
from torch import nn
sys.path.append(os.path.dirname(__file__))
from rev_structs.layer import WIDTH
print("imported")

def _make(**overrides):
    print("Note: pretrained")
    return nn.Linear(WIDTH, 2)

{}
""".format("\n".join(f"revbifpn_s{s} = _make" for s in range(7)))


def row(model, variant, family="RevBiFPN", top1=70.0, batch=4):
    return throughput.Row("train", model, variant, family, model.upper(), top1, 64, batch, "float32")


@pytest.fixture
def small(monkeypatch):
    """RevBiFPN-S0 shrunk to two levels, in the real variants, and a rival that takes no time."""
    pytest.importorskip("matplotlib")

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))

    for package in (revbifpn, revbifpn.fast):
        monkeypatch.setattr(
            package, "revbifpn_s0", lambda cls=package.RevBiFPN, **kw: cls(**(TWO_LEVELS | {"classes": 1000} | kw))
        )
    everything = networks.catalogue()
    found = [c for c in everything if c.key in ("revbifpn_s0/fast", "revbifpn_s0/stored", "revbifpn_s0/reversible")]
    found.append(networks.Network("theirs", "stored", "HRNet", "HRNet-T", 60.0, net))
    monkeypatch.setattr(throughput, "catalogue", lambda published=None: found)
    monkeypatch.setitem(throughput.MODELS, "cpu", "*")
    monkeypatch.setattr(networks, "import_timm", lambda: None)
    return found


@pytest.fixture
def checkout(tmp_path):
    """Something with the published code's layout."""
    directory = tmp_path / "published"
    (directory / "rev_structs").mkdir(parents=True)
    (directory / "rev_structs" / "layer.py").write_text("WIDTH = 3\n")
    (directory / "revbifpn.py").write_text(PUBLISHED)
    yield directory
    for name in [name for name in sys.modules if name.split(".")[0] == "rev_structs"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "hrnet_w19"], r"'hrnet_w19' is unknown; did you mean .*hrnet_w18"),
        (["--models", "revbifpn_s0/published"], r"is unknown; did you mean revbifpn_s0"),
        (["--resolution", "100"], r"--resolution: got 100, .*multiple of 32"),
        (["--batch", "4,x"], r"--batch: got '4,x', needs positive numbers"),
        (["--batch", "0"], r"--batch: got '0', needs positive numbers"),
        (["--rounds", "0"], r"--rounds: got 0"),
        (["--dtype", "int8"], r"invalid choice"),
        (["--published", "/nowhere"], r"--published /nowhere: revbifpn.py is not there"),
        (["--output", "/dev/null/results"], r"--output /dev/null/results: cannot write"),
        (["--device", "cpu", "--graph"], r"--graph: needs CUDA"),
        (["--streams", "fixed32,int8"], r"--streams: 'int8' is unknown; choose from float32, fixed32, fixed16"),
        (["--device", "cpu", "--tf32"], r"--tf32: needs CUDA"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(arguments, message, capsys):
    assert throughput.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err


def test_everything_is_every_network_in_every_variant():
    everything = networks.catalogue()
    assert {c.variant for c in everything if c.name == "revbifpn_s3"} == VARIANTS
    assert {c.variant for c in everything if c.name == "hrnet_w18"} == {"stored", "compiled", "checkpointed"}
    assert len(everything) == len({c.key for c in everything}) == 7 * 5 + len(rivals.RIVALS) * 3
    for defaults in (*throughput.MODELS.values(), throughput.QUICK_MODELS):
        assert networks.choose(defaults, everything)


def test_streams_are_variants_of_the_fast_model_that_agree_bit_for_bit(small):
    chosen = [n for c in small for n in (c, *networks.in_streams(c, ["fixed32", "fixed16"]))]
    assert [c.key for c in chosen if c not in small] == ["revbifpn_s0/fast@fixed32", "revbifpn_s0/fast@fixed16"]
    both = [c for c in chosen if c.stream is not None]
    assert {c.kind for c in both} == {"fast"} and [c.stream for c in both] == ["fixed32", "fixed16"]
    assert [c.make().stream.name for c in both] == ["fixed32", "fixed16"]
    graphed = [n for c in both for n in networks.in_a_graph(c)]
    assert [(c.kind, c.stream) for c in graphed] == [("fast", "fixed32"), ("fast", "fixed16")]
    rows = agreement.check_agreement(both, torch.device("cpu"))
    assert [row["gradient_error"] for row in rows] == [0.0, 0.0]


def test_published_code_joins_its_networks_and_leaves_imports_alone(checkout, capsys):
    before = list(sys.path), sys.modules["revbifpn"]
    module = networks.load_published(str(checkout))
    assert (list(sys.path), sys.modules["revbifpn"]) == before
    everything = networks.catalogue(module)
    chosen = networks.choose("revbifpn_s1/fast,hrnet_w18", everything)
    (published,) = (c for c in chosen if c.variant == "published")
    assert published.key == "revbifpn_s1/published"
    capsys.readouterr()
    assert published.make(stochastic_depth=0.0).in_features == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [("import nothing_of_that_name", "ModuleNotFoundError"), ("x = 1", "defines no revbifpn_s0")],
)
def test_published_code_that_cannot_be_used_is_a_usage_error(checkout, source, message):
    (checkout / "revbifpn.py").write_text(source)
    with pytest.raises(command.UsageError, match=message):
        networks.load_published(str(checkout))


def test_published_code_runs_in_float32_on_a_cpu():
    published = networks.Network("x", "published", "RevBiFPN", "X", 70.0, lambda: nn.Linear(1, 1))
    stored = networks.Network("x", "stored", "RevBiFPN", "X", 70.0, lambda: nn.Linear(1, 1))
    dtypes = [steps.Runner(c, torch.device("cpu"), "bfloat16").dtype for c in (published, stored)]
    assert dtypes == ["float32", "bfloat16"]


@pytest.mark.slow
def test_checkpointing_keeps_gradients_and_saves_memory():
    checkpointed = networks.CheckpointedRevBiFPN("revbifpn_s0", num_ext_layers=0, classes=10, head_dropout=0.0)
    stored = revbifpn.revbifpn_s0(reversible=False, num_ext_layers=0, classes=10, head_dropout=0.0)
    stored.load_state_dict(checkpointed.state_dict())
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    (loss, gradients), (loss0, gradients0) = (
        agreement.loss_and_gradients(model.train(), images, labels) for model in (checkpointed, stored)
    )
    assert max(agreement.relative_errors(loss, gradients, loss0, gradients0)) < 1e-4
    kept = [steps.measure_step(m, (3, 64, 64), batch=2, fake=True).kept_bytes for m in (checkpointed, stored)]
    assert kept[1] > 4 * kept[0]


def test_agreement_is_measured_for_the_variants_with_code_of_their_own(small):
    rows = agreement.check_agreement(small, torch.device("cpu"))
    assert [r["contestant"] for r in rows] == ["revbifpn_s0/fast", "revbifpn_s0/reversible"]
    assert all(0 < r["gradient_error"] < 1e-4 and r["loss_error"] < 1e-5 for r in rows)


@pytest.mark.parametrize("defect", ["gradient", "none", "nan"])
def test_no_speed_is_printed_where_gradients_differ(small, defect, monkeypatch, tmp_path, capsys):
    def make(**overrides):
        model = revbifpn.fast.revbifpn_s0(**overrides)
        if defect == "none":
            model.head.fc.bias.requires_grad_(False)
        else:
            model.head.fc.weight.register_hook(lambda g: g * (1.01 if defect == "gradient" else float("nan")))
        return model

    wrong = networks.Network("revbifpn_s0", "fast", "RevBiFPN", "RevBiFPN-S0", 72.8, make)
    monkeypatch.setattr(throughput, "catalogue", lambda published=None: [wrong, *small[1:]])
    assert throughput.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and list(tmp_path.iterdir()) == []
    message = "without a gradient" if defect == "none" else "revbifpn_s0/fast disagrees with revbifpn_s0/stored"
    assert message in printed.err and printed.err.splitlines()[-1].endswith("no speed is reported")


def test_every_contestant_runs_once_per_round_and_begins_in_turn():
    calls = []
    actions = [lambda i=i: calls.append(i) for i in range(3)]
    times = timing.alternate(actions, 4, lambda action: action() or len(calls))
    assert calls == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert times == [[1, 6, 8, 10], [2, 4, 9, 11], [3, 5, 7, 12]]


def test_quantiles_are_median_p20_p80():
    assert timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_are_compared_with_the_fast_model_of_their_network_or_accuracy():
    rows = [row("s0", "fast", top1=70.0), row("s1", "fast", top1=80.0), row("s1", "fast", top1=80.0, batch=8)]
    cases = [
        (row("s0", "stored", top1=70.0), "s0"),
        (row("s1", "fast", top1=80.0), "s1"),
        (row("s2", "stored", top1=75.0), None),
        (row("a", "stored", family="HRNet", top1=69.0), "s0"),
        (row("b", "stored", family="HRNet", top1=70.5), "s1"),
        (row("c", "stored", family="HRNet", top1=81.0), None),
        (row("d", "stored", family="HRNet", top1=70.5, batch=2), None),
    ]
    found = [throughput.base_of(r, rows) for r, _ in cases]
    assert [b and b.model for b in found] == [expected for _, expected in cases]
    assert all(b is None or b.batch == r.batch for b, (r, _) in zip(found, cases, strict=True))


@pytest.mark.parametrize(
    ("variant", "error", "note"),
    [
        ("fast", torch.OutOfMemoryError("too much"), "out of memory"),
        ("compiled", RuntimeError("no compiler\nand much more"), "no compiler"),
        ("published", RuntimeError("its defect"), "its defect"),
    ],
)
def test_contestant_that_fails_keeps_a_row_that_says_why(variant, error, note):
    found = row("s0", variant)
    with throughput._noting(found):
        raise error
    assert found.note == note and note in throughput._cells(found)


def test_our_own_failures_are_not_noted_away():
    with pytest.raises(RuntimeError, match="a defect"), throughput._noting(row("s0", "fast")):
        raise RuntimeError("a defect")


@pytest.mark.parametrize("batches", ["2,3", *slow(["2"])])
def test_run_prints_tables_and_writes_json_csv_and_plot(small, batches, tmp_path, capsys):
    arguments = ["--device", "cpu", "--batch", batches, "--resolution", "32", "--rounds", "3"]
    arguments += ["--quick", "--models", "*"] if "," in batches else []
    assert throughput.main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Training step at 32 pixels, float32" in printed and "Inference at 32 pixels, float32" in printed
    assert ("Largest batch of a training step" in printed) == ("," not in batches)

    stem = tmp_path / ("throughput_cpu_float32_quick" if "," in batches else "throughput_cpu_float32")
    document = json.loads(stem.with_suffix(".json").read_text())
    assert document["environment"]["torch"] == torch.__version__ and document["settings"]["rounds"] == 3
    assert {entry["contestant"] for entry in document["settings"]["agreement"]} >= {"revbifpn_s0/fast"}
    timed = [r for r in document["rows"] if r["task"] != "capacity"]
    assert len(timed) == 4 * 2 * len(batches.split(","))
    for r in timed:
        assert 0 < r["seconds_p20"] <= r["seconds"] <= r["seconds_p80"] and r["rounds"] == 3
        assert r["images_per_second"] == pytest.approx(r["batch"] / r["seconds"])
        assert r["ratio_to"] == "RevBiFPN-S0" and r["ratio_p20"] <= r["ratio"] <= r["ratio_p80"]
        assert r["peak_bytes"] > 0
        if r["variant"] == "fast":
            assert r["ratio"] == r["ratio_p80"] == 1
        assert f"{r['images_per_second']:.1f}" in printed
    peaks = {(r["task"], r["variant"], r["batch"]): r["peak_bytes"] for r in timed if r["family"] == "RevBiFPN"}
    assert peaks["train", "stored", 2] > 2 * peaks["inference", "stored", 2]

    capacities = [r for r in document["rows"] if r["task"] == "capacity"]
    assert len(capacities) == (0 if "," in batches else 4)
    for r in capacities:
        found = [r[f"largest_batch_{g}gb"] for g in throughput.GIGABYTES]
        assert found == sorted(found) and found[0] > 0 and all(str(n) in printed for n in found)

    with stem.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    by_key = {(x["task"], x["model"], x["variant"], x["batch"], x["metric"]): float(x["value"]) for x in lines}
    assert by_key["train", "revbifpn_s0", "stored", "2", "peak_bytes"] == peaks["train", "stored", 2]
    assert {x["unit"] for x in lines if x["metric"] == "images_per_second"} == {"1/s"}
    png = stem.with_suffix(".png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_rivals_at_their_best_have_rows_and_say_why_they_do_not_run_here(small, tmp_path, capsys):
    flags = ["--reduce-overhead", "--offload", "--defaults", "--output", str(tmp_path)]
    options = ["--device", "cpu", "--quick", "--batch", "2", "--resolution", "32", "--rounds", "1"]
    assert throughput.main([*options, "--models", "theirs/stored", *flags]) == 0
    assert "not run: CUDA graphs need a GPU" in capsys.readouterr().out
    rows = json.loads((tmp_path / "throughput_cpu_float32_quick.json").read_text())["rows"]
    notes = {r["variant"]: r["note"].removesuffix(" already") for r in rows if r["task"] == "train"}
    twins = {"compiled+reduce-overhead": "CUDA graphs need a GPU", "offloaded": "its activations are the host's"}
    wanted = {"stored": "", "stored+defaults": "not run: TF32 needs a GPU"}
    for variant, reason in twins.items():
        wanted |= {variant: f"not run: {reason}", f"{variant}+defaults": f"not run: {reason}"}
    assert notes == wanted
    assert not any("offloaded" in r["variant"] for r in rows if r["task"] == "inference"), "it is the stored one there"


@pytest.mark.slow
def test_compiled_networks_keep_what_their_budget_allows(small, tmp_path):
    """One after the other in one process: what was compiled for one budget is not taken for another."""
    stored = next(c for c in small if c.name == "theirs")
    images, kept = torch.randn(4, 3, 64, 64), {}
    for network in networks.on_budgets(stored, [1.0, 0.0]):
        model, kept[network.variant] = network.make().train(), 0

        def pack(t, variant=network.variant):
            kept[variant] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(images).sum().backward()
    none, all_of_it = (kept[f"compiled+budget{budget}"] - images.nbytes for budget in (0, 1))
    assert 0 < 2 * none < all_of_it


@pytest.mark.slow
def test_budgets_are_timed_when_training(small, tmp_path):
    options = ["--device", "cpu", "--quick", "--batch", "2", "--resolution", "32", "--rounds", "1"]
    options += ["--models", "theirs/stored", "--budgets", "0.25, 0.5", "--output", str(tmp_path)]
    assert throughput.main(options) == 0
    rows = json.loads((tmp_path / "throughput_cpu_float32_quick.json").read_text())["rows"]
    variants = [(r["task"], r["variant"]) for r in rows]
    training = ["stored", "compiled+budget0.25", "compiled+budget0.5"]
    assert variants == [*(("train", variant) for variant in training), ("inference", "stored")]
    assert all(r["seconds"] > 0 for r in rows)


@pytest.mark.parametrize("budgets", ["", "0.5,2", "half"])
def test_budgets_are_fractions(budgets, capsys):
    assert throughput.main(["--budgets", f"{budgets},"]) == 2
    assert "--budgets: got" in capsys.readouterr().err


def test_offloading_keeps_gradients_and_holds_nothing_that_it_does_not_pack(monkeypatch):
    pinned = []

    class Recording(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory):
            pinned.append(pin_memory)
            super().__init__(pin_memory)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recording)
    stored = networks.Network("x", "stored", "HRNet", "X", 70.0, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    (twin,) = networks.offloaded(stored)
    offloaded = twin.make()
    x = torch.randn(3, 4)
    (wanted,) = torch.autograd.grad(offloaded.module(x).sum(), offloaded.module[0].weight)
    (found,) = torch.autograd.grad(offloaded(x).sum(), offloaded.module[0].weight)
    assert torch.equal(found, wanted) and pinned == [False], "a CPU has nothing to pin for"


def test_defaults_are_those_of_pytorch_in_the_steps_of_their_twin_only():
    class Flags(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    seen = []
    plain = networks.Network("x", "stored", "HRNet", "X", 70.0, lambda: Flags(4, 4))
    images, labels = torch.randn(2, 4), torch.tensor([0, 1])
    with steps.tf32(products=False, convolutions=False):
        for network in (plain, *networks.with_defaults(plain), plain):
            runner = steps.Runner(network, torch.device("cpu"), "float32")
            for task in ("train", "inference"):
                runner.action(task, images, labels)()
    assert seen == [(False, False)] * 2 + [(False, True)] * 2 + [(False, False)] * 2


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("throughput_*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_shown_and_drawn(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    document = json.loads(path.read_text())
    rows = [throughput.Row(**r) for r in document["rows"] if r["task"] != "capacity"]
    throughput.show(rows, document["environment"], document["settings"]["agreement"])
    throughput.show_capacities([r for r in document["rows"] if r["task"] == "capacity"], torch.device("cpu"))
    assert all(f"{r.images_per_second:.1f}" in capsys.readouterr().out for r in rows[:1])
    throughput.plots.speeds(throughput.tables(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_graph_twins_are_of_what_can_be_captured():
    everything = networks.catalogue()
    twins = [n for c in networks.choose("revbifpn_s0", everything) for n in networks.in_a_graph(c)]
    assert [c.key for c in twins] == ["revbifpn_s0/fast+graph", "revbifpn_s0/stored+graph"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_and_events_on_cuda(small, tmp_path, capsys):
    arguments = ["--device", "cuda", "--models", "*", "--batch", "4", "--resolution", "64", "--rounds", "3", "--graph"]
    assert throughput.main([*arguments, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "throughput_cuda_float32.json").read_text())
    by_key = {(r["task"], r["model"], r["variant"]): r for r in document["rows"]}
    assert by_key["train", "revbifpn_s0", "fast+graph"]["seconds"] < by_key["train", "revbifpn_s0", "fast"]["seconds"]
    assert by_key["capacity", "revbifpn_s0", "fast"]["largest_batch_8gb"] > 4
