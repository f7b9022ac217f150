"""examples/detect.py and make_shapes.py: a detector trains on a folder in COCO format; what is wrong in it is named."""

import json
import math
import signal

import pytest
import torch

from tests.adapters import frameworks

frameworks.torchvision("torchvision.models.detection")
for needed in ("revbifpn.training", "pycocotools"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402

from benchmarks.harness import scripts  # noqa: E402
from revbifpn.training import coco  # noqa: E402
from revbifpn.training.errors import DataError  # noqa: E402
from tests.training import small  # noqa: E402

detect, make_shapes = scripts.load("detect"), scripts.load("make_shapes")


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
    dataset = coco.CocoFolder(folder, "train")
    annotations = json.loads(dataset.file.read_text())["annotations"]
    assert annotations and len(dataset) == 4
    for picture, target in (dataset.load(i) for i in range(4)):
        image = pil_to_tensor(picture)
        own = [a for a in annotations if a["image_id"] == target["image_id"]]
        wanted = [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in own]
        torch.testing.assert_close(target["boxes"], torch.tensor(wanted).reshape(-1, 4))
        assert target["labels"].tolist() == [a["category_id"] for a in own]
        mirrored, boxes = detect.mirrored(image, target)
        assert torch.equal(mirrored.flip(-1), image)
        torch.testing.assert_close(detect.mirrored(mirrored, boxes)[1]["boxes"], target["boxes"])


def test_the_config_of_the_shapes_is_one(folder, tmp_path):
    path = scripts.ROOT / "examples" / "configs" / "shapes.yaml"
    o = detect.options(["--config", str(path), "--data", str(folder), "--output", str(tmp_path)])
    assert (o.resolution, o.model_kwargs) == (64, {"num_ext_layers": 0, "inv_blk_rep": 1})


@pytest.mark.slow
def test_a_detector_that_was_killed_is_the_one_that_was_not_and_draws(folder):
    more = ["--batch", 1, "--width", 16, "--rois", 16, "--log-every", 1, "--save-every", 1, "--epochs", 2]
    more += ["--device", "cpu", "--no-progress", "--freeze-norms"]
    ends = []
    for name in ("whole", "broken"):
        argv = ["--data", folder, "--output", folder / name, *more, "--resume"]
        for before in [None] if name == "whole" else [small.killed_in_step_3, None]:
            ends.append(small.run("detect", argv, folder, before=before))
    assert [code for code, _ in ends] == [0, -signal.SIGKILL, 0], ends
    assert "epoch 2: AP" in ends[0][1] and "best epoch: AP" in ends[2][1]
    assert len(list((folder / "broken" / "pictures").iterdir())) == 2
    small.assert_same_run(folder / "whole", folder / "broken")


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
        (lambda c: c["categories"].pop(), "annotation .*: there is no category"),
        (lambda c: c.pop("images"), "not in COCO format: KeyError: 'images'"),
        (lambda c: c.update(images=[], annotations=[]), "has no images"),
        (lambda c: c["annotations"].insert(0, 7), r"annotations\[0\]: expected an object, got 7"),
    ],
)
def test_a_bad_annotation_is_named_with_its_file(folder, edit, change, match):
    path = edit(change)
    with pytest.raises(DataError, match=match) as caught:
        coco.CocoFolder(folder, "train")
    assert str(path) in str(caught.value)


def test_a_truncated_jpeg_is_named(folder, edit):
    whole = folder / "train" / "000001.jpg"
    Image.open(folder / "train" / "000001.png").save(whole)
    whole.write_bytes(whole.read_bytes()[:-400])
    edit(lambda c: c["images"][0].update(file_name="000001.jpg"))
    with pytest.raises(DataError, match="000001.jpg: no image can be read"):
        coco.CocoFolder(folder, "train").load(0)


def test_an_image_without_boxes_has_an_empty_target(folder, edit):
    edit(lambda c: c.update(annotations=[]))
    _, target = coco.CocoFolder(folder, "train").load(0)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_a_damaged_or_missing_file_is_named(folder):
    dataset = coco.CocoFolder(folder, "train")
    (folder / "train" / "000001.png").write_bytes(b"no picture")
    (folder / "train" / "000002.png").unlink()
    for i, name in enumerate(("000001.png", "000002.png")):
        with pytest.raises(DataError, match=f"{name}: no image can be read"):
            dataset.load(i)
    dataset.file.write_text("{")
    with pytest.raises(DataError, match=f"{dataset.file}: not in COCO format"):
        coco.CocoFolder(folder, "train")
    with pytest.raises(DataError, match="instances_test.json"):
        coco.CocoFolder(folder, "test")


def test_a_category_of_the_validation_split_alone_is_named(folder):
    training = coco.CocoFolder(folder, "train")
    path = folder / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 9, "name": "star"})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{path.name}/star: class 'star' appears only in this split"):
        coco.CocoFolder(folder, "val", training)
