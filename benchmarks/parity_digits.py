"""Training parity on real images: exact, reversible streams against floats and stored activations.

    python benchmarks/parity_digits.py                                three variants, three seeds
    python benchmarks/parity_digits.py --quick                        one seed, two epochs
    python benchmarks/parity_digits.py --variants fixed16 --seeds 5

Each run trains a narrow RevBiFPN on scikit-learn's handwritten digits. A seed sets the initial weights and the order of
the batches, the same for every variant; the images for testing are the same for all. Prints accuracies, their means and
the differences to ``float32``, and writes the raw numbers (JSON, CSV) to benchmarks/results.
"""

from __future__ import annotations

import statistics
import sys
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
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import command, results
from benchmarks.harness.command import UsageError, entry
from benchmarks.harness.networks import DTYPES
from benchmarks.harness.terminal import Column, print_table, track
from revbifpn import range_report
from revbifpn.fast import RevBiFPN

NETWORK = {  # levels, kernels and ratios of S0 on few channels, with half the RevBlocks and one layer less
    "channels": (48, 32, 32, 48),
    "inv_blk_rep": 1,
    "num_ext_layers": 1,
    "head_channels": (32, 32, 32, 48),
    "fc_features": 64,
    "head_dropout": 0.0,
    "classes": 10,
}
SIZE = 64  # pixels
EPOCHS, QUICK_EPOCHS = 12, 2
SEEDS, QUICK_SEEDS = 3, 1
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


@dataclass(frozen=True)
class Variant:
    """How streams are stored, whether activations are recomputed, and what branches compute in."""

    name: str
    stream: str
    reversible: bool
    branches: str  # float32, or a dtype of autocast

    def autocast(self, device: torch.device) -> torch.autocast:
        dtype = DTYPES[self.branches]
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


REFERENCE = Variant("float32", "float32", False, "float32")
VARIANTS = {
    variant.name: variant
    for variant in (
        REFERENCE,
        Variant("fixed32", "fixed32", True, "float32"),
        Variant("fixed16", "fixed16", True, "bfloat16"),
    )
}


@dataclass(frozen=True)
class Digits:
    """Images ``[N, 3, 64, 64]`` and labels ``[N]``, for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Digits:
        """1797 images of 8 x 8, upsampled; every fifth one of each class is for testing."""
        data = command.require("sklearn.datasets", "scikit-learn").load_digits()
        labels = torch.tensor(data.target, dtype=torch.long)
        images = torch.tensor(data.images, dtype=torch.float32)[:, None]  # [N, 1, 8, 8]
        images = F.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1)
        test = torch.zeros(len(labels), dtype=torch.bool)
        for digit in range(10):
            test[(labels == digit).nonzero().flatten()[4::5]] = True
        images = (images - images[~test].mean()) / images[~test].std()
        return cls(*(t.contiguous().to(device) for t in (images[~test], labels[~test], images[test], labels[test])))


@dataclass
class Row:
    """One run, or with ``seed="mean"`` the means over the seeds of a variant, and its ``largest_value`` of all."""

    variant: str
    seed: int | str
    stream: str
    reversible: bool
    branches: str
    test_accuracy: float  # per cent
    train_loss: float  # mean over the last epoch
    largest_value: float  # of the streams after training, on the images for testing
    seconds: float
    difference: float | None = None  # of the mean accuracy to that of the reference, in points


ROW_KEYS = ("variant", "seed", "stream", "reversible", "branches")
UNITS = {"test_accuracy": "%", "train_loss": "1", "largest_value": "1", "seconds": "s", "difference": "points"}


def train(variant: Variant, seed: int, digits: Digits, epochs: int, batch: int) -> tuple[nn.Module, float]:
    """AdamW with a one-cycle cosine schedule, no augmentation; returns the model and the last epoch's mean loss."""
    device = digits.images.device
    torch.manual_seed(seed)
    model = RevBiFPN(**NETWORK, stream=variant.stream, reversible=variant.reversible).to(device).train()
    order = torch.Generator().manual_seed(seed)
    steps = len(digits.images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(digits.images), generator=order)[: steps * batch].split(batch):
            chosen = chosen.to(device)
            with variant.autocast(device):
                logits = model(digits.images[chosen])
            loss = F.cross_entropy(logits.float(), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return model, torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(variant: Variant, model: nn.Module, digits: Digits, batch: int) -> float:
    """Per cent of the images for testing, in eval mode, with the streams and the dtype of training."""
    model.eval()
    correct = 0
    for images, labels in zip(digits.test_images.split(batch), digits.test_labels.split(batch), strict=True):
        with variant.autocast(images.device):
            correct += (model(images).argmax(1) == labels).sum().item()
    return 100 * correct / len(digits.test_labels)


def measure(variant: Variant, seed: int, digits: Digits, epochs: int, batch: int) -> Row:
    """Train and test once."""
    start = time.perf_counter()
    model, loss = train(variant, seed, digits, epochs, batch)
    percent = accuracy(variant, model, digits, batch)
    seconds = time.perf_counter() - start
    with variant.autocast(digits.images.device):
        largest = max(r.largest for r in range_report(model, digits.test_images))
    return Row(
        variant=variant.name,
        seed=seed,
        stream=variant.stream,
        reversible=variant.reversible,
        branches=variant.branches,
        test_accuracy=percent,
        train_loss=loss,
        largest_value=largest,
        seconds=seconds,
    )


def means(rows: Sequence[Row]) -> list[Row]:
    """A row per variant; ``difference`` is set where the reference took part."""
    found = []
    for name in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == name]
        values = {m: statistics.fmean(getattr(r, m) for r in own) for m in ("test_accuracy", "train_loss", "seconds")}
        values["largest_value"] = max(row.largest_value for row in own)
        found.append(Row(name, "mean", own[0].stream, own[0].reversible, own[0].branches, **values))
    base = next((row for row in found if row.variant == REFERENCE.name), None)
    for row in found:
        if base is not None:
            row.difference = row.test_accuracy - base.test_accuracy
    return found


