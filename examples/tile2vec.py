"""Tile2Vec (Jean et al., arXiv 1805.02855) with a RevBiFPN encoder: representations of map tiles without labels.

pip install . scikit-learn scikit-image matplotlib
python examples/tile2vec.py --output tile2vec

Tiles that lie close together are alike more often than tiles that lie far apart. An encoder f is trained on triplets of
an anchor a, a neighbour n within ``--near`` pixels of it and a distant tile d, with the loss of the paper,

    L = max(0, ||f(a) - f(n)|| - ||f(a) - f(d)|| + margin) + l2 (||f(a)|| + ||f(n)|| + ||f(d)||).

The raster [C, H, W] lies in a file and is read in windows (numpy.memmap). The default one is generated: classes of land
cover in patches, each with its spectrum and its texture, under light that varies over the map. ``--textures`` is a map
of one channel, patches of scikit-image's photographs of grass, brick and gravel. ``--raster`` takes an .npy file of
your own; without ``--classes`` nothing is evaluated.

A linear probe on the embeddings of labelled tiles is compared with the same probe on the tiles' mean spectra and raw
pixels, on their principal components, and on the untrained encoder. On the generated landscape analogies are asked
as well: of three of the classes {two spectra} x {two textures} the embeddings' a - b + c should be nearest to a tile of
the fourth. Results are written as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revbifpn.fast import RevBiFPN

CLASSES, CHANNELS, SIDE = 5, 6, 1536
TILE, MARGIN, NORM = 32, 10.0, 0.01
PAIRS = [
    (1, 0, 2, 3),
    (2, 0, 1, 3),
]  # a - b + c = d: another texture on c's spectrum, another spectrum with c's texture
ANALOGIES = [order for a, b, c, d in PAIRS for order in ((a, b, c, d), (b, a, d, c), (d, c, b, a), (c, d, a, b))]


def smooth(rng: np.random.Generator, side: int, scale: int) -> np.ndarray:
    """A random field [side, side] of unit variance that varies over ``scale`` pixels."""
    coarse = torch.from_numpy(rng.normal(size=(1, 1, side // scale + 3, side // scale + 3)))
    field = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0, 0].numpy()
    return (field / field.std()).astype(np.float32)


def landscape(path: Path, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Write a raster [CHANNELS, side, side] to ``path``; returns its classes [side, side].

    The class of a pixel is the largest of several smooth fields. Classes 0 and 1 have one spectrum and differ in
    texture alone, as do 2 and 3; 0 and 2 have one texture, as have 1 and 3. Noise is as large as the differences of
    spectra and as the furrows of the first texture.
    """
    rng = np.random.default_rng(seed)
    classes = np.argmax([smooth(rng, side, 96) for _ in range(CLASSES)], 0)
    spectra = rng.normal(size=(CLASSES, CHANNELS)).astype(np.float32)
    spectra[1], spectra[3] = spectra[0], spectra[2]
    rows, _ = np.mgrid[:side, :side].astype(np.float32)
    furrows, trees = np.sin(rows / 1.5), smooth(rng, side, 4)
    textures = [furrows, trees, furrows, trees, 0 * rows]
    light = 0.3 * smooth(rng, side, 256)
    raster = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(CHANNELS, side, side))
    for c in range(CHANNELS):
        texture = np.choose(classes, [t.astype(np.float32) for t in textures])
        raster[c] = spectra[classes, c] + texture + light + 0.7 * rng.normal(size=(side, side))
    raster.flush()
    return classes.astype(np.int64)


def textures(path: Path, seed: int = 0) -> np.ndarray:
    """Write a raster [1, 512, 512] to ``path``, of grass, brick and gravel in patches; returns its classes [512, 512].

    Each photograph has zero mean and unit variance, so that brightness and contrast tell nothing.
    """
    from skimage import data

    photographs = np.stack([getattr(data, name)().astype(np.float32) for name in ("grass", "brick", "gravel")])
    rng = np.random.default_rng(seed)
    classes = np.argmax([smooth(rng, photographs.shape[1], 96) for _ in photographs], 0)
    photographs -= photographs.mean((1, 2), keepdims=True)
    photographs /= photographs.std((1, 2), keepdims=True)
    np.save(path, np.choose(classes, list(photographs))[None])
    return classes.astype(np.int64)


