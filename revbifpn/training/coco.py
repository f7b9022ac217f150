"""Data sets in COCO format, checked when they are opened, and COCO's metrics."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from revbifpn.training.data import check_known, open_image
from revbifpn.training.errors import DataError

if importlib.util.find_spec("pycocotools") is None:
    raise ImportError("revbifpn.training.coco needs pycocotools: pip install pycocotools")

Target = dict[str, Tensor]


class CocoFolder:
    """A split of a dataset in COCO format, checked when it is opened.

    Args:
        folder: of all splits.
        name: of this one.
        training: the split to train on, whose categories count; None: this is it.

    Raises:
        DataError: what is wrong, with the file and the annotation.
    """

    def __init__(self, folder: Path, name: str, training: CocoFolder | None = None) -> None:
        self.images = folder / name
        self.file = folder / "annotations" / f"instances_{name}.json"
        try:
            content = json.loads(self.file.read_text())
            self.records = sorted(content["images"], key=lambda image: image["id"])
            categories = sorted(content["categories"], key=lambda category: category["id"])
            annotations = content["annotations"]
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.file}: not in COCO format: {type(error).__name__}: {error}") from error
        if not self.records:
            raise DataError(f"{self.file}: has no images")
        if missing := [record["id"] for record in self.records if "file_name" not in record]:
            raise DataError(f"{self.file}: image {missing[0]}: has no file_name")
        self.categories: list[dict[str, Any]] = categories if training is None else training.categories
        self.classes = [str(category["name"]) for category in self.categories]
        check_known([str(category["name"]) for category in categories], self.classes, self.file)
        self.labels = {category["id"]: i for i, category in enumerate(self.categories, 1)}
        known = {image["id"] for image in self.records}
        self.boxes: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
        for place, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                raise DataError(f"{self.file}: annotations[{place}]: expected an object, got {annotation}")
            where = f"{self.file}: annotation {annotation.get('id')}"
            if missing := [name for name in ("image_id", "category_id", "bbox") if name not in annotation]:
                raise DataError(f"{where}: has no {', '.join(missing)}")
            box = annotation["bbox"]
            numbers = isinstance(box, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
            if not numbers or len(box) != 4:
                raise DataError(f"{where}: expected a box of four finite numbers, got {box}")
            x, y, width, height = box
            if annotation["image_id"] not in known:
                raise DataError(f"{where}: there is no image {annotation['image_id']}")
            if annotation["category_id"] not in self.labels:
                raise DataError(f"{where}: there is no category {annotation['category_id']}")
            if annotation.get("iscrowd"):
                continue
            if not (width > 0 and height > 0):
                raise DataError(f"{where}: expected a box with an area, got a width and height of {width}, {height}")
            box = [x, y, x + width, y + height]
            self.boxes[annotation["image_id"]].append((box, self.labels[annotation["category_id"]]))

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> tuple[Image.Image, Target]:
        """``boxes`` [n, 4] as corners in pixels, ``labels`` [n] counted from 1 in the order of the categories' ids,
        ``image_id``; without crowds."""
        record = self.records[index]
        path = self.images / record["file_name"]
        found = self.boxes[record["id"]]
        target = {
            "boxes": torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label in found], dtype=torch.int64),
            "image_id": torch.tensor(record["id"]),
        }
        return open_image(path, str(path)), target


def coco_metrics(dataset: CocoFolder, found: list[dict[str, Any]]) -> tuple[float, float]:
    """AP and AP50 of detections, as COCO defines them, in per cent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return 0.0, 0.0
    with redirect_stdout(StringIO()):
        truth = COCO(str(dataset.file))
        scores = COCOeval(truth, truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * float(scores.stats[0]), 100 * float(scores.stats[1])
