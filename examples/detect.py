"""Train Faster R-CNN on RevBiFPN, on a dataset in COCO format, and evaluate it with pycocotools.

pip install '.[torchvision]' pycocotools
python examples/make_shapes.py shapes
python examples/detect.py shapes --pictures shapes/found

COCO itself, on a GPU of 8 GB:

python examples/detect.py coco --train train2017 --val val2017 --arch revbifpn_s3 --pretrained \\
    --pixels 800 --width 256 --rois 512 --batch 8 --lr 0.01 --device cuda

A split NAME is ``FOLDER/NAME`` with the images and ``FOLDER/annotations/instances_NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from revbifpn.adapters.torchvision import revbifpn_fpn_backbone

Target = dict[str, Tensor]


class BadDatasetError(Exception):
    """What is wrong, with the file and the annotation."""


class CocoFolder(Dataset):
    """A split of a dataset in COCO format, checked when it is opened.

    Gives an image ``[3, H, W]`` in [0, 1], and ``boxes`` [n, 4] as corners in pixels, ``labels`` [n] counted from 1 in
    the order of the categories' ids, ``image_id``. Crowds are left out.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.images = folder / name
        self.file = folder / "annotations" / f"instances_{name}.json"
        try:
            content = json.loads(self.file.read_text())
            self.records = sorted(content["images"], key=lambda image: image["id"])
            self.categories = sorted(content["categories"], key=lambda category: category["id"])
            annotations = content["annotations"]
        except OSError as error:
            raise BadDatasetError(f"cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadDatasetError(f"{self.file}: not in COCO format: {type(error).__name__}: {error}") from error
        self.labels = {category["id"]: i for i, category in enumerate(self.categories, 1)}
        known = {image["id"] for image in self.records}
        self.boxes: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
        for annotation in annotations:
            where = f"{self.file}: annotation {annotation.get('id')}"
            if missing := [name for name in ("image_id", "category_id", "bbox") if name not in annotation]:
                raise BadDatasetError(f"{where}: has no {', '.join(missing)}")
            x, y, width, height = annotation["bbox"]
            if annotation["image_id"] not in known:
                raise BadDatasetError(f"{where}: there is no image {annotation['image_id']}")
            if annotation["category_id"] not in self.labels:
                raise BadDatasetError(f"{where}: there is no category {annotation['category_id']}")
            if annotation.get("iscrowd"):
                continue
            if not (width > 0 and height > 0):
                raise BadDatasetError(
                    f"{where}: expected a box with an area, got a width and height of {width}, {height}"
                )
            box = [x, y, x + width, y + height]
            self.boxes[annotation["image_id"]].append((box, self.labels[annotation["category_id"]]))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        record = self.records[i]
        path = self.images / record["file_name"]
        try:
            image = pil_to_tensor(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError) as error:  # the latter of a damaged PNG
            raise BadDatasetError(f"{path}: no image can be read: {error}") from None
        found = self.boxes[record["id"]]
        target = {
            "boxes": torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label in found], dtype=torch.int64),
            "image_id": torch.tensor(record["id"]),
        }
        return image / 255, target


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left and right exchanged."""
    boxes, width = target["boxes"].clone(), image.shape[-1]
    boxes[:, [0, 2]] = width - target["boxes"][:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes}


class Mirrored(Dataset):
    """Every other image is mirrored, at random."""

    def __init__(self, dataset: CocoFolder) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        sample = self.dataset[i]
        return mirrored(*sample) if torch.rand(()) < 0.5 else sample


def make_detector(args: argparse.Namespace, categories: int) -> FasterRCNN:
    backbone = revbifpn_fpn_backbone(
        args.arch,
        pretrained=args.pretrained,
        trainable_layers=args.trainable_layers,
        out_channels=args.width,
        stream=args.stream,
        reversible=not args.stored,
        recompute=not args.stored,
    )
    return FasterRCNN(
        backbone,
        num_classes=categories + 1,
        min_size=args.pixels,
        max_size=args.pixels * 5 // 3,
        box_batch_size_per_image=args.rois,
    )


def train_epoch(model: FasterRCNN, loader: DataLoader, optimizer: Any, schedule: Any, device: torch.device) -> float:
    """The mean loss."""
    model.train()
    total = 0.0
    for images, targets in loader:
        losses = model(
            [image.to(device) for image in images],
            [{name: value.to(device) for name, value in target.items()} for target in targets],
        )
        loss = sum(losses.values())
        if not loss.isfinite():
            ids = [int(target["image_id"]) for target in targets]
            raise BadDatasetError(f"the loss of images {ids} is {loss.item()}; lower --lr, or look at these images")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate(model: FasterRCNN, dataset: CocoFolder, loader: DataLoader, device: torch.device) -> tuple[float, float]:
    """AP and AP50, as COCO defines them, in per cent."""
    model.eval()
    results = []
    for images, targets in loader:
        for found, target in zip(model([image.to(device) for image in images]), targets, strict=True):
            x0, y0, x1, y1 = found["boxes"].cpu().unbind(1)
            boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
            for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                category = dataset.categories[label - 1]["id"]
                results.append(
                    {"image_id": int(target["image_id"]), "category_id": category, "bbox": box, "score": score}
                )
    if not results:
        return 0.0, 0.0
    with redirect_stdout(StringIO()):
        truth = COCO(str(dataset.file))
        scores = COCOeval(truth, truth.loadRes(results), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * float(scores.stats[0]), 100 * float(scores.stats[1])


@torch.no_grad()
def draw(model: FasterRCNN, dataset: CocoFolder, folder: Path, device: torch.device, pictures: int = 8) -> None:
    """What is found on the first images, with scores."""
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(pictures, len(dataset))):
        image, _ = dataset[i]
        (found,) = model([image.to(device)])
        sure = found["scores"] > 0.5
        names = [dataset.categories[label - 1]["name"] for label in found["labels"][sure].tolist()]
        words = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"][sure].tolist(), strict=True)]
        picture = draw_bounding_boxes(image, found["boxes"][sure].cpu(), words, colors="red") if words else image
        to_pil_image(picture).save(folder / f"{i:03}.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", default="train", help="split to train on")
    parser.add_argument("--val", default="val", help="split to evaluate on")
    parser.add_argument("--arch", default="revbifpn_s0")
    parser.add_argument("--pretrained", action="store_true", help="published ImageNet weights, norms frozen")
    parser.add_argument("--trainable-layers", type=int, help="of the backbone, from the last (default: all)")
    parser.add_argument("--stream", help="fixed32 or fixed16 (default: float32)")
    parser.add_argument("--stored", action="store_true", help="store activations instead of recomputing them")
    parser.add_argument("--pixels", type=int, default=128, help="of an image's shorter side")
    parser.add_argument("--width", type=int, default=64, help="channels of FPN and heads")
    parser.add_argument("--rois", type=int, default=64, help="per image that the box head trains on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures with boxes")
    parser.add_argument("--save", type=Path, help="a file for the detector's state dict")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> float:
    """AP50 of the last epoch."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    train, val = CocoFolder(args.folder, args.train), CocoFolder(args.folder, args.val)
    model = make_detector(args, len(train.categories)).to(device)
    options: dict[str, Any] = {
        "num_workers": args.workers,
        "collate_fn": lambda samples: tuple(zip(*samples, strict=True)),
    }
    loader = DataLoader(Mirrored(train), args.batch, shuffle=True, drop_last=len(train) > args.batch, **options)
    val_loader = DataLoader(val, args.batch, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(loader))
    ap50 = 0.0
    for epoch in range(args.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, loader, optimizer, schedule, device)
        seconds = time.perf_counter() - began
        ap, ap50 = evaluate(model, val, val_loader, device)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, AP {ap:.1f}, AP50 {ap50:.1f}, {seconds:.0f} s", flush=True)
    if args.pictures:
        draw(model, val, args.pictures, device)
    if args.save:
        torch.save(model.state_dict(), args.save)
    return ap50


if __name__ == "__main__":
    try:
        main()
    except BadDatasetError as error:
        sys.exit(str(error))
