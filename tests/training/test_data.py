"""Which samples make up a batch, in which order, and what is wrong with an image."""

import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.adapters import frameworks

frameworks.on_torchvision("torchvision")
pytest.importorskip("revbifpn.training")

from revbifpn.training import data, shards  # noqa: E402
from revbifpn.training.errors import DataError, OptionError  # noqa: E402
from tests.training import small  # noqa: E402


def indices(batches):
    return [[index for _, index, counts in batch if counts] for batch in batches]


def as_tensor(image, target):
    return torch.tensor(np.array(image)), target


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (label * 100, i * 10, 0)).save(place / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_take_the_batches_of_one_sequence_in_turns(world):
    whole = indices(data.Batches(31, 2, group=world, seed=3, train=True))
    parts = [indices(data.Batches(31, 2, rank=r, world=world, seed=3, train=True)) for r in range(world)]
    assert [parts[k % world][k // world] for k in range(len(parts[0]) * world)] == whole


@pytest.mark.parametrize("samples, batch, world", [(7, 2, 2), (1, 4, 2), (8, 4, 1), (9, 2, 3)])
def test_every_sample_is_evaluated_once_and_processes_have_as_many_batches(samples, batch, world):
    parts = [data.Batches(samples, batch, rank=r, world=world, train=False) for r in range(world)]
    assert len({len(list(part)) for part in parts}) == 1
    assert sorted(i for part in parts for own in indices(part) for i in own) == list(range(samples))


def test_an_epoch_has_an_order_of_its_own_and_goes_on_where_it_was():
    batches = data.Batches(20, 3, seed=1, train=True)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert len(first) == len(second) == 6 and indices(first) != indices(second)
    other = data.Batches(20, 3, seed=1, train=True)
    other.load_state_dict({"epoch": 1, "position": 4})
    assert list(other) == second[4:]
    other.load_state_dict({"epoch": 0, "position": 6})
    assert list(other) == second


def test_fewer_images_than_a_step_needs_are_refused():
    with pytest.raises(OptionError, match="need 24 images for one step, the data set has 23"):
        data.Batches(23, 4, world=2, group=3, train=True)


def test_a_sample_is_augmented_alike_wherever_it_is_read(folder):
    def noisy(image, target):
        return torch.rand(2) + random.random() + np.random.rand(), target

    torch.manual_seed(0)
    samples = data.Samples(data.ImageFolder(folder / "train"), noisy, seed=0, train=True)
    one = samples[2, 1, True][0]
    before = torch.get_rng_state()
    samples[2, 0, True]
    assert torch.equal(samples[2, 1, True][0], one) and not torch.equal(samples[3, 1, True][0], one)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda f: [p.unlink() for p in (f / "train" / "dog").iterdir()], "train/dog: an empty class"),
        (lambda f: (f / "val" / "emu").mkdir(), "val/emu: class 'emu' appears only in this split"),
        (lambda f: shutil.rmtree(f / "train"), "train: cannot be listed"),
    ],
)
def test_a_bad_folder_is_named(folder, change, match):
    change(folder)
    with pytest.raises(DataError, match=match):
        data.ImageFolder(folder / "val", data.ImageFolder(folder / "train").classes)


def test_a_corrupt_image_is_named_or_gives_way_to_the_next(folder, tmp_path):
    bad = folder / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    source, skipped = data.ImageFolder(folder / "train"), tmp_path / "skipped.txt"
    with pytest.raises(DataError, match=rf"{bad}: no image can be read: .*--on-corrupt skip"):
        data.Samples(source, as_tensor, seed=0, train=True)[0, 1, True]
    train, val = (
        data.Samples(source, as_tensor, seed=0, train=t, on_corrupt="skip", skipped=skipped) for t in (True, False)
    )
    assert torch.equal(train[0, 1, True][0], train[0, 2, True][0]) and train[0, 1, True][1] == 0
    assert val[0, 1, True][1] == data.IGNORED
    assert data.skipped_names(skipped) == [str(bad)]


def test_sixteen_bits_are_refused_and_one_channel_is_taken(tmp_path):
    deep, grey = tmp_path / "deep.png", tmp_path / "grey.png"
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(deep)
    Image.new("L", (4, 4), 7).save(grey)
    with pytest.raises(DataError, match=rf"{deep}: mode I;16, more than 8 bits"):
        data.open_image(deep, str(deep))
    assert data.open_image(grey, "grey").mode == "RGB" and data.open_image(grey, "grey", in_chans=1).mode == "L"


def test_labels_and_masks_out_of_range_are_named(tmp_path):
    with pytest.raises(DataError, match=r"set\[3\]: label 10 is out of range, there are 10"):
        data.checked_label(10, "set[3]", 10)
    mask, colours = tmp_path / "mask.png", tmp_path / "colours.png"
    Image.fromarray(np.array([[0, 1], [255, 4]], np.uint8)).save(mask)
    Image.new("RGB", (2, 2)).save(colours)
    assert data.open_mask(mask, "mask", 5).size == (2, 2)
    with pytest.raises(DataError, match=rf"{mask}: class 4 is out of range, there are 4"):
        data.open_mask(mask, str(mask), 4)
    with pytest.raises(DataError, match=rf"{colours}: mode RGB; expected a mask"):
        data.open_mask(colours, str(colours), 4)


