"""Training memory of detectors and segmenters: RevBiFPN against ResNet with FPN and HRNet with HRFPN.

    python benchmarks/detection_memory.py                                    Faster R-CNN, minutes
    python benchmarks/detection_memory.py --detectors all --models '*'       everything; --resume goes on with it
    python benchmarks/detection_memory.py --models 'revbifpn_s3/*,hrnet_*' --norms frozen

A step (forward, losses, backward) of torchvision's detectors on images of 800 x 1344 (91 classes, 256 channels, 512
RoIs per image; fasterrcnn_large: 1024 x 2048), or of segmentation_models_pytorch's FPN on 1024 x 2048. The peak is the
most memory alive at once, less what existed before (parameters, images) and less the parameters' gradients; those are a
column of their own. MiB per image is the difference between steps of two images and of one. RevBiFPN trains whole, as
does HRNet; ResNet trains its last three stages. Of norms the statistics are frozen, as in MMDetection; with --norms
frozen the affine parameters too, as in torchvision. Segmenters train their norms.

All have the same heads. `fast` is revbifpn.fast under what revbifpn.detection does by default; `reversible` is plain
PyTorch, and `stored` ordinary training, of everybody, under torchvision's heads as they come. `heads recomputed` is a
rival under the heads of `fast`, HRFPN recomputed too; `checkpointed` recomputes its blocks as well.

No arithmetic is done on what is large (benchmarks/harness/unarithmetic.py); --real does it all, and takes hours. The
published AP and memory are those of arXiv 2206.14098, measured in MMDetection on GPUs. Prints tables and writes
benchmarks/results/detection_memory_cpu.{json,csv,png} and detection_parts_cpu.png.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
from torch import nn

from benchmarks.harness import command, detectors, plots, results
from benchmarks.harness.command import BenchmarkError, UsageError, entry
from benchmarks.harness.detectors import FASTER, FROZEN, PUBLISHED, SEGMENT, SIXTEEN, SIZES, STATISTICS, Candidate
from benchmarks.harness.terminal import Column, print_table, track
from benchmarks.harness.unarithmetic import WithoutArithmetic
from revbifpn.memory import MIB, PeakMemory

DEFAULT = "revbifpn_s*/fast,resnet*/stored,resnet*/checkpointed,hrnet*/stored,hrnet*/checkpointed"
ROIS = 512
BACKBONE, FPN, HEADS = "backbone", "FPN", "heads"
PARTS = (BACKBONE, FPN, HEADS)
KEYS = ("detector", "model", "variant")
GIGABYTES = (6, 8, 12, 16, 24)


def mark_parts(model: nn.Module, meter: PeakMemory) -> list[Any]:
    """Have the meter told in forward and backward which part runs; returns the hooks."""
    body, fpn = detectors.parts_of(model)

    def leaves(part: str, following: str) -> Any:
        def hook(module: nn.Module, inputs: Any, maps: Any) -> Any:
            meter.begin(following)
            tensors = [y for y in (maps.values() if isinstance(maps, dict) else maps) if y.requires_grad]
            for y in tensors:
                y.register_hook(lambda _: meter.begin(part))

        return hook

    def enters(part: str) -> Any:
        return lambda *_: meter.begin(part)

    return [
        body.register_forward_pre_hook(enters(BACKBONE)),
        body.register_forward_hook(leaves(BACKBONE, FPN)),
        fpn.register_forward_hook(leaves(FPN, HEADS)),
    ]


def step(c: Candidate, model: nn.Module, images: int, real: bool) -> dict[str, Any]:
    """The memory of one step, in bytes."""
    height, width = SIZES[c.detector]
    batch = [torch.rand(3, height, width) for _ in range(images)]
    rois: list[int] = []
    hooks = []
    if c.detector == SEGMENT:
        inputs = (torch.stack(batch),)
        labels = torch.zeros(images, height, width, dtype=torch.long)
    else:
        inputs = (batch, [detectors.objects(c.detector, height, width) for _ in range(images)])
        if hasattr(model, "roi_heads"):
            head = model.roi_heads.box_head
            hooks.append(head.register_forward_pre_hook(lambda _, given: rois.append(len(given[0]))))
    autocast = torch.autocast("cpu", torch.bfloat16) if c.variant == SIXTEEN else nullcontext()
    with nullcontext() if real else WithoutArithmetic(), PeakMemory() as meter:
        meter.begin(HEADS)
        hooks += mark_parts(model, meter)
        with autocast:
            found = model(*inputs)
            loss = nn.functional.cross_entropy(found, labels) if c.detector == SEGMENT else sum(found.values())
        del found
        kept = meter.live_bytes
        meter.begin(HEADS)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        peak, parts = meter.peak_without(gradients), meter.parts(gradients)
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    if rois and rois != [ROIS * images]:
        raise BenchmarkError(f"{c.label}: expected {ROIS} RoIs per image, got {rois}")
    named = {f"{part}_bytes": parts.get(part, 0) for part in PARTS}
    return {"peak_bytes": peak, "kept_bytes": kept} | named | {"gradient_bytes": sum(g.nbytes for g in gradients)}


def measure(c: Candidate, norms: str, real: bool) -> dict[str, Any]:
    """Steps of one and of two images."""
    with nullcontext() if real else WithoutArithmetic():  # large weights need no values
        model = detectors.make(c, norms)
    if c.variant == SIXTEEN:
        _unchecked(model)
    one, two = (step(c, model, images, real) for images in (1, 2))
    ap, gigabytes = PUBLISHED[c.detector].get(c.model, (None, None))
    return {
        **{"detector": c.detector, "model": c.model, "variant": c.variant},
        **one,
        "two_images_bytes": two["peak_bytes"],
        "per_image_bytes": two["peak_bytes"] - one["peak_bytes"],
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        "published_ap": ap,
        "published_gb": gigabytes,
    }


def _unchecked(model: nn.Module) -> None:
    """Without arithmetic there are no streams whose exactness a first step could check."""
    for module in model.modules():
        if hasattr(module, "self_check"):
            module.self_check = False


def capacity(row: dict[str, Any], gigabytes: int) -> int:
    """The largest batch that fits: activations, images, parameters, their gradients, SGD's momentum."""
    height, width = SIZES[row["detector"]]
    image = 3 * height * width * 4
    fixed = row["peak_bytes"] - row["per_image_bytes"] + row["parameter_bytes"] + 2 * row["gradient_bytes"]
    return max(0, int((gigabytes * 2**30 - fixed) // (row["per_image_bytes"] + image)))


def largest(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Per family and variant, the largest network of which an image fits, and how many images of it do."""
    families = dict.fromkeys((row["model"].rstrip("0123456789"), row["variant"]) for row in rows)
    for family, variant in families:
        own = [r for r in rows if (r["model"].rstrip("0123456789"), r["variant"]) == (family, variant)]
        cells = []
        for gigabytes in GIGABYTES:
            fitting = [row for row in own if capacity(row, gigabytes)]
            cells.append(f"{_short(fitting[-1])} x {capacity(fitting[-1], gigabytes)}" if fitting else "-")
        yield [family.rstrip("_sw") + " *", variant, *cells]


def _short(row: dict[str, Any]) -> str:
    return row["model"].rpartition("_")[2]  # s3, w18, resnet50


def _cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        names = ("peak_bytes", "per_image_bytes", "kept_bytes", *(f"{part}_bytes" for part in PARTS))
        mib = [f"{row[name] / MIB:.0f}" for name in (*names, "gradient_bytes", "parameter_bytes")]
        published = ["" if row[k] is None else f"{row[k]:.{d}f}" for k, d in (("published_ap", 1), ("published_gb", 2))]
        yield [row["model"], row["variant"], *mib, *published]


COLUMNS = (
    *(Column("backbone", number=False), Column("variant", number=False)),
    *map(Column, ("peak MiB", "MiB/image", "kept", "backbone", "FPN", "heads", "gradients", "parameters")),
    *map(Column, ("published AP", "published GB")),
)


def show(rows: Sequence[dict[str, Any]], norms: str, environment: dict[str, Any]) -> None:
    caption = (
        "peak: of one image; backbone, FPN and heads are its parts. Gradients of parameters are not in it.\n"
        "MiB/image: what a second image adds to the peak.\n" + results.origin(environment)
    )
    for detector in dict.fromkeys(row["detector"] for row in rows):
        own = [row for row in rows if row["detector"] == detector]
        height, width = SIZES[detector]
        frozen = "" if detector == SEGMENT else f", norms: {norms} frozen"
        title = f"{detector}, {height} x {width}, float32{frozen}"
        print_table(title, COLUMNS, [list(_cells(own))], caption)
        cells = [[row["model"], row["variant"], *(str(capacity(row, g)) for g in GIGABYTES)] for row in own]
        print_table(
            f"{detector}, {height} x {width}: largest batch, and the largest network of a family with its batch",
            (*COLUMNS[:2], *(Column(f"{g} GB") for g in GIGABYTES)),
            [cells, list(largest(own))],
            "Extrapolated from one and two images: too high where larger batches peak at another moment.\n"
            "Parameters, gradients and SGD's momentum counted; not counted: CUDA's context, what the allocator keeps.",
        )


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=DEFAULT, help="comma list of wildcards, as in resnet50,revbifpn_s*/fast")
    parser.add_argument("--detectors", default=FASTER, help=f"comma list of {', '.join(SIZES)}; or all")
    parser.add_argument("--norms", choices=(STATISTICS, FROZEN), default=STATISTICS, help="what of them is frozen")
    parser.add_argument("--size", metavar="HxW", help="of the images (default: each detector's, see above)")
    parser.add_argument("--real", action="store_true", help="do the arithmetic")
    parser.add_argument("--resume", action="store_true", help="keep what this commit wrote to --output")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = (int(part) for part in found.groups()) if found else (0, 0)
    if not (height and width) or height % 32 or width % 32 or height > width:
        raise UsageError(f"--size: got {text!r}, needs a height and a larger width in multiples of 32, as in 800x1344")
    return height, width


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.size:
        SIZES.update(dict.fromkeys(SIZES, _size(arguments.size)))
    known = tuple(SIZES)
    names = known if arguments.detectors == "all" else command.some_of("--detectors", arguments.detectors, known)
    chosen = command.select("--models", arguments.models, detectors.candidates(names), lambda c: (c.model, c.key))
    output = command.pick_output(arguments.output)
    command.require("torchvision")
    command.require("matplotlib")
    found = measured(arguments, output) if arguments.resume else {}
    order = {(c.detector, c.model, c.variant): i for i, c in enumerate(detectors.candidates(known))}
    for c in track(chosen, lambda c: c.label, "detection"):
        if (c.detector, c.model, c.variant) not in found:
            row = measure(c, arguments.norms, arguments.real)
            found[_key(row)] = row
            if arguments.resume:
                _save(list(found.values()), arguments, output, draw=False)
    rows = sorted(found.values(), key=lambda row: order[_key(row)])
    _save(rows, arguments, output)
    show(rows, arguments.norms, results.environment(torch.device("cpu")))


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["detector"], row["model"], row["variant"]  # KEYS


def _settings(names: Iterable[str], arguments: Any) -> dict[str, Any]:
    return {"sizes": {name: list(SIZES[name]) for name in names}, "norms": arguments.norms, "real": arguments.real}


def _stem(arguments: Any, output: Path, name: str = "detection_memory_cpu") -> Path:
    return output / (name + f"_{arguments.size}" * bool(arguments.size) + f"_{FROZEN}" * (arguments.norms == FROZEN))


def measured(arguments: Any, output: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The rows of an earlier run of the same commit, torch, kernels and settings, by :func:`_key`."""
    path = output / f"{_stem(arguments, output).name}.json"
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    now, then = results.environment(torch.device("cpu")), content["environment"]
    if any(then.get(name) != now[name] for name in ("commit", "torch", "kernels")):
        return {}
    settings = _settings(content["settings"]["sizes"], arguments)
    if now["commit"].endswith(("-dirty", "unknown")) or settings != content["settings"]:
        return {}
    return {_key(row): row for row in content["rows"]}


def _save(rows: Sequence[dict[str, Any]], arguments: Any, output: Path, *, draw: bool = True) -> None:
    """Raw results, and plots."""
    names = dict.fromkeys(row["detector"] for row in rows)
    environment = results.environment(torch.device("cpu"))
    units = {name: "B" for name in rows[0] if name.endswith("_bytes")} | {"published_ap": "%", "published_gb": "GB"}
    settings, stem = _settings(names, arguments), _stem(arguments, output)
    if not draw:
        results.save(stem, environment, settings, rows, KEYS, units)
        return
    with results.replacing(output) as new:
        plots.memory_parts(rows, new / f"{_stem(arguments, output, 'detection_parts_cpu').name}.png")
    print(results.save(stem, environment, settings, rows, KEYS, units, partial(plots.detection, rows)))


if __name__ == "__main__":
    sys.exit(main())
