"""A dataset in COCO format, generated: discs, squares and triangles on noise, to try a detector with.

pip install . numpy pillow
python examples/make_shapes.py shapes
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("disc", "square", "triangle")


def corners(shape: str, x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    """Of a polygon around (x, y); a disc has many."""
    n = {"disc": 48, "square": 4, "triangle": 3}[shape]
    turns = (angle + 2 * math.pi * k / n for k in range(n))
    return [(x + r * math.cos(turn), y + r * math.sin(turn)) for turn in turns]


def draw(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, list[tuple[int, list[float]]]]:
    """A picture, and (shape, [x, y, width, height]) of what is on it; some touch, some pictures are empty."""
    noise = rng.normal(110, 25, (height, width, 3)).clip(0, 255).astype(np.uint8)
    picture, found, circles = Image.fromarray(noise), [], []
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 7)):
        kind, r = int(rng.integers(len(SHAPES))), rng.uniform(0.14, 0.28) * min(width, height)
        x, y = rng.uniform(r, width - r), rng.uniform(r, height - r)
        if any(math.hypot(x - other_x, y - other_y) < 0.8 * (r + other_r) for other_x, other_y, other_r in circles):
            continue  # it would hide a good part of another one
        circles.append((x, y, r))
        points = corners(SHAPES[kind], x, y, r, rng.uniform(0, 2 * math.pi))
        colour = tuple(int(c) for c in rng.choice([20, 235], 3))
        pen.polygon(points, fill=colour)
        low, high = np.min(points, 0), np.max(points, 0)
        found.append((kind, [float(v) for v in (*low, *(high - low))]))
    return picture, found


def write(folder: Path, name: str, images: int, seed: int) -> None:
    """``images`` pictures of several sizes into ``folder/name``, and ``folder/annotations/instances_name.json``."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)],
    }
    for i in range(1, images + 1):
        width, height = (int(v) for v in rng.choice([64, 80], 2))
        picture, found = draw(rng, width, height)
        file = f"{i:06}.png"
        picture.save(folder / name / file)
        content["images"].append({"id": i, "file_name": file, "width": width, "height": height})
        for kind, box in found:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1200, help="to train on; a quarter as many to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, "train", args.images, args.seed)
    write(args.folder, "val", max(args.images // 4, 1), args.seed + 1)


if __name__ == "__main__":
    main()
