"""Folders of generated images, to try the training scripts with: coloured textures by class, and shapes with masks.

pip install . numpy pillow
python examples/make_patterns.py classes FOLDER --images 200
python examples/make_patterns.py masks FOLDER --images 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("blue", "green", "red")


def texture(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """Noise, brighter in the channel of the class."""
    pixels = rng.normal(100, 40, (size, size, 3))
    pixels[..., 2 - label] += 25
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shapes(rng: np.random.Generator, size: int) -> tuple[Image.Image, Image.Image]:
    """A disc and a square on noise, and the mask: 0 for the ground, 1, 2; 255 on the border of the image."""
    picture = Image.fromarray(rng.normal(110, 25, (size, size, 3)).clip(0, 255).astype(np.uint8))
    mask = Image.new("L", (size, size))
    for value, kind in ((1, "ellipse"), (2, "rectangle")):
        x, y = rng.integers(2, size * 3 // 5, 2).tolist()
        box = (x, y, x + size // 3, y + size // 3)
        getattr(ImageDraw.Draw(picture), kind)(box, fill=tuple(rng.integers(150, 255, 3).tolist()))
        getattr(ImageDraw.Draw(mask), kind)(box, fill=value)
    ImageDraw.Draw(mask).rectangle((0, 0, size - 1, size - 1), outline=255)
    return picture, mask


def write_classes(folder: Path, images: int, size: int = 48, seed: int = 0) -> None:
    """``images`` to train on, a third as many to evaluate on."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", images), ("val", max(images // 3, len(CLASSES)))):
        for i in range(count):
            place = folder / split / CLASSES[i % len(CLASSES)]
            place.mkdir(parents=True, exist_ok=True)
            texture(rng, i % len(CLASSES), size).save(place / f"{i:05}.png")


def write_masks(folder: Path, images: int, size: int = 64, seed: int = 0) -> None:
    """``images`` to train on, a third as many to evaluate on."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", images), ("val", max(images // 3, 1))):
        for i in range(count):
            for kind, picture in zip(("images", "masks"), shapes(rng, size), strict=True):
                place = folder / kind / split
                place.mkdir(parents=True, exist_ok=True)
                picture.save(place / f"{i:05}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("classes", "masks"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    (write_classes if args.kind == "classes" else write_masks)(args.folder, args.images)


if __name__ == "__main__":
    main()
