"""Train Faster R-CNN on RevBiFPN by Lightning, on a dataset in COCO format, and evaluate it with pycocotools.

pip install '.[torchvision]' lightning pycocotools
python examples/make_shapes.py shapes
python examples/detect.py shapes --pictures shapes/found

COCO itself, on a GPU of 8 GB:

python examples/detect.py coco --train train2017 --val val2017 --arch revbifpn_s3 --pretrained \\
    --pixels 800 --anchors 32,64,128,256,512 --width 256 --rois 512 --batch 8 --lr 1e-4 --precision bf16-mixed

A split NAME is ``FOLDER/NAME`` with the images and ``FOLDER/annotations/instances_NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from revbifpn.detection import fasterrcnn_revbifpn

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
        if not self.records:
            raise BadDatasetError(f"{self.file}: has no images")
        if missing := [record["id"] for record in self.records if "file_name" not in record]:
            raise BadDatasetError(f"{self.file}: image {missing[0]}: has no file_name")
        self.labels = {category["id"]: i for i, category in enumerate(self.categories, 1)}
        known = {image["id"] for image in self.records}
        self.boxes: dict[int, list[tuple[list[float], int]]] = defaultdict(list)
        for place, annotation in enumerate(annotations):
            if not isinstance(annotation, dict):
                raise BadDatasetError(f"{self.file}: annotations[{place}]: expected an object, got {annotation}")
            where = f"{self.file}: annotation {annotation.get('id')}"
            if missing := [name for name in ("image_id", "category_id", "bbox") if name not in annotation]:
                raise BadDatasetError(f"{where}: has no {', '.join(missing)}")
            box = annotation["bbox"]
            numbers = isinstance(box, list) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
            if not numbers or len(box) != 4:
                raise BadDatasetError(f"{where}: expected a box of four finite numbers, got {box}")
            x, y, width, height = box
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


class Detection(lightning.LightningModule):
    """Faster R-CNN, its training step, its optimizer, and COCO's metrics."""

    def __init__(self, args: argparse.Namespace, train: CocoFolder, val: CocoFolder) -> None:
        super().__init__()
        self.args, self.val = args, val
        sizes = tuple(
            tuple(int(size) * 2 ** (k / args.scales) for k in range(args.scales)) for size in args.anchors.split(",")
        )
        self.model = fasterrcnn_revbifpn(
            len(train.categories) + 1,
            scale=args.scale,
            pretrained=args.pretrained,
            trainable_levels=args.trainable_levels,
            stream=args.stream,
            width=args.width,
            recompute=not args.stored,
            overrides={"reversible": not args.stored},
            min_size=args.pixels,
            max_size=args.pixels * 5 // 3,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            rpn_pre_nms_top_n_train=2 * args.proposals,
            rpn_post_nms_top_n_train=2 * args.proposals,
            rpn_pre_nms_top_n_test=args.proposals,
            rpn_post_nms_top_n_test=args.proposals,
            box_batch_size_per_image=args.rois,
        )
        self.found: list[dict[str, Any]] = []

    def training_step(self, batch: tuple, batch_idx: int) -> Tensor:
        images, targets = batch
        loss = sum(self.model(list(images), list(targets)).values())
        if not loss.isfinite():
            ids = [int(target["image_id"]) for target in targets]
            raise BadDatasetError(f"the loss of images {ids} is {loss.item()}; lower --lr, or look at these images")
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple, batch_idx: int) -> None:
        images, targets = batch
        for found, target in zip(self.model(list(images)), targets, strict=True):
            x0, y0, x1, y1 = found["boxes"].float().cpu().unbind(1)
            boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
            for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                category = self.val.categories[label - 1]["id"]
                image = int(target["image_id"])
                self.found.append({"image_id": image, "category_id": category, "bbox": box, "score": score})

    def on_validation_epoch_end(self) -> None:
        ap, ap50 = coco_metrics(self.val, self.found)
        self.found = []
        self.log_dict({"AP": ap, "AP50": ap50})

    def on_train_epoch_end(self) -> None:
        """Lightning has validated by then."""
        about = ", ".join(f"{name} {float(value):.3f}" for name, value in self.trainer.callback_metrics.items())
        print(f"epoch {self.current_epoch + 1}: {about}", flush=True)

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = self.args.precision == "32-true"  # Lightning clips no gradients of fused optimizers otherwise
        optimizer = torch.optim.AdamW(parameters, self.args.lr, weight_decay=1e-2, fused=fused)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.args.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def coco_metrics(dataset: CocoFolder, found: list[dict[str, Any]]) -> tuple[float, float]:
    """AP and AP50 of detections, as COCO defines them, in per cent."""
    if not found:
        return 0.0, 0.0
    with redirect_stdout(StringIO()):
        truth = COCO(str(dataset.file))
        scores = COCOeval(truth, truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return 100 * float(scores.stats[0]), 100 * float(scores.stats[1])


@torch.no_grad()
def draw(model: torch.nn.Module, dataset: CocoFolder, folder: Path, pictures: int = 8) -> None:
    """What is found on the first images, with scores."""
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(pictures, len(dataset))):
        image, _ = dataset[i]
        (found,) = model([image])
        sure = found["scores"] > 0.5
        names = [dataset.categories[label - 1]["name"] for label in found["labels"][sure].tolist()]
        words = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"][sure].tolist(), strict=True)]
        picture = draw_bounding_boxes(image, found["boxes"][sure], words, colors="red") if words else image
        to_pil_image(picture).save(folder / f"{i:03}.png")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", default="train", help="split to train on")
    parser.add_argument("--val", default="val", help="split to evaluate on")
    parser.add_argument("--scale", default="s0", help="s0 to s6")
    parser.add_argument("--pretrained", action="store_true", help="published ImageNet weights, norms frozen")
    parser.add_argument("--trainable-levels", type=int, help="layers of the backbone, from the last (default: all)")
    parser.add_argument("--stream", help="fixed32 or fixed16 (default: float32)")
    parser.add_argument("--stored", action="store_true", help="store activations instead of recomputing them")
    parser.add_argument("--pixels", type=int, default=64, help="of an image's shorter side")
    parser.add_argument("--anchors", default="16,32,64,128,256", help="pixels, one per level of stride 4 to 64")
    parser.add_argument("--scales", type=int, default=3, help="anchors of a level: of so many sizes in an octave")
    parser.add_argument("--proposals", type=int, default=200, help="per image that are classified")
    parser.add_argument("--width", type=int, default=64, help="channels of FPN and heads")
    parser.add_argument("--rois", type=int, default=32, help="per image that the box head trains on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=5, help="how often, at the ends of epochs")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accelerator", default="auto", help="Lightning's: cpu, gpu, ...")
    parser.add_argument("--precision", default="32-true", help="Lightning's: 32-true, bf16-mixed, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures with boxes")
    parser.add_argument("--save", type=Path, help="a file for the detector's state dict")
    parser.add_argument("--checkpoints", type=Path, help="a folder for one of every epoch; a later run goes on from it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> float:
    """AP50 of the last epoch."""
    args = parse(arguments)
    lightning.seed_everything(args.seed, verbose=False)
    train, val = CocoFolder(args.folder, args.train), CocoFolder(args.folder, args.val)
    if train.labels != val.labels:
        raise BadDatasetError(
            f"{val.file}: expected categories {sorted(train.labels)}, as in {train.file}, got {sorted(val.labels)}"
        )
    options: dict[str, Any] = {
        "num_workers": args.workers,
        "collate_fn": lambda samples: tuple(zip(*samples, strict=True)),
    }
    loader = DataLoader(Mirrored(train), args.batch, shuffle=True, drop_last=len(train) > args.batch, **options)
    detection = Detection(args, train, val)
    callbacks = []
    if args.checkpoints:
        callbacks.append(ModelCheckpoint(args.checkpoints, save_last=True, save_on_train_epoch_end=True))
    trainer = lightning.Trainer(
        callbacks=callbacks,
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        gradient_clip_val=10.0,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=sys.stderr.isatty(),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=max(1, args.epochs // args.evaluations),
    )
    trainer.fit(
        detection,
        loader,
        DataLoader(val, args.batch, **options),
        ckpt_path="last" if callbacks else None,  # where there is one
        weights_only=False,
    )
    model = detection.model.cpu()
    if args.pictures:
        draw(model, val, args.pictures)
    if args.save:
        torch.save(model.state_dict(), args.save)
    return float(trainer.callback_metrics["AP50"])


if __name__ == "__main__":
    try:
        main()
    except BadDatasetError as error:
        sys.exit(str(error))
