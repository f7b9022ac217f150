"""The table behind "What fits on my card": memory of training steps, predicted by revbifpn.estimate.

    python benchmarks/fits.py                                    everything: an hour or two on one core
    python benchmarks/fits.py --models 'revbifpn_s3' --sizes 224x224 --missing

Classification and segmentation (segmentation_models_pytorch's FPN, 19 classes, cross-entropy at full resolution) are
simulated on fake tensors, in the chunks of a GPU: RevBiFPN on the fused kernels in three ways of precision and streams,
and RevBiFPN stored, HRNet, EfficientNet and ResNet at the same settings, with and without activation checkpointing.
Detectors cannot be simulated, since their shapes depend on values: they come from the measured steps in
benchmarks/results/detection_memory_*.json, of one image and of two.

Rows are written one by one into revbifpn/fits.json; --missing keeps those that it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
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

import revkernels
from benchmarks.harness import command, results
from benchmarks.harness.command import BenchmarkError, entry
from benchmarks.harness.detectors import FASTER, HEADS, LARGE, MASK, RETINA
from benchmarks.harness.networks import CHECKPOINTED, REVERSIBLE, STORED
from benchmarks.harness.rivals import RIVALS, Checkpointed, checkpoint_hrnet, import_timm
from benchmarks.harness.terminal import track
from revbifpn import fits
from revbifpn.configs import CONFIGS
from revbifpn.fits import CLASSIFICATION, Step
from revbifpn.streams import FIXED16

SEGMENTATION, SEGMENTATION_CLASSES = "segmentation", 19
SIZES = {CLASSIFICATION: ("224x224", "800x1344", "512x512"), SEGMENTATION: ("1024x2048", "512x1024")}
SETTINGS = (("float32", "float32"), ("bfloat16", "fixed16"), ("bfloat16", "fixed32"))
COMPARED = SETTINGS[:2]  # one for each precision: rivals have no streams
CLASSIFIERS = ("hrnet_w18", "hrnet_w32", "hrnet_w48", "tf_efficientnet_b0", "tf_efficientnet_b4", "tf_efficientnet_b7")
ENCODERS = {"resnet50": "ResNet-50", "resnet101": "ResNet-101"} | {
    name: rival.label for name, rival in RIVALS.items() if rival.family == "HRNet"
}
DETECTION = "detection_memory_*.json"
DETECTORS = {FASTER: "Faster R-CNN", LARGE: "Faster R-CNN", MASK: "Mask R-CNN", RETINA: "RetinaNet"}
LABELS = ENCODERS | {arch: f"RevBiFPN-{arch.rsplit('_', 1)[1].upper()}" for arch in CONFIGS}


@dataclass(frozen=True)
class Job:
    """A row to simulate, by the attributes that name it."""

    task: str
    network: str
    variant: str
    size: tuple[int, int]
    precision: str
    stream: str
    run: Callable[[], Step] = field(compare=False, repr=False)

    @property
    def label(self) -> str:
        height, width = self.size
        return f"{self.task} {self.network}/{self.variant} {height}x{width} {self.precision} {self.stream}"


def key(row: Step | Job) -> tuple[Any, ...]:
    return row.task, row.network, row.variant, row.size, row.precision, row.stream


class Segmenter(nn.Module):
    """A step of segmentation as a module: the loss of an encoder under smp's FPN, as a tensor of no dimensions."""

    def __init__(self, encoder: str, *, checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        smp = command.require("segmentation_models_pytorch", "segmentation-models-pytorch")
        self.network = smp.FPN(f"tu-{encoder}", encoder_weights=None, classes=SEGMENTATION_CLASSES, **options)
        if checkpointed:
            _checkpoint_encoder(self.network.encoder.model)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)  # [N, classes, H, W]
        labels = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits.float(), labels)


def _checkpoint_encoder(model: nn.Module) -> None:
    """As users do: timm's own where it has one; HRNet's modules and the blocks of its first stage by hand."""
    if hasattr(model, "stage2"):
        checkpoint_hrnet(model)
        return
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        model[stage] = nn.Sequential(*map(Checkpointed, model[stage]))


def _classification(size: tuple[int, int]) -> Iterator[Job]:
    for precision, stream in SETTINGS:
        for arch in CONFIGS:
            run = partial(fits.simulate_revbifpn, arch, size, precision, stream)
            yield Job(CLASSIFICATION, arch, fits.RECOMPUTED, size, precision, stream, run)
        if (precision, stream) not in COMPARED:
            continue
        for name in CLASSIFIERS:
            for variant in (STORED, CHECKPOINTED):
                make = partial(RIVALS[name].build, checkpointed=variant == CHECKPOINTED)
                about = {"network": name, "label": RIVALS[name].label, "variant": variant, "score": RIVALS[name].top1}
                run = partial(fits.simulate, make, size, precision, on_a_line=True, **about)
                yield Job(CLASSIFICATION, name, variant, size, precision, "", run)
        for arch in CONFIGS:
            run = partial(fits.simulate_revbifpn, arch, size, precision, "", STORED)
            yield Job(CLASSIFICATION, arch, STORED, size, precision, "", run)


