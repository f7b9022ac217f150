"""Fine-tuning a pretrained network reversibly, on real images: ordinary against dual-residual, float and exact.

    python benchmarks/dual_residual_digits.py                three seeds; minutes
    python benchmarks/dual_residual_digits.py --seeds 1 --epochs 2

A small vision transformer (12 blocks of width 48) is pretrained on scikit-learn's handwritten digits 0 to 4 and
fine-tuned as a whole on 5 to 9, of which every fifth image is for testing. Fine-tuning starts from the same weights and
sees the same batches in every way: ordinary; ``float``, dual-residual at (1/2, 1/2), at (0, 1), and scheduled from
(3/4, 1/4) to (1/2, 1/2) over the first half; ``int32 k=...``, exact streams at (1 - 2^-k, 2^-k), and scheduled from
k = 7 to 1 over the first half. Prints test accuracies and writes the raw numbers with every epoch's loss (JSON, CSV) to
benchmarks/results.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
from benchmarks.harness.terminal import Column, print_table, track
from revbifpn.dual_residual import Schedule, convert

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


Prepare = Callable[[nn.Module, int], Schedule | None]


def _ordinary(model: nn.Module, steps: int) -> None:
    return None


def _fixed(model: nn.Module, steps: int, *, alpha: float, beta: float, exact: bool) -> None:
    convert(model, alpha=alpha, beta=beta, exact=exact)


def _scheduled(model: nn.Module, steps: int, *, exact: bool) -> Schedule:
    convert(model, exact=exact)
    return Schedule(model, max(1, steps // 2))


WAYS: dict[str, Prepare] = {
    "ordinary": _ordinary,
    "float (1/2, 1/2)": partial(_fixed, alpha=0.5, beta=0.5, exact=False),
    "float (0, 1)": partial(_fixed, alpha=0.0, beta=1.0, exact=False),
    "float scheduled": partial(_scheduled, exact=False),
    "int32 k=7": partial(_fixed, alpha=1 - 2.0**-7, beta=2.0**-7, exact=True),
    "int32 k=3": partial(_fixed, alpha=1 - 2.0**-3, beta=2.0**-3, exact=True),
    "int32 k=1": partial(_fixed, alpha=0.5, beta=0.5, exact=True),
    "int32 scheduled": partial(_scheduled, exact=True),
}


@dataclass
class Row:
    """One run, or with ``seed="mean"`` the means of a way."""

    way: str
    seed: int | str
    test_accuracy: float  # per cent
    train_loss: float  # mean over the last epoch
    difference: float | None = None  # of the mean accuracy to the ordinary one, points
    losses: list[float] = field(default_factory=list)  # mean of every epoch


def train(model: nn.Module, data: Data, epochs: int, seed: int, prepare: Prepare = _ordinary) -> list[float]:
    """AdamW, one-cycle; the mean loss of every epoch."""
    steps = len(data.images) // BATCH
    schedule = prepare(model, epochs * steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    order, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in range(epochs):
        sums = []
        for chosen in torch.randperm(len(data.images), generator=order)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            loss.backward()
            optimizer.step()
            rate.step()
            if schedule is not None:
                schedule.step()
            sums.append(loss.item())
        losses.append(statistics.fmean(sums))
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the images for testing."""
    model.eval()
    return 100 * (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of every way (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--pretrain", type=int, default=10, help="epochs of pretraining (default: %(default)s)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    output = command.pick_output(arguments.output)
    torch.set_num_threads(1)
    first, second = Data.load()
    rows: list[Row] = []
    for seed in track(range(arguments.seeds), lambda seed: f"seed {seed}", "digits"):
        torch.manual_seed(seed)
        pretrained = Transformer()
        train(pretrained, first, arguments.pretrain, seed)
        for name, prepare in WAYS.items():
            model = copy.deepcopy(pretrained)
            losses = train(model, second, arguments.epochs, seed, prepare)
            rows.append(Row(name, seed, accuracy(model, second), losses[-1], losses=losses))
    means = []
    for name in WAYS:
        own = [row for row in rows if row.way == name]
        means.append(
            Row(name, "mean", *(statistics.fmean(getattr(r, m) for r in own) for m in ("test_accuracy", "train_loss")))
        )
        means[-1].difference = means[-1].test_accuracy - means[0].test_accuracy
    environment = results.environment(torch.device("cpu"))
    columns = [Column("way", False), *(Column(f"seed {s}") for s in range(arguments.seeds)), Column("mean")]
    columns += [Column("to ordinary"), Column("loss")]
    cells = [
        [m.way, *(f"{r.test_accuracy:.2f}" for r in rows if r.way == m.way), f"{m.test_accuracy:.2f}",
         f"{m.difference:+.2f}", f"{m.train_loss:.4f}"]
        for m in means
    ]  # fmt: skip
    print_table("Test accuracy after fine-tuning, per cent", columns, [cells], results.origin(environment))
    settings = {"seeds": arguments.seeds, "epochs": arguments.epochs, "pretrain": arguments.pretrain, "batch": BATCH}
    units = {"test_accuracy": "%", "train_loss": "1", "difference": "points"}
    stem = output / "dual_residual_digits_cpu"
    print(results.save(stem, environment, settings, [asdict(r) for r in rows + means], ("way", "seed"), units))


if __name__ == "__main__":
    sys.exit(main())
