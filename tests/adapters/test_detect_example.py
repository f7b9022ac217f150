"""examples/detect.py and make_shapes.py: a detector trains on a folder in COCO format; what is wrong in it is named."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from tests.adapters import frameworks

frameworks.torchvision("torchvision.models.detection")
for needed in ("lightning", "pycocotools", "PIL", "numpy"):
    pytest.importorskip(needed)


def load(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


detect, make_shapes = load("detect"), load("make_shapes")
from PIL import Image  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    make_shapes.write(tmp_path, "train", 4, seed=0)
    make_shapes.write(tmp_path, "val", 2, seed=1)
    return tmp_path


@pytest.fixture
def edit(folder):
    """``edit(change)``: change the annotations of the training split; returns their file."""

    def run(change):
        path = folder / "annotations" / "instances_train.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return path

    return run


def test_boxes_are_the_shapes_corners_and_labels_count_from_one(folder):
    dataset = detect.CocoFolder(folder, "train")
    annotations = json.loads(dataset.file.read_text())["annotations"]
    assert annotations and len(dataset) == 4
    for image, target in (dataset[i] for i in range(4)):
        own = [a for a in annotations if a["image_id"] == target["image_id"]]
        wanted = [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in own]
        torch.testing.assert_close(target["boxes"], torch.tensor(wanted).reshape(-1, 4))
        assert target["labels"].tolist() == [a["category_id"] for a in own]
        mirrored, boxes = detect.mirrored(image, target)
        assert torch.equal(mirrored.flip(-1), image)
        torch.testing.assert_close(detect.mirrored(mirrored, boxes)[1]["boxes"], target["boxes"])


@pytest.mark.slow
def test_an_epoch_trains_evaluates_draws_and_saves(folder, capsys):
    small = ["--epochs", "1", "--batch", "2", "--pixels", "64", "--width", "16", "--rois", "16"]
    detect.main([str(folder), *small, "--pictures", str(folder / "found"), "--save", str(folder / "model.pt")])
    found = capsys.readouterr().out
    assert "epoch 1: " in found and "AP50" in found and "loss" in found
    assert len(list((folder / "found").iterdir())) == 2
    assert (
        torch.load(folder / "model.pt")["backbone.body.rev_stack.1.rev_transform_0.f.xform_0_1.dw_conv.conv.weight"]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c["annotations"][0].update(bbox=[3, 4, 0, 5]), r"annotation 1: expected a box with an area.* 0, 5"),
        (lambda c: c["annotations"][1].update(category_id=9), "annotation 2: there is no category 9"),
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 2: there is no image 77"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1: .*bbox"),
        (lambda c: c["annotations"][0].update(bbox=[3, 4, 5]), r"annotation 1: expected a box of four finite numbers"),
        (lambda c: c["annotations"][0].update(bbox=[math.nan, 4, 5, 5]), r"annotation 1: .*four finite.*nan"),
        (lambda c: c["images"][1].pop("file_name"), "image 2: has no file_name"),
        (lambda c: c.pop("images"), "not in COCO format: KeyError: 'images'"),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c["annotations"].insert(0, 7), r"annotations\[0\]: expected an object, got 7"),
    ],
)
def test_a_bad_annotation_is_named_with_its_file(folder, edit, change, match):
    path = edit(change)
    with pytest.raises(detect.BadDatasetError, match=match) as caught:
        detect.CocoFolder(folder, "train")
    assert str(path) in str(caught.value)


def test_categories_that_differ_between_the_splits_are_named(folder, edit):
    edit(lambda c: c["categories"].append({"id": 4, "name": "ring"}))
    with pytest.raises(
        detect.BadDatasetError, match=r"val.json: expected categories \[1, 2, 3, 4\], .*got \[1, 2, 3\]"
    ):
        detect.main([str(folder)])


def test_a_truncated_jpeg_is_named(folder, edit):
    whole = folder / "train" / "000001.jpg"
    Image.open(folder / "train" / "000001.png").save(whole)
    whole.write_bytes(whole.read_bytes()[:-400])
    edit(lambda c: c["images"][0].update(file_name="000001.jpg"))
    with pytest.raises(detect.BadDatasetError, match="000001.jpg: no image can be read"):
        detect.CocoFolder(folder, "train")[0]


def test_an_image_without_boxes_has_an_empty_target(folder, edit):
    edit(lambda c: c.update(annotations=[]))
    _, target = detect.CocoFolder(folder, "train")[0]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_a_damaged_or_missing_file_is_named(folder):
    dataset = detect.CocoFolder(folder, "train")
    (folder / "train" / "000001.png").write_bytes(b"no picture")
    (folder / "train" / "000002.png").unlink()
    for i, name in enumerate(("000001.png", "000002.png")):
        with pytest.raises(detect.BadDatasetError, match=f"{name}: no image can be read"):
            dataset[i]
    dataset.file.write_text("{")
    with pytest.raises(detect.BadDatasetError, match=f"{dataset.file}: not in COCO format"):
        detect.CocoFolder(folder, "train")
    with pytest.raises(detect.BadDatasetError, match="instances_test.json"):
        detect.CocoFolder(folder, "test")