class Tiles:
    """Windows of a raster on disk, normalised by channel; only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self.raster = np.load(path, mmap_mode="r")
        if self.raster.ndim != 3 or min(self.raster.shape[1:]) < 4 * TILE:
            raise SystemExit(f"{path}: needs an array [C, H, W] of at least {4 * TILE} pixels, got {self.raster.shape}")
        sample = self.raster[:, ::7, ::7].reshape(len(self.raster), -1)
        self.mean, self.std = sample.mean(1)[:, None, None], sample.std(1)[:, None, None] + 1e-6

    def at(self, corners: np.ndarray) -> Tensor:
        """Tiles ``[n, C, TILE, TILE]`` by their upper left corners [n, 2]."""
        windows = [self.raster[:, y : y + TILE, x : x + TILE] for y, x in corners]
        return torch.from_numpy(np.stack([(w - self.mean) / self.std for w in windows]).astype(np.float32))

    def corners(self, rng: np.random.Generator, n: int, rows: tuple[float, float] = (0, 1)) -> np.ndarray:
        """Random corners [n, 2] within a share of the rows."""
        height, width = self.raster.shape[1:]
        low, high = int(rows[0] * height), int(rows[1] * height) - TILE
        return np.stack([rng.integers(low, high, n), rng.integers(0, width - TILE, n)], 1)

    def triplets(self, rng: np.random.Generator, n: int, near: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corners of anchors, of neighbours within ``near`` pixels, and of tiles anywhere further away than that."""
        anchors, distant = self.corners(rng, n), self.corners(rng, n)
        limit = np.array(self.raster.shape[1:]) - TILE
        neighbours = np.clip(anchors + rng.integers(-near, near + 1, (n, 2)), 0, limit - 1)
        while (close := np.abs(anchors - distant).max(1) <= near).any():
            distant[close] = self.corners(rng, int(close.sum()))
        return anchors, neighbours, distant


NETWORK = {
    "dwk": (3, 5),
    "dwkp": (0, 0),
    "expand_ratios": (1, 1),
    "se_ratios": (0.25, 0.25),
    "inv_blk_rep": 1,
    "num_ext_layers": 0,
    "head_channels": (32, 32),
    "head_dwk": (3, 3),
    "head_dwkp": (2, 2),
    "head_expand_ratios": (1, 2),
    "head_se_ratios": (0.25, 0.25),
    "fc_features": 64,
    "head_dropout": 0.0,
}


