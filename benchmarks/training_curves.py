"""Loss curves as proof: reversible training against stored training, beside the noise of a repeated run.

    pip install '.[train]' mlxtend
    python benchmarks/training_curves.py             three seeds, on one core about twenty minutes
    python benchmarks/training_curves.py --quick     one seed, one epoch of a tenth of the images: that it runs

Every run is ``examples/train_classification.py`` on 5,000 handwritten digits of MNIST, which mlxtend ships: 400 of each
class to train on, 100 to evaluate on. A seed gives weights, order and augmentation, the same for every variant.

A run that is repeated on one CPU core repeats bit by bit; on a GPU it does not, since sums change their order. That
noise is made here: ``repeated`` is the stored run once more with every initial weight times 1 + 2^-23 or 1 - 2^-23, at
random, which is what rounding can do. What a variant differs from the stored run is to be read beside it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
from PIL import Image

from benchmarks.harness import command, plots, results, rivals, scripts
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.terminal import Column, print_table

rivals.import_timm()  # before anything imports torchvision

from revbifpn import save_checkpoint  # noqa: E402
from revbifpn.training.logs import Curves, read_curves  # noqa: E402
from revbifpn.training.run import backbone  # noqa: E402

STORED, REPEATED = "stored", "repeated"
VARIANTS = {
    STORED: ("--stored",),
    REPEATED: ("--stored",),
    "float32": (),
    "fixed32": ("--stream", "fixed32"),
    "fixed16": ("--stream", "fixed16", "--precision", "bfloat16"),
}
LABELS = {
    STORED: "stored, float32",
    REPEATED: "stored, float32, repeated",
    "float32": "reversible, float32",
    "fixed32": "reversible, fixed32",
    "fixed16": "reversible, fixed16, branches in bfloat16",
}
COLOURS = dict(zip(VARIANTS, ("#000000", "#777777", "#56B4E9", "#0072B2", "#D55E00"), strict=True))
NETWORK = (  # levels, kernels and ratios of S0 on few channels, with half the RevBlocks and two layers less
    "channels=[48,32,32,48]",
    "head_channels=[32,32,32,48]",
    "fc_features=64",
    "head_dropout=0.0",
    "inv_blk_rep=1",
    "num_ext_layers=0",
)
COMMON = "--resolution 32 --batch 50 --lr 3e-3 --hflip 0 --min-scale 0.6 --log-every 8 --workers 0 --no-progress"
SEEDS, EPOCHS = 3, 6
EVALUATED, OF_A_CLASS = 100, 500


@dataclass
class Row:
    """A point of a curve: mean loss of the steps before, or after an epoch the loss and score of the validation."""

    variant: str
    seed: int
    step: int
    name: str
    value: float


ROW_KEYS = ("variant", "seed", "step", "name")
UNITS = {"value": "1"}


def write_digits(folder: Path, share: float) -> int:
    """``train/CLASS/NUMBER.png`` and ``val``; returns how many there are to train on."""
    pixels, labels = command.require("mlxtend.data", "mlxtend").mnist_data()  # [N, 784] and [N], sorted by class
    counts = [0] * 10
    for image, label in zip(pixels, labels.tolist(), strict=True):
        number, counts[label] = counts[label], counts[label] + 1
        if number >= share * OF_A_CLASS:
            continue
        split = "val" if number < share * EVALUATED else "train"
        place = folder / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.reshape(28, 28).astype("uint8")).save(place / f"{number:03}.png")
    return len(list(folder.glob("train/*/*.png")))


def disturbed(argv: Sequence[str], seed: int, path: Path) -> Path:
    """The weights that the run begins with, each off by a rounding error."""
    script = scripts.load("train_classification")
    model = backbone(script.options(list(argv)), 10)
    signs = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + (2.0**-23) * (2 * torch.randint(2, p.shape, generator=signs) - 1))
    save_checkpoint(model, path)
    return path


def run(variant: str, seed: int, data: Path, folder: Path, epochs: int) -> Curves:
    output = folder / f"{variant}{seed}"
    argv = ["--data", str(data), "--output", str(output), "--seed", str(seed), "--epochs", str(epochs)]
    argv += [*COMMON.split(), "--device", "cpu", *VARIANTS[variant], "--resume"]
    network = ["--model-kwargs", *NETWORK]
    if variant == REPEATED:
        argv += ["--weights", str(disturbed([*argv, *network], seed, folder / f"{seed}.safetensors"))]
    begun = time.perf_counter()
    life = scripts.Life("train_classification", [*argv, *network], folder / f"{variant}{seed}.log")
    if life.wait(3600):
        raise BenchmarkError(life.output()[-2000:])
    print(f"{variant}, seed {seed}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return read_curves(output / "metrics.csv")


Runs = dict[tuple[str, int], Curves]


def distances(runs: Runs, variant: str) -> list[tuple[int, float]]:
    """|loss - stored| / stored, by step, a mean over the seeds."""
    by_step: dict[int, list[float]] = {}
    for (name, seed), curves in runs.items():
        if name == variant:
            for (step, a), (_, b) in zip(curves["train/loss"], runs[STORED, seed]["train/loss"], strict=True):
                by_step.setdefault(step, []).append(abs(a - b) / b)
    return [(step, statistics.fmean(values)) for step, values in sorted(by_step.items())]


def summary(runs: Runs) -> list[dict[str, Any]]:
    """A line per variant: means over the seeds, and the distance to the stored run over the second half."""
    lines = []
    for variant in VARIANTS:
        own = [curves for (name, _), curves in runs.items() if name == variant]
        apart = [value for _, value in distances(runs, variant)]
        tops = [100 * curves["val/top1"][-1][1] for curves in own]
        line: dict[str, Any] = {"variant": variant, "top1": statistics.fmean(tops), "top1_of_seeds": tops}
        line["train_loss"] = statistics.fmean(curves["train/loss"][-1][1] for curves in own)
        line["val_loss"] = statistics.fmean(curves["val/loss"][-1][1] for curves in own)
        line["distance"] = statistics.fmean(apart[len(apart) // 2 :])
        lines.append(line)
    return lines


def plot(runs: Runs, path: Path) -> None:
    """Losses, each with the range of its seeds, and distances to the stored run."""
    with plots.panels(
        path, ["training loss (mean, and range of the seeds)", "relative distance to stored"], 4.6
    ) as axes:
        for variant, colour in COLOURS.items():
            own = [curves["train/loss"] for (name, _), curves in runs.items() if name == variant]
            steps = [step for step, _ in own[0]]
            values = [[value for _, value in points] for points in zip(*own, strict=True)]
            style = {"color": colour, "linewidth": 2.4 if variant == STORED else 1.2, "label": LABELS[variant]}
            style["linestyle"] = "--" if variant == REPEATED else "-"
            axes[0].plot(steps, [statistics.fmean(v) for v in values], **style)
            if variant == STORED:
                axes[0].fill_between(steps, [min(v) for v in values], [max(v) for v in values], color="#cccccc")
            else:
                axes[1].plot(*zip(*distances(runs, variant), strict=True), **style)
        for axis in axes:
            axis.set(xlabel="step", yscale="log")


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch of a tenth of the images")
    parser.add_argument("--runs", type=Path, help="a folder that keeps them, to go on after an interruption")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON, CSV and the figure")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    command.at_least_one(seeds=arguments.seeds, epochs=arguments.epochs)
    command.require("matplotlib", "matplotlib")
    output = command.pick_output(arguments.output)
    seeds, epochs = (1, 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.runs or Path(name)
        images = write_digits(folder / "data", 0.1 if arguments.quick else 1.0)
        runs: Runs = {
            (variant, seed): run(variant, seed, folder / "data", folder, epochs)
            for seed in range(seeds)
            for variant in VARIANTS
        }
    rows = [
        Row(variant, seed, step, metric, value)
        for (variant, seed), curves in runs.items()
        for metric in ("train/loss", "val/loss", "val/top1")
        for step, value in curves[metric]
    ]
    lines = summary(runs)
    environment = results.environment(torch.device("cpu"))
    settings: dict[str, Any] = {"seeds": seeds, "epochs": epochs, "images": images, "options": COMMON}
    settings |= {"network": list(NETWORK), "summary": lines}
    stem = output / ("training_curves_cpu" + "_quick" * arguments.quick)
    written = results.save(
        stem, environment, settings, [asdict(row) for row in rows], ROW_KEYS, UNITS, lambda path: plot(runs, path)
    )
    columns = (
        Column("run", number=False),
        Column("training loss"),
        Column("validation loss"),
        Column("top-1 %"),
        Column("distance %"),
    )
    table = [
        [
            LABELS[line["variant"]],
            f"{line['train_loss']:.4f}",
            f"{line['val_loss']:.4f}",
            f"{line['top1']:.2f}",
            f"{100 * line['distance']:.2f}",
        ]
        for line in lines
    ]
    caption = "distance: of the training loss to the stored run's, over the second half; means over the seeds"
    print_table("Loss curves on MNIST", columns, [table], f"{caption}\n{results.origin(environment)}")
    print(written)


if __name__ == "__main__":
    sys.exit(main())