def show(rows: Sequence[Row], environment: dict[str, Any], settings: dict[str, Any]) -> None:
    """Prints the runs and means, a group per variant."""
    columns = (
        Column("streams", number=False),
        Column("activations", number=False),
        Column("branches", number=False),
        Column("seed"),
        Column("test accuracy %"),
        Column("to float32"),
        Column("training loss"),
        Column("largest |y|"),
        Column("s"),
    )
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        groups.setdefault(row.variant, []).append(
            [
                row.stream,
                "reversible" if row.reversible else "stored",
                row.branches,
                str(row.seed),
                f"{row.test_accuracy:.2f}",
                "" if row.difference is None else f"{row.difference:+.2f}",
                f"{row.train_loss:.4f}",
                f"{row.largest_value:.1f}",
                f"{row.seconds:.0f}",
            ]
        )
    caption = "\n".join(
        [
            f"{settings['epochs']} epochs at batch {settings['batch']}; {settings['train_images']} images to train on, "
            f"{settings['test_images']} to test on: one of these is {100 / settings['test_images']:.2f} points.",
            "training loss: mean over the last epoch; largest |y|: of the streams after training, on the test images.",
            results.origin(environment),
        ]
    )
    print_table("Training parity on handwritten digits", columns, groups.values(), caption)


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--variants", help=f"comma list of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--seeds", type=int, help=f"runs of each variant (default {SEEDS})")
    parser.add_argument("--epochs", type=int, help=f"default {EPOCHS}")
    parser.add_argument("--batch", type=int, default=64, help="images per step (default 64)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: that it runs, not what it gives")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for JSON and CSV")
    return parser


def _checked(argv: Sequence[str] | None) -> Any:
    arguments = _parser().parse_args(argv)
    if arguments.seeds is None:
        arguments.seeds = QUICK_SEEDS if arguments.quick else SEEDS
    if arguments.epochs is None:
        arguments.epochs = QUICK_EPOCHS if arguments.quick else EPOCHS
    command.at_least_one(seeds=arguments.seeds, epochs=arguments.epochs)
    names = command.some_of("--variants", arguments.variants or ",".join(VARIANTS), list(VARIANTS))
    arguments.chosen = [variant for name, variant in VARIANTS.items() if name in names]
    arguments.device = command.pick_device(arguments.device)
    arguments.output = command.pick_output(arguments.output)
    arguments.digits = Digits.load(arguments.device)
    images = len(arguments.digits.images)
    if not 2 <= arguments.batch <= images:
        raise UsageError(f"--batch: got {arguments.batch}, needs 2 to {images}, the images for training")
    return arguments


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _checked(argv)
    digits = arguments.digits
    environment = results.environment(arguments.device)
    settings = {
        "network": NETWORK,
        "size": SIZE,
        "epochs": arguments.epochs,
        "batch": arguments.batch,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "train_images": len(digits.images),
        "test_images": len(digits.test_images),
    }
    runs = [(variant, seed) for seed in range(arguments.seeds) for variant in arguments.chosen]
    rows = [
        measure(variant, seed, digits, arguments.epochs, arguments.batch)
        for variant, seed in track(runs, lambda run: f"{run[0].name}, seed {run[1]}", "parity")
    ]
    rows += means(rows)
    rows.sort(key=lambda row: list(VARIANTS).index(row.variant))  # stable: seeds in order, then their mean

    stem = arguments.output / (f"parity_digits_{arguments.device.type}" + "_quick" * arguments.quick)
    written = results.save(stem, environment, settings, [asdict(row) for row in rows], ROW_KEYS, UNITS)
    show(rows, environment, settings)
    print(written)


if __name__ == "__main__":
    sys.exit(main())
