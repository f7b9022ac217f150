"""What fits on a card: the largest batch of a training step, its memory by part, and rivals at the same settings.

    python -m revbifpn.fits --card 12GB --size 800x1344
    python -m revbifpn.fits --card 24GB --size 512x512 --precision bfloat16 --stream fixed16 --optimizer adamw

Answers come from ``fits.json`` beside this file, which ``benchmarks/fits.py`` makes with :mod:`revbifpn.estimate`: no
step is run, and no number was measured on a GPU. Sizes that it does not have are simulated, for RevBiFPN alone.
The documentation's page "What fits on my card" reads the same file.

At batch n a step takes

    total(n) = activations(n) + n * image + parameters + gradients + states * state,

where activations(n) is known at some batches, on straight lines between them, and on a line of known slope beyond.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revbifpn import fast, model
from revbifpn.configs import CONFIGS
from revbifpn.estimate import MemoryEstimate, StepEstimator

TABLE = Path(__file__).with_name("fits.json")
CLASSIFICATION = "classification"
RECOMPUTED, STORED = "fast", "stored"
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adamw": 2}  # states per parameter
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_STREAMS = {"float32": "float32", "bfloat16": "fixed32"}
UNITS = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


@dataclass(frozen=True)
class Step:
    """A training step of one network at one setting: its memory at any batch.

    Attributes:
        task: "classification", or what the file of its numbers says.
        network: its name, such as "revbifpn_s3" or "hrnet_w18".
        label: its name for people.
        variant: how activations are kept: "fast", "stored", "checkpointed".
        size: height and width of an image, in pixels.
        precision: of the forward: "float32" or, under autocast, "bfloat16".
        stream: format of the streams; empty for a network that has none.
        score: published accuracy, in per cent; None where there is none.
        image_bytes: of one image.
        parameter_bytes: of parameters and buffers.
        gradient_bytes: of the parameters' gradients.
        state_bytes: of one state of an optimizer for every parameter that trains.
        peaks: pairs of a batch and its activations in bytes, from small to large.
        slope: bytes per sample beyond the last of them.
    """

    task: str
    network: str
    label: str
    variant: str
    size: tuple[int, int]
    precision: str
    stream: str
    score: float | None
    image_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    peaks: tuple[tuple[int, int], ...] = field(repr=False)
    slope: float

    @property
    def is_rival(self) -> bool:
        """Whether it is not what this package trains by default."""
        return self.variant != RECOMPUTED

    def activations(self, batch: int) -> int:
        """Bytes at the peak of a step of ``batch`` images; see the top of this file."""
        (last, peak), (first, least) = self.peaks[-1], self.peaks[0]
        if batch >= last:
            return math.ceil(peak + self.slope * (batch - last))
        if batch <= first:
            return math.ceil(least * batch / first)
        i = bisect_left(self.peaks, (batch, 0))
        (low, below), (high, above) = self.peaks[i - 1], self.peaks[i]
        return math.ceil(below + (above - below) * (batch - low) / (high - low))

    def estimate(self, batch: int, optimizer_states: int = 0) -> MemoryEstimate:
        """The memory of a step by part, as :func:`revbifpn.estimate.estimate_memory` has it."""
        return MemoryEstimate(
            activations=self.activations(batch),
            images=self.image_bytes * batch,
            parameters=self.parameter_bytes,
            gradients=self.gradient_bytes,
            optimizer=optimizer_states * self.state_bytes,
        )

    def largest_batch(self, memory_bytes: float, optimizer_states: int = 0) -> int:
        """The largest batch with a total of at most ``memory_bytes``; 0 where not even one image fits."""
        if self.estimate(1, optimizer_states).total > memory_bytes:
            return 0
        fits, too_large = 1, 2
        while self.estimate(too_large, optimizer_states).total <= memory_bytes:
            fits, too_large = too_large, 2 * too_large
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            if self.estimate(middle, optimizer_states).total <= memory_bytes:
                fits = middle
            else:
                too_large = middle
        return fits


def simulate(
    make: Callable[[], nn.Module],
    size: Sequence[int],
    precision: str = "float32",
    *,
    smallest_bytes: float = 4 * 2**30,
    on_a_line: bool = False,
    **about: Any,
) -> Step:
    """Simulate a network's step (:class:`revbifpn.estimate.StepEstimator`, in the chunks of a GPU).

    Args:
        make: builds the network; it is called under ``torch.device("meta")``.
        size: height and width of an image, in pixels.
        precision: "float32", or "bfloat16" for the forward under autocast.
        smallest_bytes: of the cards that will be asked for; where fewer images fit than the estimator needs for its
            line, smaller batches are simulated too.
        on_a_line: every image takes as much as the one before, as where activations are stored or checkpointed: nothing
            is computed in chunks. Two batches are simulated then.
        about: ``network``, ``label``, ``variant`` and the other attributes of :class:`Step`.
    """
    with torch.device("meta"):
        network = make()
    estimator = StepEstimator(network, size, PRECISIONS[precision], optimizer_states=1, device="cuda")
    batches = (1, 4) if on_a_line else estimator.line_batches()
    found = {n: estimator.estimate(n) for n in batches}
    (half, full) = batches[-2:]
    slope = (found[full].activations - found[half].activations) / (full - half)
    if not on_a_line and found[full].total + found[full].optimizer > smallest_bytes:
        found |= {n: estimator.estimate(n) for n in (1, 2, 4) if n not in found}
    one = found[full]
    return Step(
        **{"task": CLASSIFICATION, "stream": "", "score": None} | about,
        size=(size[0], size[1]),
        precision=precision,
        image_bytes=one.images // full,
        parameter_bytes=one.parameters,
        gradient_bytes=one.gradients,
        state_bytes=one.optimizer,
        peaks=tuple((n, found[n].activations) for n in sorted(found)),
        slope=slope,
    )


def simulate_revbifpn(arch: str, size: Sequence[int], precision: str, stream: str, variant: str = RECOMPUTED) -> Step:
    """A step of a published scale, on the fused kernels (``variant="fast"``) or with stored activations."""
    config = CONFIGS[arch]
    options = {"pad": any(side % 32 for side in size)}
    if variant == STORED:
        make = partial(getattr(model, arch), reversible=False, **options)
    else:
        make = partial(getattr(fast, arch), stream=stream, **options)
    label = f"RevBiFPN-{arch.rsplit('_', 1)[1].upper()}"
    about: dict[str, Any] = {"network": arch, "label": label, "score": config.top1}
    about |= {"variant": variant, "stream": "" if variant == STORED else stream}
    return simulate(make, size, precision, on_a_line=variant == STORED, **about)


def load(path: Path = TABLE) -> tuple[dict[str, Any], list[Step]]:
    """What the table says of its making, and its steps."""
    content = json.loads(path.read_text())
    steps = []
    for row in content["rows"]:
        peaks = tuple((int(batch), peak) for batch, peak in row["peaks"])
        steps.append(Step(**row | {"size": tuple(row["size"]), "peaks": peaks}))
    return content["environment"], steps


def parse_bytes(text: str) -> int:
    """Bytes of "12GB", "11.5 GB" or "900MB"; 1 GB is 2^30 bytes.

    Raises:
        ValueError: the text is no positive amount of memory.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMG])i?B)?\s*", text, re.IGNORECASE)
    amount = float(found[1]) * UNITS[f"{found[2].upper()}B" if found[2] else ""] if found else 0
    if not amount >= 2**20:
        raise ValueError(f"got {text!r}, needs an amount of memory of at least 1 MB, as in 12GB")
    return int(amount)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "800x1344", or of "224" for a square.

    Raises:
        ValueError: the text is no size.
    """
    found = re.fullmatch(r"\s*(\d+)(?:\s*[x×]\s*(\d+))?\s*", text)  # noqa: RUF001
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if height < 32 or width < 32:
        raise ValueError(f"got {text!r}, needs a height and a width of at least 32 pixels, as in 800x1344")
    return height, width


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` as argparse wants it: its message is what the user reads."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


HEADER = ("network", "activations kept", "batch", "activations", "images", "parameters", "gradients", "optimizer")


def lines(steps: Sequence[Step], memory_bytes: float, optimizer_states: int) -> list[str]:
    """The table that the command prints: largest batches, and GB by part."""
    rows: list[tuple[str, ...]] = [HEADER]
    for step in steps:
        batch = step.largest_batch(memory_bytes, optimizer_states)
        parts = step.estimate(batch or 1, optimizer_states)
        values = (parts.activations, parts.images, parts.parameters, parts.gradients, parts.optimizer)
        kept = f"{step.variant}, {step.stream} streams" if step.stream else step.variant
        rows.append((step.label, kept, str(batch or "none"), *(f"{value / 2**30:.2f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def choose(
    steps: Sequence[Step], task: str, size: tuple[int, int], precision: str, stream: str, models: Sequence[str]
) -> list[Step]:
    """The table's steps at one setting; rivals have no streams, or those that they have."""
    return [
        step
        for step in steps
        if (step.task, step.size, step.precision) == (task, size, precision)
        and (step.is_rival or step.stream == stream)
        and (not models or step.network in models)
    ]