class Encoder(nn.Module):
    """A RevBiFPN of two levels whose classifier is the embedding."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        streams = (16 * max(3, channels), 32)  # the stem repeats the raster's channels in the first stream
        self.network = RevBiFPN(channels=streams, in_chans=channels, classes=features, **NETWORK)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def triplet_loss(anchor: Tensor, neighbour: Tensor, distant: Tensor) -> Tensor:
    """The loss of the paper, over embeddings [n, features]."""
    near, far = (anchor - neighbour).norm(dim=1), (anchor - distant).norm(dim=1)
    norms = anchor.norm(dim=1) + neighbour.norm(dim=1) + distant.norm(dim=1)
    return (F.relu(near - far + MARGIN) + NORM * norms).mean()


@torch.no_grad()
def embed(encoder: nn.Module, tiles: Tensor) -> np.ndarray:
    """Embeddings [n, features] in eval mode."""
    encoder.eval()
    return torch.cat([encoder(batch) for batch in tiles.split(128)]).numpy()


def train(tiles: Tiles, seed: int, steps: int, batch: int, near: int, features: int) -> tuple[Encoder, Encoder, list]:
    """The encoder before and after, and the loss of every step."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, untrained = (Encoder(len(tiles.raster), features) for _ in range(2))
    untrained.load_state_dict(encoder.state_dict())
    with torch.no_grad():  # running statistics, which are no training
        for _ in range(20):
            untrained.train()(tiles.at(tiles.corners(rng, batch)))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        encoder.train()
        images = tiles.at(np.concatenate(tiles.triplets(rng, batch, near)))
        loss = triplet_loss(*encoder(images).chunk(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return untrained, encoder, losses


def probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """Accuracy in per cent of logistic regression on standardised features; its strength by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    search = GridSearchCV(regression, {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0, 10.0]}, cv=3)
    return 100 * float(search.fit(train_x, train_y).score(test_x, test_y))


def analogy(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Random questions "a is to b as c is to what?" of tiles with features x and classes y: indices of the three and
    of the tile, other than these, nearest to ``a - b + c`` [n, 4], and the classes that are right [n]."""
    of_class = [np.flatnonzero(y == c) for c in range(CLASSES)]
    known = [order for order in ANALOGIES if all(len(of_class[c]) for c in order)]
    asked = np.array(known)[rng.integers(0, len(known), n)]  # [n, 4]
    a, b, c = (np.array([rng.choice(of_class[k]) for k in column]) for column in asked.T[:3])
    distance = np.stack([((point - x) ** 2).sum(1) for point in x[a] - x[b] + x[c]])  # [n, tiles]
    for used in (a, b, c):
        distance[np.arange(n), used] = np.inf
    return np.stack([a, b, c, distance.argmin(1)], 1), asked[:, 3]


def labelled(tiles: Tiles, classes: np.ndarray, rng: np.random.Generator, n: int, rows: tuple[float, float]):
    """Tiles whose pixels are of one class for nine tenths, corners and that class."""
    found, labels = [], []
    while len(found) < n:
        for y, x in tiles.corners(rng, n, rows):
            counts = np.bincount(classes[y : y + TILE, x : x + TILE].ravel(), minlength=CLASSES)
            if counts.max() >= 0.9 * TILE * TILE and len(found) < n:
                found.append((y, x))
                labels.append(counts.argmax())
    return tiles.at(np.array(found)), np.array(labels)


def evaluate(
    tiles: Tiles, classes: np.ndarray, seed: int, untrained: nn.Module, encoder: nn.Module, n: int, generated: bool
) -> dict:
    """Accuracy of the probe by features, and of analogies where the landscape is ``generated``.

    Test tiles lie in the lower third of the map, training tiles above it.
    """
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1000 + seed)
    train_x, train_y = labelled(tiles, classes, rng, n, (0, 0.63))
    test_x, test_y = labelled(tiles, classes, rng, 2 * n, (0.67, 1))
    flat = [x.flatten(1).numpy() for x in (train_x, test_x)]
    features = len(embed(encoder, train_x[:1])[0])
    pca = PCA(min(features, n), random_state=seed).fit(flat[0])
    pairs = {
        "mean spectrum": [x.mean((2, 3)).numpy() for x in (train_x, test_x)],
        "raw pixels": flat,
        "PCA": [pca.transform(x) for x in flat],
        "untrained encoder": [embed(untrained, x) for x in (train_x, test_x)],
        "Tile2Vec": [embed(encoder, x) for x in (train_x, test_x)],
    }
    row = {name: probe(a, train_y, b, test_y) for name, (a, b) in pairs.items()}
    if generated:
        row["analogies"] = {}
        for name, (a, b) in pairs.items():
            found, right = analogy((b - a.mean(0)) / (a.std(0) + 1e-6), test_y, np.random.default_rng(seed))
            row["analogies"][name] = 100 * float((test_y[found[:, 3]] == right).mean())
    return row


def in_colours(image: np.ndarray) -> np.ndarray:
    """The first three channels of a normalised image [C, H, W] as colours [H, W, 3]; fewer are repeated."""
    return np.clip(image[np.arange(3) % len(image)].transpose(1, 2, 0) / 4 + 0.5, 0, 1)


def picture(path: Path, tiles: Tiles, classes: np.ndarray | None, encoder: nn.Module, generated: bool) -> None:
    """The map, its classes and its embedding in colours; below, tiles with their nearest neighbours, and analogies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from sklearn.decomposition import PCA

    height, width = tiles.raster.shape[1:]
    rows, columns = range(0, height - TILE, TILE), range(0, width - TILE, TILE)
    grid = np.array([(y, x) for y in rows for x in columns])
    images = tiles.at(grid)
    vectors = embed(encoder, images)
    vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
    colours = PCA(3, random_state=0).fit_transform(vectors)
    low, high = np.percentile(colours, [2, 98], 0)
    colours = np.clip((colours - low) / (high - low), 0, 1).reshape(len(rows), len(columns), 3)
    of_tile = None if classes is None else np.array([classes[y + TILE // 2, x + TILE // 2] for y, x in grid])
    rng = np.random.default_rng(0)

    def show(axis, i: int, title: str) -> None:
        axis.imshow(in_colours(images[i].numpy()))
        axis.set_title(title if of_tile is None else f"{title}class {of_tile[i]}", fontsize=9)

    parts = [4, 5, 4] if generated else [4, 5]
    figure = plt.figure(figsize=(12, 3 * len(parts) + 4), layout="constrained")
    top, middle, *bottom = figure.subfigures(len(parts), 1, height_ratios=parts)
    overview = top.subplots(1, 3)
    step = max(1, height // 512)
    overview[0].imshow(in_colours((tiles.raster[:, ::step, ::step] - tiles.mean) / tiles.std))
    overview[0].set_title("raster, at most three channels")
    if classes is not None:
        overview[1].imshow(classes[::step, ::step], cmap="Set2", interpolation="nearest")
    overview[1].set_title("classes, which training never sees")
    overview[2].imshow(colours)
    overview[2].set_title("embedding of every tile, three components")
    axes = [*overview]
    neighbours = middle.subplots(4, 6)
    middle.suptitle("a tile, and its five nearest of the whole map")
    for line, i in zip(neighbours, rng.choice(len(grid), 4, replace=False), strict=True):
        for axis, j in zip(line, np.argsort(((vectors - vectors[i]) ** 2).sum(1))[:6], strict=True):
            show(axis, j, "")
    axes += [*neighbours.ravel()]
    for part in bottom:
        found, _ = analogy(vectors, of_tile, rng, n=3)
        lines = part.subplots(3, 4)
        part.suptitle("analogies: the first tile, minus the second, plus the third, is nearest to the fourth")
        for line, indices in zip(lines, found, strict=True):
            for axis, i, sign in zip(line, indices, ("", "- ", "+ ", "= "), strict=True):
                show(axis, i, sign)
        axes += [*lines.ravel()]
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--raster", type=Path, help="an .npy file [C, H, W] (default: a generated landscape)")
    source.add_argument("--textures", action="store_true", help="a map of scikit-image's photographs instead")
    parser.add_argument("--classes", type=Path, help="its classes, an .npy file [H, W] of integers, to evaluate with")
    parser.add_argument("--output", type=Path, default=Path("tile2vec"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=3, help="of which those in the output's file are not run again")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=24, help="triplets in a step")
    parser.add_argument("--near", type=int, default=24, help="pixels between an anchor and its neighbour, at most")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--labels", type=int, default=200, help="labelled tiles that the probe is trained on")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    generated = args.raster is None and not args.textures
    raster = args.raster or args.output / ("landscape.npy" if generated else "textures.npy")
    if args.raster:
        classes = args.classes and np.load(args.classes)
    else:
        classes = landscape(raster) if generated else textures(raster)
    tiles, rows = Tiles(raster), []
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int) and name != "seeds"}
    if (args.output / "tile2vec.json").exists():
        earlier = json.loads((args.output / "tile2vec.json").read_text())
        rows = earlier["rows"] if earlier["settings"] == settings else []
    encoder = None
    for seed in sorted(set(range(args.seeds)) - {row["seed"] for row in rows}):
        began = time.process_time()
        untrained, encoder, losses = train(tiles, seed, args.steps, args.batch, args.near, args.features)
        row = {"seed": seed, "first_loss": losses[0], "last_loss": float(np.mean(losses[-20:]))}
        if classes is not None:
            row |= evaluate(tiles, classes, seed, untrained, encoder, args.labels, generated)
        rows.append(row | {"cpu_seconds": time.process_time() - began})
        print(json.dumps(rows[-1]), flush=True)
    if encoder is None:
        return
    content = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "settings": settings,
        "rows": rows,
    }
    (args.output / "tile2vec.json").write_text(json.dumps(content, indent=1) + "\n")
    torch.save(encoder.state_dict(), args.output / "encoder.pt")
    picture(args.output / "tile2vec.png", tiles, classes, encoder, generated)
    print(f"written: {args.output}/tile2vec.json, tile2vec.png, encoder.pt")


if __name__ == "__main__":
    main()