# Data sets by name ------------------------------------------------------------------------------


def named(root, name="torch/image_folder"):
    training = data.Named(name, root, classes=None)
    return training, data.Named(name, root, classes=None, training=training)


@pytest.mark.parametrize("name", ["torch/image_folder", "folder"], ids=["torchvision's", "timm's"])
def test_a_corrupt_image_of_a_data_set_by_name_is_named_and_no_other_taken(folder, name):
    source, _ = named(folder, name)
    assert len(source) == 6 and source.classes == ["cat", "dog"] and source.load(4)[1] == 1
    bad = folder / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=rf"{bad}: no image can be read: .*--on-corrupt skip"):
        source.load(1)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(bad)
    with pytest.raises(DataError, match=rf"{bad}: mode I;16, more than 8 bits"):
        source.load(1)


def test_classes_of_the_validation_split_have_the_numbers_of_the_training_split(folder):
    shutil.rmtree(folder / "val" / "cat")
    assert named(folder)[1].load(0)[1] == 1
    shutil.copytree(folder / "val" / "dog", folder / "val" / "emu")
    with pytest.raises(DataError, match="emu: class 'emu' appears only in this split, .* add images of it"):
        named(folder)


def test_data_sets_that_cannot_be_trained_on_are_refused_with_what_to_do(tmp_path):
    small.write_mnist(tmp_path, (4, 4), label=11)
    source = data.Named("torchvision/MNIST", tmp_path, classes=None)
    with pytest.raises(DataError, match=r"torchvision/MNIST train\[2\]: label 11 is out of range, there are 10"):
        source.load(2)
    with pytest.raises(OptionError, match="torchvision.datasets has none of that name"):
        data.Named("torchvision/MNISTS", tmp_path, classes=None)
    with pytest.raises(OptionError, match=f"cannot be opened in {tmp_path / 'none'}"):
        data.Named("torchvision/MNIST", tmp_path / "none", classes=None)
    with pytest.raises(OptionError, match="is a stream, .* give --shards"):
        data.Named("wds/some", tmp_path, classes=None)


# Tar files --------------------------------------------------------------------------------------


def shard_samples(paths, **more):
    arguments = {"seed": 0, "train": True, "batch": 2, "batches": 3, "buffer": 4, "in_chans": 1} | more
    return shards.ShardSamples(paths, 3, as_tensor, **arguments)


def numbers(samples):
    return [int(image[0, 0]) for image, target in samples if target != data.IGNORED]


@pytest.fixture
def tar_files(tmp_path):
    pytest.importorskip("webdataset")
    return tmp_path


def test_processes_read_shards_of_their_own_and_an_epoch_is_shuffled(tar_files):
    paths = small.write_shards(tar_files, [4, 4])
    parts = [numbers(shard_samples(paths, rank=r, world=2, batches=2)) for r in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(8)) and parts[0] != sorted(parts[0])


def test_a_stream_goes_on_where_it_was(tar_files):
    samples = shard_samples(small.write_shards(tar_files, [3, 4]))
    found, state = [], None
    for image, _ in samples:
        found.append(int(image[0, 0]))
        if len(found) == 3:
            state = json.loads(json.dumps(samples.state_dict()))
    again = shard_samples(samples.urls)
    again.load_state_dict(state)
    assert len(found) == 6 and numbers(again) == found[3:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_of_the_shards_is_evaluated_once(tar_files, world):
    paths = small.write_shards(tar_files, [3, 4])
    parts = [list(shard_samples(paths, train=False, rank=r, world=world)) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(n for part in parts for n in numbers(part)) == list(range(7))


def test_what_is_wrong_in_a_shard_is_named(tar_files):
    paths = small.write_shards(tar_files, [2], labels=5)
    with pytest.raises(DataError, match=r"0\.tar\[000\d\]: label 5 is out of range, there are 3"):
        list(shard_samples(paths))
    with pytest.raises(DataError, match="6.tar: there is no such file; .* names 2, 2 are missing"):
        shards.expand(str(tar_files / "{6..7}.tar"))


def test_a_shard_that_ends_too_early_is_named(tar_files):
    first, second = small.write_shards(tar_files, [2, 3])
    Path(second).write_bytes(Path(second).read_bytes()[: tarfile.BLOCKSIZE + 20])
    with pytest.raises(DataError, match=rf"{second}: cannot be read as a tar file to its end"):
        list(shard_samples([first, second]))
    Path(second).write_bytes(b"no tar")
    with pytest.raises(DataError, match=rf"{second}: cannot be read as a tar file"):
        list(shard_samples([first, second], train=False))


def test_shards_without_a_readable_image_end_the_run(tar_files, monkeypatch):
    paths = small.write_shards(tar_files, [2], labels=7)
    monkeypatch.setattr(shards, "GIVE_UP", 20)
    with pytest.raises(DataError, match="20 samples in a row cannot be read; the reasons are in .*skipped.txt"):
        list(shard_samples(paths, on_corrupt="skip", skipped=tar_files / "skipped.txt"))
    assert sorted(data.skipped_names(tar_files / "skipped.txt")) == [f"{paths[0]}[{i:04}]" for i in range(2)]