def _segmentation(size: tuple[int, int]) -> Iterator[Job]:
    for precision, stream in COMPARED:
        for arch in CONFIGS:
            make = partial(Segmenter, arch, stream=stream)
            about = {"network": arch, "label": LABELS[arch], "variant": fits.RECOMPUTED, "stream": stream}
            run = partial(fits.simulate, make, size, precision, task=SEGMENTATION, **about)
            yield Job(SEGMENTATION, arch, fits.RECOMPUTED, size, precision, stream, run)
        for name in ENCODERS:
            for variant in (STORED, CHECKPOINTED):
                make = partial(Segmenter, name, checkpointed=variant == CHECKPOINTED)
                about = {"network": name, "label": LABELS[name], "variant": variant}
                run = partial(fits.simulate, make, size, precision, on_a_line=True, task=SEGMENTATION, **about)
                yield Job(SEGMENTATION, name, variant, size, precision, "", run)


def jobs() -> list[Job]:
    """Every row, those that are asked for most first."""
    makers = {CLASSIFICATION: _classification, SEGMENTATION: _segmentation}
    return [job for task, make in makers.items() for size in SIZES[task] for job in make(fits.parse_size(size))]


def detectors(folder: Path = results.RESULTS) -> Iterator[Step]:
    """The measured steps of detectors, of one image and of two."""
    for path in sorted(folder.glob(DETECTION)):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            if row["detector"] not in DETECTORS or row["variant"] in (HEADS, REVERSIBLE):
                continue
            variant, *sixteen = row["variant"].split()
            precision = "bfloat16" if sixteen else "float32"
            recomputed = variant == fits.RECOMPUTED
            height, width = content["settings"]["sizes"][row["detector"]]
            one, two = row["peak_bytes"], row["two_images_bytes"]
            yield Step(
                task=DETECTORS[row["detector"]],
                network=row["model"],
                label=LABELS.get(row["model"], row["model"]),
                variant=variant,
                size=(height, width),
                precision=precision,
                stream=(FIXED16 if sixteen else fits.DEFAULT_STREAMS[precision]) if recomputed else "",
                score=row["published_ap"],
                image_bytes=3 * height * width * 4,
                parameter_bytes=row["parameter_bytes"],
                gradient_bytes=row["gradient_bytes"],
                state_bytes=row["gradient_bytes"],
                peaks=((1, one), (2, two)),
                slope=two - one,
            )


def absent(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """What a table of ``steps`` is to have and has not, by the attributes that a reader chooses by."""
    known = {key(step) for step in steps}
    rows = [(key(row), LABELS.get(row.network) or RIVALS[row.network].label) for row in (*jobs(), *detectors())]
    names = ("task", "network", "variant", "size", "precision", "stream")
    return [dict(zip(names, about, strict=True)) | {"label": label} for about, label in rows if about not in known]


def script() -> str:
    """The table as docs/_static/fits.js reads it: a page that is opened as a file may not read other files."""
    table = json.loads(fits.TABLE.read_text()) | {"absent": absent(fits.load()[1])}
    return "window.FITS = {};\n".format(json.dumps(table).replace("</", "<\\/"))


def environment() -> dict[str, Any]:
    """What a number needs to be read later; ``measured``: the tasks whose rows are measured steps, on a CPU."""
    packages = ("timm", "segmentation-models-pytorch")
    record = results.environment(torch.device("cpu"))
    about = {name: record[name] for name in ("date", "commit", "torch", "python")} | {"version": revkernels.__version__}
    about["measured"] = sorted({row.task for row in detectors()})
    return about | {name: importlib.metadata.version(name) for name in packages}


def write(path: Path, rows: Sequence[Step]) -> None:
    """One row per line, so that changes can be read."""
    encoded = ",\n".join("  " + json.dumps(asdict(row), separators=(",", ":")) for row in rows)
    text = f' "environment": {json.dumps(environment())},\n "rows": [\n{encoded}\n ]'
    results.write_text(path, "{\n" + text + "\n}\n")


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="*", help="comma list of wildcards, as in revbifpn_s3,hrnet_*")
    parser.add_argument("--sizes", default="*", help="comma list of wildcards, as in 224x224")
    parser.add_argument("--missing", action="store_true", help="only what the table has not")
    parser.add_argument("--output", type=Path, default=fits.TABLE, help="(default: %(default)s)")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    import_timm()
    import revbifpn.adapters.timm  # noqa: F401

    everything = jobs()
    chosen = command.select("--models", arguments.models, everything, lambda job: (job.network,))
    chosen = command.select("--sizes", arguments.sizes, chosen, lambda job: ("{}x{}".format(*job.size),))
    known = {key(row): row for row in fits.load(arguments.output)[1]} if arguments.output.exists() else {}
    if arguments.missing:
        chosen = [job for job in chosen if key(job) not in known]
    order = {key(job): i for i, job in enumerate(everything)}
    known = {name: row for name, row in known.items() if name in order}
    known |= {key(row): row for row in detectors()}
    for job in track(chosen, lambda job: job.label, "fits"):
        step = job.run()
        if key(step) != key(job):
            raise BenchmarkError(f"{job.label}: the simulated row is called {key(step)}")
        known[key(step)] = step
        write(arguments.output, sorted(known.values(), key=lambda row: order.get(key(row), len(order))))
    if not chosen:
        write(arguments.output, sorted(known.values(), key=lambda row: order.get(key(row), len(order))))
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
