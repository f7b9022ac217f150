"""Train a network that gives each pixel a class, on one GPU or many, and export it.

pip install '.[train]'
python examples/make_patterns.py masks FOLDER
python examples/train_segmentation.py --data FOLDER --classes 3 --output runs/shapes --resolution 64 --epochs 20

FOLDER has ``images/train/NAME.jpg`` and ``masks/train/NAME.png``, likewise with ``val``; a mask is grey or has a
palette, and its values are class numbers, 255 for pixels that count nowhere. For data sets that torchvision knows:

python examples/train_segmentation.py --dataset torchvision/VOCSegmentation --data FOLDER --classes 21 \\
    --output runs/voc --arch revbifpn_s3 --pretrained --freeze-norms --resolution 512 --max-memory 12GB \\
    --precision bfloat16 --stream fixed16

docs/training.md has the options, file formats and exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import Accuracy, JaccardIndex, MetricCollection
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import Mask

from revbifpn.configs import MEAN, STD
from revbifpn.training.data import IGNORED, Transform
from revbifpn.training.loaders import Data
from revbifpn.training.options import Options, parse, parser
from revbifpn.training.run import Outcome, backbone, entry, train
from revbifpn.training.task import Work


class Segmenter(nn.Module):
    """All maps of the pyramid at the resolution of the finest one, mixed by a 1x1 convolution; as HRNetV2's head.

    Images ``[N, C, H, W]`` give logits ``[N, classes, H, W]``.
    """

    def __init__(self, body: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.body = body
        self.mix = nn.Sequential(
            nn.Conv2d(sum(body.neck_channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish()
        )
        self.classifier = nn.Conv2d(width, classes, 1)
        self.in_chans = body.in_chans

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body(images)
        finest = maps[0].shape[-2:]
        joined = torch.cat([F.interpolate(m, finest, mode="bilinear") for m in maps], 1)
        return F.interpolate(self.classifier(self.mix(joined)), images.shape[-2:], mode="bilinear")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The body's groups; mix and classifier are the last layer."""
        of_body = self.body.group_matcher(coarse)
        blocks = [(rf"^body\.{pattern.removeprefix('^')}", depth) for pattern, depth in of_body["blocks"]]
        return {"stem": r"^body\.stem\.", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        return set()


def options(argv: list[str] | None) -> Options:
    p = parser(__doc__, min_scale=0.5)
    p.add_argument("--width", type=int, default=256, help="channels before the classifier")
    p.add_argument("--color-jitter", type=float, default=0.2)
    p.add_argument("--pictures", type=int, default=8, help="validation images to draw at the end")
    return parse(p, argv)


def transform(o: Options, train: bool) -> Transform:
    """The same geometry for image and mask, colours of the image only."""
    size = (o.resolution, o.resolution)
    if train:
        geometry = [v2.RandomResizedCrop(size, (o.min_scale, 1.0), antialias=True), v2.RandomHorizontalFlip(o.hflip)]
        geometry.append(v2.ColorJitter(o.color_jitter, o.color_jitter, o.color_jitter))
    else:
        geometry = [v2.Resize(size, antialias=True)]
    return partial(_apply, v2.Compose(geometry), MEAN[: o.in_chans], STD[: o.in_chans])


def _apply(
    geometry: Callable, mean: tuple[float, ...], std: tuple[float, ...], image: Image.Image, mask: Image.Image
) -> tuple[Tensor, Tensor]:
    classes = torch.from_numpy(np.array(mask)).long()
    pixels, target = geometry(tv.to_image(image), Mask(classes.masked_fill(classes == 255, IGNORED)))
    return tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), mean, std).as_subclass(
        Tensor
    ), target.as_subclass(Tensor)


def metrics(classes: int) -> MetricCollection:
    of = {"task": "multiclass", "num_classes": classes, "ignore_index": IGNORED}
    return MetricCollection({"iou": JaccardIndex(**of), "accuracy": Accuracy(**of, average="micro")})


@torch.no_grad()
def draw(outcome: Outcome, pictures: int) -> None:
    """Validation images beside their masks and what the network says, in ``samples.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, samples = outcome.model, outcome.data.samples_of(False)
    count = min(pictures, len(samples))
    figure, axes = pyplot.subplots(count, 3, figsize=(6, 2 * count), squeeze=False, layout="constrained")
    for row, i in zip(axes, range(count), strict=True):
        image, target = samples[0, i, True]
        shown = image.permute(1, 2, 0) * torch.tensor(STD[: len(image)]) + torch.tensor(MEAN[: len(image)])
        found = model(image[None])[0].argmax(0)
        row[0].imshow(shown.clamp(0, 1), cmap="gray")
        for axis, values in zip(row[1:], (target, found), strict=True):
            axis.imshow(values.where(target != IGNORED, -1), vmin=-1, vmax=len(outcome.task.classes) - 1, cmap="tab20")
    for axis, title in zip(axes[0], ("image", "mask", "found"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(Path(outcome.output, "samples.png"), dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    o = options(argv)
    torch.set_float32_matmul_precision("high")
    data = Data(o, partial(transform, o), masks=True)
    model = Segmenter(backbone(o, None), len(data.classes), o.width)
    outcome = train(o, data, model, lambda classes: Work(score="iou", metrics=metrics))
    if outcome.task.trainer.is_global_zero and o.pictures and data.sources:
        draw(outcome, o.pictures)


if __name__ == "__main__":
    sys.exit(entry(main)())
