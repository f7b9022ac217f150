"""Train Faster R-CNN on a data set in COCO format, on one GPU or many, evaluate it with pycocotools, and draw.

pip install '.[train]' pycocotools
python examples/make_shapes.py shapes
python examples/detect.py --config examples/configs/shapes.yaml --data shapes --output runs/shapes

COCO itself, on a GPU of 8 GB:

python examples/detect.py --data coco --train train2017 --val val2017 --output runs/coco --arch revbifpn_s3 \\
    --pretrained --resolution 800 --anchors 32 64 128 256 512 --scales 1 --proposals 1000 --width 256 --rois 512 \\
    --batch 8 --lr 1e-4 --precision bfloat16

A split NAME is ``DATA/NAME`` with the images and ``DATA/annotations/instances_NAME.json``. docs/training.md has the
options and exit codes.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics import MetricCollection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from revbifpn.detection import FasterRCNN, fasterrcnn_revbifpn
from revbifpn.training.coco import CocoFolder, Target, coco_metrics
from revbifpn.training.data import Samples
from revbifpn.training.errors import OptionError, TrainingError
from revbifpn.training.loaders import Data
from revbifpn.training.options import Options, parse, parser
from revbifpn.training.run import Outcome, entry, train
from revbifpn.training.task import Task, Work

UNCOUNTED = -1  # id of an image that fills up a batch


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left and right exchanged."""
    boxes, width = target["boxes"].clone(), image.shape[-1]
    boxes[:, [0, 2]] = width - target["boxes"][:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes}


def transform(o: Options, train: bool) -> Any:
    """An image ``[3, H, W]`` in [0, 1], mirrored at random in training; the detector brings it to its size."""
    return partial(_apply, o.hflip if train else 0.0)


def _apply(share: float, image: Image.Image, target: Target) -> tuple[Tensor, Target]:
    pixels = pil_to_tensor(image) / 255
    return mirrored(pixels, target) if torch.rand(()) < share else (pixels, target)


class BoxSamples(Samples):
    """An image that counts nowhere has an id that says so."""

    def finish(self, sample: tuple[Tensor, Target], counts: bool) -> tuple[Tensor, Target]:
        image, target = sample
        return image, target if counts else target | {"image_id": torch.tensor(UNCOUNTED)}


class CocoData(Data):
    """Both splits; a batch is a tuple of images and one of targets."""

    samples_class = BoxSamples

    def _open(self, training: CocoFolder | None) -> CocoFolder:
        o = self.options
        return CocoFolder(o.data, o.train if training is None else o.val, training)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Any, ...]:
        return tuple(zip(*samples, strict=True))


class Detection(Task):
    """A detector, its losses, and COCO's metrics."""

    def __init__(self, model: FasterRCNN, work: Work, options: Options, data: CocoData) -> None:
        super().__init__(model, work, options, data)
        self.val = data.sources[False]
        self.found: list[dict[str, Any]] = []

    def training_step(self, batch: tuple, _: int) -> Tensor:
        images, targets = batch
        loss = sum(self.model(list(images), list(targets)).values())
        if not loss.isfinite():
            ids = [int(target["image_id"]) for target in targets]
            raise TrainingError(f"the loss of images {ids} is {loss.item()}; lower --lr, or look at these images")
        self._losses.append(loss.detach())
        return loss

    def validation_step(self, batch: tuple, _: int) -> None:
        images, targets = batch
        for found, target in zip(self.evaluated(list(images)), targets, strict=True):
            x0, y0, x1, y1 = found["boxes"].float().cpu().unbind(1)
            boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], 1).tolist()
            image = int(target["image_id"])
            if image == UNCOUNTED:
                continue
            for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                category = self.val.categories[label - 1]["id"]
                self.found.append({"image_id": image, "category_id": category, "bbox": box, "score": score})

    def computed(self) -> dict[str, float]:
        everyone = [self.found]
        if self.trainer.world_size > 1:
            everyone = [[]] * self.trainer.world_size
            torch.distributed.all_gather_object(everyone, self.found)
        self.found = []
        ap, ap50 = coco_metrics(self.val, [one for found in everyone for one in found])
        return {"AP": ap, "AP50": ap50}