def _parser(tasks: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m revbifpn.fits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card", type=_argument(parse_bytes), required=True, metavar="12GB", help="memory of the card")
    parser.add_argument("--size", type=_argument(parse_size), default=(224, 224), metavar="HxW", help="of the images")
    parser.add_argument("--task", choices=tasks, default=CLASSIFICATION)
    parser.add_argument("--models", default="", help="comma list, such as revbifpn_s3,hrnet_w18 (default: all)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument(
        "--stream", choices=("float32", "fixed32", "fixed16"), help="default: float32, or fixed32 with bfloat16"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="momentum")
    parser.add_argument("--reserve", type=_argument(parse_bytes), default=0, metavar="1GB", help="left free")
    parser.add_argument("--simulate", action="store_true", help="RevBiFPN anew, whatever the table has")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    environment, steps = load()
    tasks = list(dict.fromkeys((CLASSIFICATION, *(step.task for step in steps))))
    parser = _parser(tasks)
    arguments = parser.parse_args(argv)
    task, precision, (height, width) = arguments.task, arguments.precision, arguments.size
    stream = arguments.stream or DEFAULT_STREAMS[precision]
    models = [name.strip() for name in arguments.models.split(",") if name.strip()]
    memory, states = arguments.card - arguments.reserve, OPTIMIZERS[arguments.optimizer]
    unknown = sorted({*models} - {*CONFIGS} - {step.network for step in steps})
    if unknown:
        known = ", ".join(sorted({*CONFIGS, *(step.network for step in steps)}))
        parser.error(f"argument --models: {unknown[0]!r} is unknown; choose from {known}")

    found = [] if arguments.simulate else choose(steps, task, (height, width), precision, stream, models)
    how = "measured on a CPU, extrapolated" if task in environment["measured"] else "predicted"
    source = "{how}: the table of {date}, revbifpn-fast {version}, torch {torch}".format(how=how, **environment)
    if not any(not step.is_rival for step in found):
        if task != CLASSIFICATION:
            sizes = sorted({step.size for step in steps if step.task == task})
            have = ", ".join(f"{h}x{w}" for h, w in sizes)
            parser.error(f"argument --size: {task} is in the table at {have} only, in some precisions and streams")
        chosen = [arch for arch in CONFIGS if not models or arch in models]
        source = f"predicted: simulated now, torch {torch.__version__}; rivals are in the table at other sizes only"
        for arch in chosen:
            print(f"simulating {arch}", file=sys.stderr, flush=True)
            found.append(simulate_revbifpn(arch, (height, width), precision, stream))
    print(
        f"Training, {task}, {height} x {width}, {precision}, {arguments.optimizer}, "
        f"{memory / 2**30:g} GB: largest batch, and GB by part",
        *lines(found, memory, states),
        f"{source[0].upper() + source[1:]}; nothing was measured on a GPU. 1 GB = 2^30 bytes.",
        "Not counted: CUDA's context, workspaces, what the allocator rounds up and keeps (--reserve).",
        sep="\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
