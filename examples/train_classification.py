"""Train a classifier on a folder of images, on one GPU or many, and export it.

pip install '.[train]'
python examples/train_classification.py --data FOLDER --output runs/first --max-memory 12GB --precision bfloat16

FOLDER has ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``. The same command continues with ``--resume``; with eight
GPUs it begins with ``torchrun --nproc-per-node 8 --max-restarts 3``. Fine-tuning:

python examples/train_classification.py --data FOLDER --output runs/tuned --arch revbifpn_s3 --pretrained \\
    --layer-decay 0.75 --ema 0.999 --mixup 0.2 --epochs 30

docs/training.md has the options, file formats and exit codes.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor
from torchmetrics import Accuracy, MetricCollection

from revbifpn.configs import CROP, INTERPOLATION, MEAN, STD
from revbifpn.training.data import IGNORED, Transform
from revbifpn.training.errors import OptionError
from revbifpn.training.loaders import Data
from revbifpn.training.options import Options, parse, parser
from revbifpn.training.run import backbone, entry, train
from revbifpn.training.task import Work


def options(argv: list[str] | None) -> Options:
    p = parser(__doc__)
    g = p.add_argument_group("augmentation")
    g.add_argument("--auto-augment", help="of timm, such as rand-m9-mstd0.5-inc1")
    g.add_argument("--color-jitter", type=float, default=0.0, help="without --auto-augment")
    g.add_argument("--random-erasing", type=float, default=0.0, help="probability")
    g.add_argument("--mixup", type=float, default=0.0, help="alpha")
    g.add_argument("--cutmix", type=float, default=0.0, help="alpha")
    return parse(p, argv)


def transform(o: Options, train: bool) -> Transform:
    """timm's, of the image; the label stays."""
    of_image = create_transform(
        (o.in_chans, o.resolution, o.resolution),
        is_training=train,
        scale=(o.min_scale, 1.0),
        hflip=o.hflip,
        color_jitter=o.color_jitter or None,
        auto_augment=o.auto_augment,
        re_prob=o.random_erasing,
        interpolation=INTERPOLATION,
        crop_pct=CROP,
        mean=MEAN[: o.in_chans],
        std=STD[: o.in_chans],
    )
    return partial(_apply, of_image)


def _apply(of_image: object, image: Image.Image, label: int) -> tuple[Tensor, int]:
    return of_image(image), label  # type: ignore[operator]


def work(o: Options, classes: list[str]) -> Work:
    count = len(classes)
    if (o.mixup or o.cutmix) and o.batch % 2:
        raise OptionError(f"--mixup and --cutmix mix images in pairs: expected an even --batch, got {o.batch}")
    mixed = Mixup(o.mixup, o.cutmix, label_smoothing=o.smoothing, num_classes=count) if o.mixup or o.cutmix else None
    return Work(score="top1", metrics=metrics, mix=mixed)


def metrics(classes: int) -> MetricCollection:
    of = partial(Accuracy, task="multiclass", num_classes=classes, average="micro", ignore_index=IGNORED)
    return MetricCollection({"top1": of(), "top5": of(top_k=5)} if classes > 5 else {"top1": of()})


def main(argv: list[str] | None = None) -> None:
    o = options(argv)
    torch.set_float32_matmul_precision("high")
    data = Data(o, partial(transform, o))
    train(o, data, backbone(o, len(data.classes)), partial(work, o))


if __name__ == "__main__":
    sys.exit(entry(main)())
