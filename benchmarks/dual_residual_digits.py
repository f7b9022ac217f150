"""Fine-tuning a pretrained network reversibly, on real images: ordinary against dual-residual, float and exact.

    python benchmarks/dual_residual_digits.py                three seeds; minutes
    python benchmarks/dual_residual_digits.py --seeds 0 --epochs 2
    python benchmarks/dual_residual_digits.py --seeds 2 --ways 'int32*' --add         adds runs to these results

A small vision transformer (12 blocks of width 48) is pretrained on scikit-learn's handwritten digits 0 to 4 and
fine-tuned as a whole on 5 to 9, of which every fifth image is for testing. Fine-tuning starts from the same weights and
sees the same batches in every way: ordinary; ``float``, dual-residual at fixed (alpha, beta), at ``1 - beta = alpha``
with a predicted error of inversion, and scheduled over the first half of the steps by the defaults of
:class:`revbifpn.dual_residual.Schedule` or others; ``int32 k=...``, exact streams at (1 - 2^-k, 2^-k), and scheduled.
Prints test accuracies and writes the raw numbers with every epoch's loss (JSON, CSV, PNG) to benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import command, results
from benchmarks.harness.command import entry
from benchmarks.harness.finetuning import (
    ORDINARY,
    WAYS,
    Prepare,
    Row,
    earlier_rows,
    fine_tune,
    report,
    run_ways,
    seeds_of,
)
from benchmarks.harness.terminal import track

DEPTH, WIDTH, HEADS = 12, 48, 4
BATCH, LEARNING_RATE = 32, 1e-3


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # [N, tokens, WIDTH]
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """8 x 8 pixels as 16 tokens of 2 x 2, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Data:
    images: Tensor  # [N, 1, 8, 8]
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> tuple[Data, Data]:
        """Digits 0 to 4, and 5 to 9."""
        raw = command.require("sklearn.datasets", "scikit-learn").load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(raw.target)
        test = torch.arange(len(labels)) % 5 == 4
        sets = []
        for low in (True, False):
            chosen = (labels < 5) == low
            sets.append(
                cls(images[chosen & ~test], labels[chosen & ~test], images[chosen & test], labels[chosen & test])
            )
        return sets[0], sets[1]


def train(model: nn.Module, prepare: Prepare, data: Data, epochs: int, seed: int) -> list[float]:
    """The mean loss of every epoch."""
    steps, order = len(data.images) // BATCH, torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from torch.randperm(len(data.images), generator=order)[: steps * BATCH].split(BATCH)

    def loss_of(model: nn.Module, chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(data.images[chosen]), data.labels[chosen])

    return fine_tune(model, batches(), epochs * steps, loss_of, rate=LEARNING_RATE, losses_every=steps, prepare=prepare)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the images for testing."""
    return 100 * (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default="*", help="names with wildcards (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between (default: %(default)s)")
    parser.add_argument("--add", action="store_true", help="to earlier results, if made with this commit and machine")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--pretrain", type=int, default=10, help="epochs of pretraining (default: %(default)s)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    ways = command.select("--ways", arguments.ways, list(WAYS), lambda way: (way,))
    output = command.pick_output(arguments.output)
    torch.set_num_threads(1)
    first, second = Data.load()
    seeds = seeds_of(arguments.seeds)
    settings = {name: getattr(arguments, name) for name in ("epochs", "pretrain")}
    settings |= {"batch": BATCH, "losses_every": len(second.images) // BATCH}
    stem = output / "dual_residual_digits_cpu"
    rows: list[Row] = earlier_rows(stem, settings, seeds, ways) if arguments.add else []
    for seed in track(seeds, lambda seed: f"seed {seed}", "digits"):
        torch.manual_seed(seed)
        pretrained = Transformer()
        train(pretrained, WAYS[ORDINARY], first, arguments.pretrain, seed)
        run = partial(train, data=second, epochs=arguments.epochs, seed=seed)
        rows += run_ways(pretrained, ways, seed, run, partial(accuracy, data=second))
    report("Test accuracy after fine-tuning, per cent", rows, stem, settings)


if __name__ == "__main__":
    sys.exit(main())