@torch.no_grad()
def draw(outcome: Outcome, dataset: CocoFolder, folder: Path, pictures: int) -> None:
    """What is found on the first images, with scores; small images enlarged, so that the words can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(pictures, len(dataset))):
        image = pil_to_tensor(dataset.load(i)[0]) / 255
        (found,) = outcome.model([image])
        sure = found["scores"] > 0.5
        names = [dataset.classes[label - 1] for label in found["labels"][sure].tolist()]
        words = [f"{name} {score:.2f}" for name, score in zip(names, found["scores"][sure].tolist(), strict=True)]
        factor = max(1, 320 // min(image.shape[-2:]))
        picture, boxes = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2), factor * found["boxes"][sure]
        picture = draw_bounding_boxes(picture, boxes, words, colors="red", width=2) if words else picture
        to_pil_image(picture).save(folder / f"{i:03}.png")


def options(argv: list[str] | None) -> Options:
    step = {"batch": 8, "epochs": 10, "warmup_epochs": 1, "weight_decay": 1e-2, "clip_norm": 10.0}
    p = parser(__doc__, resolution=64, workers=0, **step)
    g = p.add_argument_group("detector")
    g.add_argument("--train", default="train", help="split to train on")
    g.add_argument("--val", default="val", help="split to evaluate on")
    g.add_argument("--trainable-levels", type=int, help="layers of the backbone, from the last (default: all)")
    g.add_argument("--anchors", type=int, nargs=5, default=[16, 32, 64, 128, 256], help="pixels, for stride 4 to 64")
    g.add_argument("--scales", type=int, default=3, help="sizes of anchors in an octave, of every level")
    g.add_argument("--proposals", type=int, default=200, help="per image that are classified")
    g.add_argument("--width", type=int, default=64, help="channels of FPN and heads")
    g.add_argument("--rois", type=int, default=32, help="per image that the box head trains on")
    g.add_argument("--pictures", type=int, default=8, help="validation images to draw at the end")
    o = parse(p, argv)
    for name in ("dataset", "shards", "max_memory", "weights", "graphed", "compile"):
        if getattr(o, name):
            raise OptionError(f"--{name.replace('_', '-')}: is not for detectors; docs/detection.md has what they take")
    if "onnx" in o.export or o.in_chans != 3:
        raise OptionError("--export onnx, --in-chans 1: are not for detectors")
    return o


def detector(o: Options, classes: int) -> FasterRCNN:
    torch.manual_seed(o.seed)
    sizes = tuple(tuple(size * 2 ** (k / o.scales) for k in range(o.scales)) for size in o.anchors)
    return fasterrcnn_revbifpn(
        classes + 1,
        scale=o.arch,
        pretrained=o.pretrained,
        trainable_levels=o.trainable_levels,
        frozen_norms=o.freeze_norms or None,
        stream=o.stream,
        width=o.width,
        recompute=not o.stored,
        overrides=o.model_kwargs | {"reversible": not o.stored},
        min_size=o.resolution,
        max_size=o.resolution * 5 // 3,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=2 * o.proposals,
        rpn_post_nms_top_n_train=2 * o.proposals,
        rpn_pre_nms_top_n_test=o.proposals,
        rpn_post_nms_top_n_test=o.proposals,
        box_batch_size_per_image=o.rois,
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """AP and AP50 of the best epoch, in per cent."""
    o = options(argv)
    torch.set_float32_matmul_precision("high")
    data = CocoData(o, partial(transform, o))
    work = Work(score="AP", metrics=lambda classes: MetricCollection({}))
    outcome = train(o, data, detector(o, len(data.classes)), lambda classes: work, task=Detection)
    if outcome.task.trainer.is_global_zero and o.pictures:
        draw(outcome, data.sources[False], o.output / "pictures", o.pictures)
    return outcome.task.results


if __name__ == "__main__":
    sys.exit(entry(main)())
