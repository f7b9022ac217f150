"""The training scripts end to end: train, be killed, go on, evaluate, export; one process and two."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import revbifpn
from tests.adapters import frameworks

frameworks.on_torchvision("torchvision")
pytest.importorskip("revbifpn.training")

from benchmarks.harness import scripts  # noqa: E402
from revbifpn.training.checkpoints import plain, read  # noqa: E402
from tests.marks import slow  # noqa: E402
from tests.training import small  # noqa: E402
from tests.training.small import CLASSIFICATION, SEGMENTATION  # noqa: E402

make_patterns = scripts.load("make_patterns")
EXPORTS = ["safetensors", "onnx"] if importlib.util.find_spec("onnxscript") else ["safetensors"]


SCRIPT = """
import sys
sys.path.append(sys.argv[1])
from benchmarks.harness import rivals, scripts
rivals.import_timm()
from revbifpn.training.run import entry
sys.exit(entry(scripts.load(sys.argv[2]).main)(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images of three classes to train on, four to evaluate on."""
    folder = tmp_path_factory.mktemp("images")
    make_patterns.write_classes(folder, 12)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    make_patterns.write_masks(folder, 8)
    return folder


def together(argv, folder, *, codes=(0, 0), **more):
    """Two processes of one group come to these ends."""
    lives = small.group(CLASSIFICATION, argv, folder, **more)
    found = [life.wait() for life in lives]
    assert found == list(codes), lives[0].output() + lives[1].output()


def assert_close_runs(one, other, rtol=1e-4):
    (curves, _), (others, _) = small.outcome(one), small.outcome(other)
    assert [name for name, _ in curves] == [name for name, _ in others]
    for (_, points), (_, other_points) in zip(curves, others, strict=True):
        torch.testing.assert_close(torch.tensor(points), torch.tensor(other_points), rtol=rtol, atol=rtol / 10)


def test_a_run_that_was_killed_and_terminated_is_the_run_that_was_not(images, tmp_path):
    everything = ["--mixup", 0.2, "--ema", 0.9, "--random-erasing", 0.5, "--auto-augment", "rand-m9-mstd0.5"]
    whole = small.options(images, tmp_path / "whole", *everything, epochs=4)
    code, text = small.run(CLASSIFICATION, whole, tmp_path)
    assert code == 0, text
    ends = {small.killed_in_step_5: -signal.SIGKILL, small.killed_while_writing: -signal.SIGKILL}
    ends |= {small.terminated_in_step_3: 75}
    broken = small.options(images, tmp_path / "broken", *everything, "--resume", epochs=4)
    for before, expected in ends.items():
        code, text = small.run(CLASSIFICATION, broken, tmp_path, before=before)
        assert code == expected, text
    assert "SIGTERM: saved" in text
    code, text = small.run(CLASSIFICATION, broken, tmp_path)
    assert code == 0, text
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")
    for name in ("curves.png", "confusion.png", "best.ckpt"):
        assert (tmp_path / "broken" / name).stat().st_size > 0
    code, text = small.run(CLASSIFICATION, whole, tmp_path)
    assert code == 2 and "has a run already" in text and "--resume" in text
    code, text = small.run(CLASSIFICATION, [*whole[:8], "--lr", 1, *broken[8:], "fc_features=48"], tmp_path)
    assert code == 2 and "lr 0.001, now 1.0" in text and "model-kwargs" in text


@pytest.mark.parametrize(
    "kind",
    [
        "shards",
        *slow(["data workers", "float16", "fixed16", "masks by name"]),
    ],
)
def test_other_runs_that_were_killed_are_the_runs_that_were_not(kind, images, masks, tmp_path):
    script, data, more, epochs = CLASSIFICATION, images, ["--ema", 0.9], 2
    if kind == "shards":
        pytest.importorskip("webdataset")
        data = None
        small.write_shards(tmp_path, [9, 5, 6])
        more += ["--shards", tmp_path / "{0..1}.tar", "--val-shards", tmp_path / "2.tar", "--samples", 16]
        more += ["--classes", 3, "--workers", 2]
    elif kind == "data workers":
        more += ["--workers", 2, "--random-erasing", 0.5]
    elif kind == "float16":
        more += ["--precision", "float16", "--clip-norm", 1]
    elif kind == "fixed16":
        more += ["--precision", "bfloat16", "--stream", "fixed16", "--opt", "lion", "--sched", "step"]
    else:
        script, data, epochs = SEGMENTATION, tmp_path, 3
        small.write_voc(tmp_path, masks)
        more = ["--dataset", "torchvision/VOCSegmentation", "--classes", 3, "--width", 16, "--max-memory", "3MB"]
    whole, broken = (small.options(data, tmp_path / name, *more, epochs=epochs) for name in ("whole", "broken"))
    code, text = small.run(script, whole, tmp_path)
    assert code == 0 and "best epoch: loss" in text, text
    broken = [*broken[:2], "--resume", *broken[2:]]
    for before, expected in (
        (small.killed_in_step_3, -signal.SIGKILL),
        (small.killed_in_step_3, -signal.SIGKILL),
        (None, 0),
    ):
        code, text = small.run(script, broken, tmp_path, before=before)
        assert code == expected, text
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_segmentation_trains_within_its_memory_and_exports(masks, tmp_path):
    more = ["--classes", 3, "--width", 16, "--max-memory", "3MB", "--precision", "bfloat16", "--stream", "fixed16"]
    more += ["--layer-decay", 0.8, "--export", *EXPORTS]
    argv = small.options(masks, tmp_path / "out", *more)
    argv[argv.index("--batch") : argv.index("--batch") + 2] = []
    code, text = small.run(SEGMENTATION, argv, tmp_path)
    assert code == 0, text
    assert "expects" in text and "measured" in text and "iou" in text
    for name in ("samples.png", "confusion.png", *(f"model.{e}" for e in EXPORTS)):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.slow
def test_an_exported_classifier_computes_what_was_evaluated(images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    argv = small.options(images, tmp_path / "out", "--export", "onnx", "safetensors", "--mixup", 0.2, epochs=1)
    code, text = small.run(CLASSIFICATION, argv, tmp_path)
    assert code == 0, text
    script = scripts.load(CLASSIFICATION)
    o = script.options(
        [str(word) for word in [*argv[:8], "--weights", tmp_path / "out" / "model.safetensors", *argv[8:]]]
    )
    model = script.backbone(o, 3).eval()
    batch = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(batch).detach(), rtol=1e-3, atol=1e-4)


def test_two_processes_train_on_what_one_with_twice_the_accumulation_trains_on(images, tmp_path):
    still = ["--freeze-norms", "--batch", 5, "--hflip", 0.5]  # of 12 images, 10 in an epoch; of 4, all
    network = ["head_dropout=0.0"]
    one = small.options(images, tmp_path / "one", *still, "--accumulate", 2) + network
    code, text = small.run(CLASSIFICATION, one, tmp_path)
    assert code == 0, text
    together(small.options(images, tmp_path / "two", *still) + network, tmp_path)
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    (_, weights), (_, other_weights) = small.outcome(tmp_path / "one"), small.outcome(tmp_path / "two")
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=1e-4)


def test_when_one_of_two_processes_is_killed_both_go_on_from_the_checkpoint(images, tmp_path):
    more = ["--batch", 3, "--ema", 0.9]
    together(small.options(images, tmp_path / "whole", *more), tmp_path)
    argv = small.options(images, tmp_path / "broken", *more)
    lives = small.group(CLASSIFICATION, argv, tmp_path, before=small.killed_in_step_3_of_rank_1)
    assert lives[1].wait() == -signal.SIGKILL, lives[1].output()
    lives[0].signal()  # as torchrun ends the others
    lives[0].wait()
    together(argv, tmp_path, restart=1)
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_sharded_processes_train_to_the_same_losses_and_go_on(images, tmp_path):
    more = ["--batch", 3, "--freeze-norms"]
    ends = {"ddp": [], "fsdp": ["--strategy", "fsdp"]}
    for name, strategy in ends.items():
        argv = small.options(images, tmp_path / name, *more, *strategy) + ["head_dropout=0.0"]
        together(argv, tmp_path)
    assert_close_runs(tmp_path / "ddp", tmp_path / "fsdp")
    argv = small.options(images, tmp_path / "broken", *more, *ends["fsdp"]) + ["head_dropout=0.0"]
    together(argv, tmp_path, codes=[-signal.SIGKILL] * 2, before=small.killed_in_step_3)
    together(argv, tmp_path, restart=1)
    small.assert_same_run(tmp_path / "fsdp", tmp_path / "broken")


@pytest.mark.slow
def test_synchronised_norms_of_two_processes_are_those_of_one_with_the_whole_batch(images, tmp_path):
    network = ["head_dropout=0.0"]
    code, text = small.run(CLASSIFICATION, small.options(images, tmp_path / "one", "--batch", 6) + network, tmp_path)
    assert code == 0, text
    argv = small.options(images, tmp_path / "two", "--batch", 3, "--sync-norms") + network
    together(argv, tmp_path, before=small.norms_synchronised_on_a_cpu)
    # Other kernels' rounding, which norms of a few values make larger.
    assert_close_runs(tmp_path / "one", tmp_path / "two", rtol=3e-4)
    together(small.options(images, tmp_path / "apart", "--batch", 3) + network, tmp_path)
    (curves, _), (others, _) = (small.outcome(tmp_path / name) for name in ("one", "apart"))
    assert dict(curves)["train/loss"][-1][1] != pytest.approx(dict(others)["train/loss"][-1][1], rel=1e-3)


@pytest.mark.slow
def test_compressed_gradients_train_nearly_alike(images, tmp_path):
    more = ["--batch", 3, "--freeze-norms"]
    ends = {"plain": [], "float16": ["--compress", "float16"], "powersgd": ["--compress", "powersgd"]}
    for name, own in ends.items():
        together(small.options(images, tmp_path / name, *more, *own) + ["head_dropout=0.0"], tmp_path)
    assert_close_runs(tmp_path / "plain", tmp_path / "float16", rtol=2e-2)
    weights, halves = (small.outcome(tmp_path / name)[1] for name in ("plain", "float16"))
    assert any(not torch.equal(weights[name], halves[name]) for name in weights)
    small.assert_same_run(tmp_path / "plain", tmp_path / "powersgd")  # which compresses after a hundred steps


@pytest.mark.slow
def test_when_one_of_two_processes_is_terminated_both_save_and_go_on(images, tmp_path):
    more = ["--batch", 3, "--save-every", 100]
    together(small.options(images, tmp_path / "whole", *more), tmp_path)
    argv = small.options(images, tmp_path / "broken", *more, "--resume")
    together(argv, tmp_path, codes=[75, 75], before=small.terminated_in_step_3_of_rank_1)
    together(argv, tmp_path)
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_torchrun_restarts_both_processes_when_one_is_killed_and_nothing_is_lost(images, tmp_path):
    more = ["--batch", 3, "--ema", 0.9]
    together(small.options(images, tmp_path / "whole", *more, epochs=6), tmp_path)
    argv = [str(word) for word in small.options(images, tmp_path / "broken", *more, epochs=6)]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["--max-restarts", "1", str(script), str(scripts.ROOT), CLASSIFICATION, *argv]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(revbifpn.__file__).parents[1]),
    }
    log = tmp_path / "torchrun.log"
    with log.open("w") as file:
        agent = subprocess.Popen(run, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while agent.poll() is None and small.logged(tmp_path / "broken") < 3:
                time.sleep(0.01)
            os.kill(small.process_of_rank(1, agent.pid), signal.SIGKILL)
            assert agent.wait(300) == 0, log.read_text()
        finally:
            agent.kill()
    assert "Signal 9 (SIGKILL)" in log.read_text() or "exitcode: -9" in log.read_text().lower()
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer-in-backward"],
        ["--graphed", "--accumulate", 2],
        *slow([["--stored"], ["--compile"]]),
    ],
    ids=lambda more: more[0],
)
def test_other_ways_of_a_step_train_alike(images, tmp_path, more):
    accumulate = more[1:] if "--accumulate" in more else []
    before = small.without_a_compiler if "--compile" in more else None
    for name, own in (("ordinary", accumulate), ("other", more)):
        argv = small.options(images, tmp_path / name, "--batch", 3, *own) + ["head_dropout=0.0"]
        code, text = small.run(CLASSIFICATION, argv, tmp_path, before=before)
        assert code == 0, text
    assert_close_runs(tmp_path / "ordinary", tmp_path / "other", rtol=1e-3)


def test_weights_of_other_classes_are_taken_and_those_of_another_network_refused(images, tmp_path):
    from revbifpn import save_checkpoint
    from revbifpn.fast import RevBiFPN

    narrow = dict(word.split("=") for word in small.NETWORK)
    arguments = {name: eval(value) for name, value in narrow.items()}
    save_checkpoint(RevBiFPN(**arguments, classes=7), tmp_path / "seven.pth")
    code, text = small.run(
        CLASSIFICATION, small.options(images, tmp_path / "a", "--weights", tmp_path / "seven.pth", epochs=1), tmp_path
    )
    assert code == 0, text
    save_checkpoint(RevBiFPN(**arguments | {"channels": [48, 32, 16, 16]}, classes=3), tmp_path / "wide.pth")
    code, text = small.run(
        CLASSIFICATION, small.options(images, tmp_path / "b", "--weights", tmp_path / "wide.pth"), tmp_path
    )
    assert code == 2 and "wide.pth: this is a checkpoint of" in text and "--arch" in text


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(images, tmp_path):
    argv = small.options(images, tmp_path / "out", "--resume")
    code, text = small.run(CLASSIFICATION, argv, tmp_path, before=small.terminated_in_step_3)
    assert code == 75, text
    before = (tmp_path / "out" / "last.ckpt").read_bytes()
    code, text = small.run(CLASSIFICATION, argv, tmp_path, before=small.full_disk)
    assert code == 74 and "last.ckpt: cannot be written" in text and "what was there before is whole" in text, text
    assert (tmp_path / "out" / "last.ckpt").read_bytes() == before
    assert not (tmp_path / "out" / "last.ckpt.partial").exists()


def test_a_data_worker_that_dies_is_named(images, tmp_path):
    argv = small.options(images, tmp_path / "out", "--workers", 1)
    code, text = small.run(CLASSIFICATION, argv, tmp_path, before=small.killed_data_worker)
    assert code == 1 and "data worker" in text and "died" in text and "--resume" in text, text


@pytest.mark.parametrize("before", [small.permissions_hold, small.read_only_in_step_3])
def test_a_read_only_folder_is_named_and_what_was_saved_is_whole(before, images, tmp_path):
    output = tmp_path / "out"
    output.mkdir(mode=0o500 if before is small.permissions_hold else 0o700)
    code, text = small.run(CLASSIFICATION, small.options(images, output), tmp_path, before=before)
    output.chmod(0o700)
    assert code == 74 and str(output) in text and "cannot be written: Permission denied" in text, text
    if before is small.read_only_in_step_3:
        assert read(output / "last.ckpt")["global_step"] == 2


def test_a_corrupt_image_ends_the_run_by_name_or_is_skipped_and_counted(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    bad = sorted((folder / "train").rglob("*.png"))[5], sorted((folder / "val").rglob("*.png"))[0]
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    argv = small.options(folder, tmp_path / "raise", "--workers", 1, epochs=1)
    code, text = small.run(CLASSIFICATION, argv, tmp_path)
    assert code == 65 and text.count("\n") == 1 and f"{bad[0]}: no image" in text and "--on-corrupt skip" in text, text
    argv = small.options(folder, tmp_path / "skip", "--workers", 1, "--on-corrupt", "skip", epochs=1)
    code, text = small.run(CLASSIFICATION, argv, tmp_path)
    assert code == 0 and "2 images were skipped, the first is" in text, text
    assert all(str(path) in (tmp_path / "skip" / "skipped.txt").read_text() for path in bad)


def test_a_data_set_is_trained_on_by_its_name(tmp_path):
    small.write_mnist(tmp_path, (12, 4))
    more = ["--dataset", "torchvision/MNIST", "--in-chans", 1, "--cutmix", 1.0]
    code, text = small.run(CLASSIFICATION, small.options(tmp_path, tmp_path / "out", *more, epochs=1), tmp_path)
    assert code == 0 and "top5" in text, text


# Without a run ----------------------------------------------------------------------------------


@pytest.fixture
def refusal(images, tmp_path):
    """What the script says, and its exit code, without training."""

    def run(*more, script=CLASSIFICATION, data=images):
        from revbifpn.training.errors import TrainingError

        with pytest.raises(TrainingError) as caught:
            scripts.load(script).main([str(word) for word in small.options(data, tmp_path / "out", *more)])
        return str(caught.value), caught.value.exit_code

    return run


def test_options_that_exclude_one_another_are_refused(refusal):
    for more in (
        ["--optimizer-in-backward", "--accumulate", 2],
        ["--graphed", "--compile"],
        ["--strategy", "fsdp", "--ema", 0.9],
        ["--optimizer-in-backward", "--precision", "float16"],
        ["--resolution", 40],
        ["--sync-norms"],
        ["--mixup", 0.2, "--batch", 3],
        ["--opt", "adamm"],
        ["--sched", "cosin"],
        ["--workers", -1],
        ["--compress", "bfloat16", "--devices", 2],
        ["--compress", "float16"],
    ):
        text, code = refusal(*more)
        assert more[0] in text and code == 2


def test_a_batch_that_does_not_fit_the_memory_is_refused_with_one_that_does(refusal):
    text, code = refusal("--max-memory", "2MB", "--batch", 4000)
    assert code == 2 and "--batch 4000 does not fit" in text and "fits" in text


def test_one_class_is_nothing_to_tell_apart(refusal, images, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(images / split / "red", tmp_path / "one" / split / "red")
    text, code = refusal(data=tmp_path / "one")
    assert code == 65 and "one: has 1 class; expected at least two" in text


def test_a_config_is_read_and_its_mistakes_are_named(refusal, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning-rate: 3\n")
    text, _ = refusal("--config", config)
    assert "config.yaml: there is no option --learning-rate" in text
    config.write_text("arch: revbifpn_s9\nmax-memory: 2MB\n")
    text, _ = refusal("--config", config)
    assert "config.yaml: --arch revbifpn_s9: expected one of revbifpn_s0, " in text
    config.write_text("max-memory: 1MB\nlr: 1e-3\n")
    assert "--batch 4 does not fit" in refusal("--config", config)[0]


def test_a_file_in_the_place_of_the_folder_is_refused(refusal, tmp_path):
    (tmp_path / "out").write_text("")
    text, code = refusal()
    assert code == 74 and "cannot be written" in text


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(images, refusal, tmp_path):
    (tmp_path / "out").mkdir()
    o = scripts.load(CLASSIFICATION).options([str(w) for w in small.options(images, tmp_path / "out")])
    about = vars(o) | {"arch": "revbifpn_s3", "samples": 12, "classes": ["blue", "green", "red"], "model_kwargs": {}}
    torch.save({"revbifpn": {"format": 1, "about": plain(about)}, "global_step": 1}, tmp_path / "out" / "last.ckpt")
    text, code = refusal("--resume")
    assert code == 2 and "last.ckpt: made with arch 'revbifpn_s3', now 'revbifpn_s0'; model-kwargs" in text
    assert "give the same options" in text and "--weights" in text


def test_a_checkpoint_of_a_newer_version_or_of_something_else_is_refused(refusal, tmp_path):
    (tmp_path / "out").mkdir()
    last = tmp_path / "out" / "last.ckpt"
    torch.save({"revbifpn": {"format": 99, "about": {}}}, last)
    assert "written by a newer version (format 99" in refusal("--resume")[0]
    torch.save({"state_dict": {}}, last)
    assert "not a checkpoint of these scripts" in refusal("--resume")[0]
    last.write_bytes(b"PK half")
    assert "no checkpoint can be read" in refusal("--resume")[0]
