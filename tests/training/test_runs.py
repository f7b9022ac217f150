"""The training scripts end to end: train, be killed, go on, evaluate, export; one process and two."""

import importlib.util
import os
import signal
import stat

import pytest
import torch

from tests.adapters import frameworks

frameworks.on_torchvision("torchvision")
pytest.importorskip("revbifpn.training")

from benchmarks.harness import scripts  # noqa: E402
from tests.training import small  # noqa: E402
from tests.training.small import CLASSIFICATION, SEGMENTATION  # noqa: E402

make_patterns = scripts.load("make_patterns")
EXPORTS = ["safetensors", "onnx"] if importlib.util.find_spec("onnxscript") else ["safetensors"]


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
    assert code == 2 and "model-kwargs" in text and "now" in text


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


def test_two_processes_train_on_what_one_with_twice_the_accumulation_trains_on(images, tmp_path):
    still = ["--freeze-norms", "--batch", 3, "--hflip", 0.5]
    network = ["head_dropout=0.0"]
    one = small.options(images, tmp_path / "one", *still, "--accumulate", 2) + network
    code, text = small.run(CLASSIFICATION, one, tmp_path)
    assert code == 0, text
    lives = small.group(CLASSIFICATION, small.options(images, tmp_path / "two", *still) + network, tmp_path)
    codes = [life.wait() for life in lives]
    assert codes == [0, 0], lives[0].output() + lives[1].output()
    (curves, weights), (others, other_weights) = small.outcome(tmp_path / "one"), small.outcome(tmp_path / "two")
    assert [name for name, _ in curves] == [name for name, _ in others]
    for (_, points), (_, other_points) in zip(curves, others, strict=True):
        torch.testing.assert_close(torch.tensor(points), torch.tensor(other_points), rtol=1e-4, atol=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-3, atol=1e-4)


def test_when_one_of_two_processes_is_killed_both_go_on_from_the_checkpoint(images, tmp_path):
    more = ["--batch", 3, "--ema", 0.9]
    lives = small.group(CLASSIFICATION, small.options(images, tmp_path / "whole", *more), tmp_path)
    assert [life.wait() for life in lives] == [0, 0], lives[0].output() + lives[1].output()
    argv = small.options(images, tmp_path / "broken", *more)
    lives = small.group(CLASSIFICATION, argv, tmp_path, before=small.killed_in_step_3_of_rank_1)
    assert lives[1].wait() == -signal.SIGKILL, lives[1].output()
    lives[0].signal()  # as torchrun ends the others
    lives[0].wait()
    lives = small.group(CLASSIFICATION, argv, tmp_path, restart=1)
    assert [life.wait() for life in lives] == [0, 0], lives[0].output() + lives[1].output()
    small.assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_sharded_processes_train_to_the_same_losses_and_go_on(images, tmp_path):
    more = ["--batch", 3, "--freeze-norms"]
    ends = {"ddp": [], "fsdp": ["--strategy", "fsdp"]}
    for name, strategy in ends.items():
        argv = small.options(images, tmp_path / name, *more, *strategy) + ["head_dropout=0.0"]
        lives = small.group(CLASSIFICATION, argv, tmp_path)
        assert [life.wait() for life in lives] == [0, 0], lives[0].output() + lives[1].output()
    (curves, _), (others, _) = (small.outcome(tmp_path / name) for name in ends)
    for (_, points), (_, other_points) in zip(curves, others, strict=True):
        torch.testing.assert_close(torch.tensor(points), torch.tensor(other_points), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer-in-backward"],
        ["--graphed", "--accumulate", 2],
        pytest.param(["--stored"], marks=pytest.mark.slow),
    ],
    ids=lambda more: more[0],
)
def test_other_ways_of_a_step_train_alike(images, tmp_path, more):
    accumulate = more[1:]
    for name, own in (("ordinary", accumulate), ("other", more)):
        argv = small.options(images, tmp_path / name, "--batch", 3, *own) + ["head_dropout=0.0"]
        code, text = small.run(CLASSIFICATION, argv, tmp_path)
        assert code == 0, text
    (curves, _), (others, _) = (small.outcome(tmp_path / name) for name in ("ordinary", "other"))
    for (_, points), (_, other_points) in zip(curves, others, strict=True):
        torch.testing.assert_close(torch.tensor(points), torch.tensor(other_points), rtol=1e-3, atol=1e-4)


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
        ["--precision", "float16"],
        ["--resolution", 40],
        ["--sync-norms"],
    ):
        text, code = refusal(*more)
        assert more[0] in text and code == 2


def test_a_batch_that_does_not_fit_the_memory_is_refused_with_one_that_does(refusal):
    text, code = refusal("--max-memory", "2MB", "--batch", 4000)
    assert code == 2 and "--batch 4000 does not fit" in text and "fits" in text


def test_a_config_is_read_and_its_mistakes_are_named(refusal, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("learning-rate: 3\n")
    text, _ = refusal("--config", config)
    assert "config.yaml: there is no option --learning-rate" in text


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(refusal, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    text, code = refusal()
    assert code == 74 and "cannot be written" in text


def test_a_file_in_the_place_of_the_folder_is_refused(refusal, tmp_path):
    (tmp_path / "out").write_text("")
    text, code = refusal()
    assert code == 74 and "cannot be written" in text


def test_a_checkpoint_of_a_newer_version_or_of_something_else_is_refused(refusal, tmp_path):
    (tmp_path / "out").mkdir()
    last = tmp_path / "out" / "last.ckpt"
    torch.save({"revbifpn": {"format": 99, "about": {}}}, last)
    assert "written by a newer version (format 99" in refusal("--resume")[0]
    torch.save({"state_dict": {}}, last)
    assert "not a checkpoint of these scripts" in refusal("--resume")[0]
    last.write_bytes(b"PK half")
    assert "no checkpoint can be read" in refusal("--resume")[0]
