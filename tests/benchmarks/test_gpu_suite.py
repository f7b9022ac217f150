"""The GPU suite without a GPU: a dry run of its quick parts, and what it does when parts fail, hang or have passed."""

import importlib
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_suite as suite
from benchmarks.gpu import parts, profile, runner, workers
from benchmarks.harness import command, networks, results
from tests.networks import BOTH, NARROW

Op, Part = profile.Op, parts.Part

CPU = parts.Machine("cpu", "a CPU")
GPU = parts.Machine("cuda", "NVIDIA H200", "9.0")


def python(code):
    return (sys.executable, "-c", code)


SAYS = Part("fine-first", (python("print('said this')"),))
FAILS = Part("broken", (python("print('before'); raise SystemExit('the reason')"), python("print('never reached')")))
LAST = Part("fine-last", (python("open(r'{folder}/made.txt', 'w').write('x'); print('done')"),))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the suite on the given parts; returns its exit code, what it printed, and the results by part."""

    def call(given, *arguments):
        monkeypatch.setattr(suite, "all_parts", lambda machine: given)
        code = suite.main(["--dry-run", "--output", str(tmp_path / "out"), *arguments])
        found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("out/*/result.json")}
        return code, capsys.readouterr(), found

    return call


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Running parts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_run_of_quick_parts(tmp_path, capsys):
    arguments = ["--dry-run", "--parts", "env,bandwidth,memory-agreement,sanitize", "--output", str(tmp_path)]
    assert suite.main(arguments) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "3 passed, 2 skipped" in printed and "copy bandwidth" in printed and "needs a GPU" in printed
    assert torch.__version__ in (tmp_path / "env" / "log.txt").read_text()
    rows = json.loads((tmp_path / "bandwidth" / "bandwidth.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"copy", "read", "write"}
    assert all(row["bytes_per_second"] > 0 for row in rows)
    assert "| bandwidth | passed |" in (tmp_path / "summary.md").read_text()


def test_failing_part_stops_no_other_and_counts(run):
    code, printed, found = run([SAYS, FAILS, LAST])
    assert code == 1
    assert {name: result["status"] for name, result in found.items()} == {
        "fine-first": "passed",
        "broken": "failed",
        "fine-last": "passed",
    }
    assert found["broken"]["returncode"] == 1 and found["broken"]["headline"] == "the reason"
    assert found["fine-first"]["headline"] == "said this"
    assert "never reached" not in printed.out and "    the reason" in printed.out
    assert "2 passed, 1 failed" in printed.out


def test_passed_parts_are_not_run_again_unless_forced_and_failed_ones_are(run, tmp_path):
    marker = tmp_path / "marker"
    flaky = Part("flaky", (python(f"import os, sys; sys.exit(0 if os.path.exists(r'{marker}') else 3)"),))
    assert run([LAST, flaky])[0] == 1
    made = tmp_path / "out" / "fine-last" / "made.txt"
    made.unlink()
    marker.touch()
    code, printed, found = run([LAST, flaky])
    assert code == 0 and not made.exists()
    assert "fine-last passed before" in printed.out and found["flaky"]["status"] == "passed"
    assert "2 passed" in printed.out
    run([LAST, flaky], "--force")
    assert made.exists()


def test_damaged_result_is_made_again(run, tmp_path):
    run([LAST])
    (tmp_path / "out" / "fine-last" / "result.json").write_text('{"part"')
    assert run([LAST])[2]["fine-last"]["status"] == "passed"


def test_hanging_part_is_ended_with_all_it_started(run, tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_DFL); "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open(r'{pids}', 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(60)"
    )
    start = time.monotonic()
    code, printed, found = run([Part("hangs", (python(code),), timeout=3.0), LAST])
    assert code == 1 and time.monotonic() - start < 30
    assert found["hangs"]["status"] == "timed out" and found["hangs"]["headline"].startswith("ended after")
    assert found["fine-last"]["status"] == "passed"
    deadline = time.monotonic() + 5
    while any(is_alive(int(pid)) for pid in pids.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())


def test_command_that_does_not_exist_fails_its_part(run):
    code, _, found = run([Part("absent", (("/no/such/tool", "--flag"),)), SAYS])
    assert code == 1 and "cannot be started" in found["absent"]["headline"]
    assert found["fine-first"]["status"] == "passed"


def test_nothing_is_started_without_budget(run):
    code, printed, found = run([SAYS, LAST], "--budget", str(runner.SHORTEST - 1))
    assert code == 0 and not found
    assert "2 not run" in printed.out


def test_part_that_cannot_run_is_skipped_with_the_reason(run):
    code, printed, found = run([Part("tool", (python("raise SystemExit(1)"),), skip="no such tool")])
    assert code == 0 and found["tool"]["status"] == "skipped" and "no such tool" in printed.out


def test_environment_of_a_part(run):
    show = "import os; print(os.environ['OF_THE_PART'])"
    _, _, found = run([Part("shows", (python(show),), environment={"OF_THE_PART": "7"})])
    assert found["shows"]["headline"] == "7"


def test_archive_holds_the_folder(run, tmp_path):
    archive = tmp_path / "all.tar.gz"
    run([LAST], "--archive", str(archive))
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
    assert {"out/summary.md", "out/fine-last/made.txt", "out/fine-last/result.json", "out/fine-last/log.txt"} == names


# Choosing parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["dry", "gpu"])
def test_parts_have_distinct_names_and_every_group(machine):
    found = parts.all_parts(machine)
    names = [part.name for part in found]
    assert len(set(names)) == len(names)
    groups = {"env", "build", "tests", "sanitize", "bandwidth", "kernels", "memory", "throughput", "host", "profile"}
    assert {part.group for part in found} == groups
    assert all(part.timeout <= 180 for part in found)


def test_commands_start_scripts_that_are_there():
    for machine in (CPU, GPU):
        for part in parts.all_parts(machine):
            for words in part.commands:
                scripts = [word for word in words if word.endswith(".py") and "/benchmarks/" in word]
                assert all(Path(script).is_file() for script in scripts), part.name


def test_a_gpu_gets_no_fallback_and_its_own_architecture():
    found = {part.name: part for part in parts.all_parts(GPU)}
    assert found["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    measured = [p for p in found.values() if p.group in ("tests", "kernels", "throughput", "profile", "sanitize")]
    assert all(part.environment["REVKERNELS_REQUIRE"] == "cpp,cuda,triton" for part in measured)


def parsed(part):
    """Parse the command of a benchmark's part with the benchmark's own parser."""
    words = part.commands[0]
    script = Path(words[1]).stem
    parser = importlib.import_module(f"benchmarks.{script}")._parser()
    return script, parser.parse_args(words[2:])


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["dry", "gpu"])
@pytest.mark.parametrize("script", ["memory_vs_hrnet", "throughput", "kernels", "host"])
def test_benchmarks_know_the_options_and_models_they_are_given(machine, script):
    module = importlib.import_module(f"benchmarks.{script}")
    own = [part for part in parts.all_parts(machine) if Path(part.commands[0][1]).stem == script]
    assert own
    for part in own:
        _, arguments = parsed(part)
        assert script == "host" or arguments.device == machine.device
        if script != "kernels":
            everything = module.candidates() if script == "memory_vs_hrnet" else networks.catalogue()
            assert networks.choose(arguments.models, everything)


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (["bandwidth"], ["bandwidth"]),
        (["sanitize"], ["sanitize-memcheck", "sanitize-racecheck"]),
        (["tests-m*", "env"], ["env", "tests-model"]),
    ],
)
def test_parts_are_chosen_by_name_group_and_wildcard_in_their_order(patterns, expected):
    assert [part.name for part in suite.select(",".join(patterns), parts.all_parts(GPU))] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dry-run", "--parts", "bandwith"], "did you mean bandwidth"),
        (["--dry-run", "--parts", "nothing"], "choose from bandwidth"),
        (["--nonsense"], "unrecognized arguments"),
        (["--dry-run", "--output", "/dev/null/x"], "cannot write there"),
        pytest.param(
            [],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about its absence"),
        ),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys):
    assert suite.main(arguments) == os.EX_USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


# Profile --------------------------------------------------------------------------------------------

IMAGE, DENSE, DEPTHWISE = [8, 24, 56, 56], [24, 24, 1, 1], [24, 1, 3, 3]
CASES = [
    ("sgemm", [Op("aten::bmm")], profile.PRODUCT),
    ("dw", [Op("aten::_conv_depthwise2d", [IMAGE, DEPTHWISE])], profile.DEPTHWISE),
    ("fwd", [Op("aten::cudnn_convolution", [IMAGE, DENSE])], profile.PRODUCT),
    ("wgrad", [Op("aten::convolution_backward", [IMAGE, IMAGE, DEPTHWISE])], profile.DEPTHWISE_GRADIENT),
    ("wgrad", [Op("aten::convolution_backward", [IMAGE, IMAGE, DENSE])], profile.PRODUCT),
    ("nchw", [Op("aten::copy_"), Op("aten::convolution_backward", [IMAGE, IMAGE, DEPTHWISE])], profile.COPY),
    ("Memcpy DtoD", [Op("aten::convolution_backward", [IMAGE, IMAGE, DEPTHWISE])], profile.COPY),
    ("bn_bw", [Op("aten::native_batch_norm_backward"), Op("NativeBatchNormBackward0")], profile.NORM),
    ("k", [Op("revkernels::depthwise_conv_grad_weight")], profile.DEPTHWISE_GRADIENT),
    ("k", [Op("revkernels::depthwise_conv")], profile.DEPTHWISE),
    ("k", [Op("revkernels::couple_adjoint")], profile.COUPLING),
    ("k", [Op("revkernels::bn_act_grad_sums")], profile.FUSED_NORM),
    ("k", [Op("revkernels::se_gate_grad")], profile.SQUEEZE),
    ("k", [Op("revkernels::space_to_depth")], profile.RESAMPLE),
    ("k", [Op("aten::upsample_bilinear2d_backward")], profile.RESAMPLE),
    ("k", [Op("aten::hardswish_backward")], profile.ACTIVATION),
    ("k", [Op("aten::add_")], profile.ELEMENTWISE),
    ("k", [Op("unattributed")], profile.OTHER),
    ("k", [], profile.OTHER),
]


@pytest.mark.parametrize("kernel, ops, expected", CASES, ids=[f"{o[0].name if o else 'none'}-{e}" for _, o, e in CASES])
def test_kernels_are_sorted_by_what_launched_them(kernel, ops, expected):
    assert profile.category(kernel, ops) == expected


def test_every_kernel_of_a_profile_counts_once():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def op(name, kernels=(), parent=None):
        found = [SimpleNamespace(name=n, duration=t) for n, t in kernels]
        return SimpleNamespace(name=name, device_type=cpu, kernels=found, cpu_parent=parent, input_shapes=[])

    def kernel(name, microseconds):
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=cuda, is_user_annotation=False, time_range=span)

    outer = op("aten::convolution_backward")
    inner = op("aten::copy_", [("a", 2.0), ("a", 3.0)], outer)
    events = [outer, inner, kernel("a", 2.0), kernel("a", 3.0), kernel("a", 5.0), kernel("b", 7.0)]
    found = list(profile.launches(events, "cuda"))
    assert [(launch.kernel, launch.microseconds) for launch in found] == [
        ("a", 2.0),
        ("a", 3.0),
        ("a", 5.0),
        ("b", 7.0),
    ]
    assert [o.name for o in found[0].ops] == ["aten::copy_", "aten::convolution_backward"]
    assert found[2].ops == (Op("unattributed"),)


@pytest.mark.slow
def test_profile_of_a_small_step_sums_to_one(tmp_path, monkeypatch, capsys):
    def small(module):
        return lambda **given: module.RevBiFPN(**(NARROW | given))

    for module in BOTH.values():
        monkeypatch.setattr(module, "revbifpn_s0", small(module))
    monkeypatch.setattr(profile, "_median_seconds", lambda *_: 0.001)
    profile.work_profile(tmp_path, "cpu", "s0", 2, 32, ["float32"])
    rows = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["stored", "reversible", "fast"]
    for row in rows:
        shares = {key: value for key, value in row.items() if key.startswith("share_")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert sum(value for key, value in row.items() if key.startswith("launches_")) == row["launches"] > 100
    stored, reversible, fast = rows
    assert stored["launches"] < reversible["launches"]
    assert f"share_{profile.COUPLING}" in fast and f"share_{profile.COUPLING}" not in stored
    assert 0 < 5 * fast[f"launches_{profile.NORM}"] < stored[f"launches_{profile.NORM}"]  # the last convolution's
    assert "depthwise gradients" in (tmp_path / "profile.md").read_text()
    assert (tmp_path / "kernels.csv").read_text().count("\n") > 50


# Agreement ------------------------------------------------------------------------------------------


def test_agreement_joins_the_two_meters(tmp_path, monkeypatch, capsys):
    def document(path, *rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = ("setting", "model", "variant", "resolution", "dtype", "bytes_per_sample")
        path.write_text(json.dumps({"rows": [dict(zip(keys, row, strict=True)) for row in rows]}))

    equal = ("equal", "revbifpn_s0", "fast", 224, "float32")
    document(
        tmp_path / "results" / "memory_vs_hrnet_cpu_float32.json", (*equal, 100.0), ("equal", "x", "y", 1, "z", 1.0)
    )
    document(tmp_path / "results" / "memory_vs_hrnet_cpu_float32_quick.json", (*equal, 1.0))
    document(tmp_path / "gpu" / "memory-a" / "memory_vs_hrnet_cuda_float32.json", (*equal, 110.0))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    folder = tmp_path / "gpu" / "memory-agreement"
    folder.mkdir()
    workers.work_agreement(folder)
    assert capsys.readouterr().out.strip().endswith("1 of 1 figures within 15 % of the CPU's")
    assert "1.100" in (folder / "agreement.csv").read_text()


# Implementations ------------------------------------------------------------------------------------


def test_reference_on_a_gpu_is_a_failure(tmp_path, monkeypatch):
    from revkernels import env

    report = env.collect()
    for op, used in report["ops"].items():
        used["cuda"] = "reference" if op == "couple_" else "triton"
    monkeypatch.setattr(env, "collect", lambda: report)
    with pytest.raises(command.BenchmarkError, match="no CUDA kernel for couple_"):
        workers.work_implementations(tmp_path, "cuda")
    report["ops"]["couple_"]["cuda"] = "triton"
    workers.work_implementations(tmp_path, "cuda")
