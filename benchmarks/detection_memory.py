"""Training memory of detectors: Faster R-CNN on RevBiFPN, against ResNet and HRNet with the same FPN and heads.

    python benchmarks/detection_memory.py                                     S0, S3, ResNet-50, HRNet-W18; minutes
    python benchmarks/detection_memory.py --models 'revbifpn_s*/fast,hrnet_*' more of them
    python benchmarks/detection_memory.py --size 416x672                      a quarter of the pixels

Runs a training step of torchvision's FasterRCNN (91 classes, FPN of 256 channels, 512 RoIs per image) on one random
image and reports the most memory alive at once in it, without what existed before: parameters, buffers, the image.
Norms are frozen, as detectors train; ResNet trains its last three stages, which is torchvision's default, all others
train whole. The RPN's proposals are its anchors, so that random weights give every detector 512 RoIs. `kept` is what is
alive between forward and backward. `fast` is revbifpn.fast with what revbifpn_fpn_backbone does by default;
`checkpointed` keeps the inputs of a rival's blocks only.

Beside the numbers stand the published ones (arXiv 2206.14098: box AP on COCO, schedule 1x, and memory per image, in
MMDetection on GPUs). Prints a table and writes it to benchmarks/results/detection_memory_cpu.{json,csv}.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: an installed revbifpn comes first, this checkout after it
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks.harness import command

    command.quiet_interrupts()

import torch
from torch import Tensor, nn

import revbifpn
from benchmarks.harness import command, results
from benchmarks.harness.command import BenchmarkError, UsageError, entry
from benchmarks.harness.rivals import Checkpointed, checkpoint_hrnet, import_timm
from benchmarks.harness.terminal import Column, print_table, track
from revbifpn.configs import CONFIGS
from revbifpn.memory import MIB, PeakMemory

FAST, REVERSIBLE, STORED, CHECKPOINTED = "fast", "reversible", "stored", "checkpointed"
DEFAULT = "revbifpn_s0/fast,revbifpn_s3/fast,resnet50,hrnet_w18"
CLASSES, WIDTH, OBJECTS, ROIS = 91, 256, 8, 512
# Box AP on COCO and GB per image, as published for Faster R-CNN; read off the paper's figure where it prints no number.
PUBLISHED = {
    "revbifpn_s0": (31.4, 0.84),
    "revbifpn_s1": (32.0, 0.89),
    "revbifpn_s2": (36.3, 1.07),
    "revbifpn_s3": (38.7, 1.31),
    "revbifpn_s4": (40.3, 2.03),
    "revbifpn_s5": (41.3, 2.75),
    "revbifpn_s6": (42.2, 3.69),
    "resnet50": (36.7, 1.81),
    "resnet101": (39.2, 2.72),
    "hrnet_w18": (36.2, 3.13),
    "hrnet_w32": (39.6, 4.31),
    "hrnet_w48": (41.3, 5.82),
}


@dataclass(frozen=True)
class Backbone:
    """A backbone with FPN: its network, how activations are kept, and how to make it."""

    name: str
    variant: str
    make: Callable[[], nn.Module]

    @property
    def key(self) -> str:
        return f"{self.name}/{self.variant}"


class Features(nn.Module):
    """A network of timm that returns a list of maps, under an FPN, as :class:`BackboneWithFPN` is."""

    def __init__(self, network: nn.Module) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        self.network, self.out_channels = network, WIDTH
        self.fpn = FeaturePyramidNetwork(network.feature_info.channels(), WIDTH, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): y for i, y in enumerate(self.network(x))})


def _revbifpn(arch: str, variant: str) -> nn.Module:
    from revbifpn.adapters.torchvision import BackboneWithFPN, revbifpn_fpn_backbone

    if variant == FAST:
        return revbifpn_fpn_backbone(arch, frozen_norms=True)
    body = getattr(revbifpn, arch)(classes=None, reversible=variant == REVERSIBLE).freeze_norms()
    return BackboneWithFPN(body, recompute=False)


def _resnet(name: str, variant: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)
    if variant == CHECKPOINTED:
        for stage in ("layer2", "layer3", "layer4"):
            blocks = backbone.body[stage]
            for i, block in enumerate(blocks):
                blocks[i] = Checkpointed(block)
    return backbone


def _hrnet(name: str, variant: str) -> nn.Module:
    timm = import_timm()
    network = timm.create_model(name, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    network = timm.layers.freeze_batch_norm_2d(network)
    if variant == CHECKPOINTED:
        checkpoint_hrnet(network)
    return Features(network)


def catalogue() -> list[Backbone]:
    """Every backbone in every variant."""
    families: dict[Callable[[str, str], nn.Module], tuple[Sequence[str], Sequence[str]]] = {
        _revbifpn: (tuple(CONFIGS), (FAST, REVERSIBLE, STORED)),
        _resnet: (("resnet50", "resnet101"), (STORED, CHECKPOINTED)),
        _hrnet: (("hrnet_w18", "hrnet_w32", "hrnet_w48"), (STORED, CHECKPOINTED)),
    }
    return [
        Backbone(name, variant, partial(make, name, variant))
        for make, (names, variants) in families.items()
        for name in names
        for variant in variants
    ]


def objects(height: int, width: int) -> dict[str, Tensor]:
    """Boxes [n, 4] of several sizes all over an image, and their labels [n]."""
    centre = torch.rand(OBJECTS, 2) * torch.tensor([width, height])
    extent = torch.logspace(-5, -1, OBJECTS, base=2)[:, None] * min(width, height)
    limit = torch.tensor([width, height])
    boxes = torch.cat([(centre - extent / 2).clamp(min=0), torch.minimum(centre + extent / 2, limit)], 1)
    return {"boxes": boxes, "labels": torch.randint(1, CLASSES, (OBJECTS,))}


def measure(backbone: Backbone, height: int, width: int) -> dict[str, Any]:
    """The step's memory, in bytes, and the detector's parameters."""
    from torchvision.models.detection import FasterRCNN

    torch.manual_seed(0)
    model = FasterRCNN(backbone.make(), CLASSES, min_size=height, max_size=width, rpn_nms_thresh=1.0).train()
    nn.init.zeros_(model.rpn.head.bbox_pred.weight)
    rois: list[int] = []
    model.roi_heads.box_head.register_forward_pre_hook(lambda head, inputs: rois.append(len(inputs[0])))
    images, targets = [torch.rand(3, height, width)], [objects(height, width)]
    with PeakMemory() as meter:
        loss = sum(model(images, targets).values())
        kept = meter.live_bytes
        loss.backward()
    if rois != [ROIS]:
        raise BenchmarkError(f"{backbone.key}: expected {ROIS} RoIs, got {rois}; take a larger --size")
    ap, gigabytes = PUBLISHED[backbone.name]
    return {
        "model": backbone.name,
        "variant": backbone.variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gradient_bytes": sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None),
        "peak_bytes": meter.peak_bytes,
        "kept_bytes": kept,
        "published_ap": ap,
        "published_gb": gigabytes,
    }


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = (int(part) for part in found.groups()) if found else (0, 0)
    if not (height and width) or height % 32 or width % 32 or height > width:
        raise UsageError(f"--size: got {text!r}, needs a height and a larger width in multiples of 32, as in 800x1344")
    return height, width


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        mib = (f"{row[name] / MIB:.0f}" for name in ("peak_bytes", "kept_bytes", "gradient_bytes"))
        published = f"{row['published_ap']:.1f}", f"{row['published_gb']:.2f}"
        yield [row["model"], row["variant"], *mib, f"{row['parameters'] / 1e6:.1f}", *published]


COLUMNS = (
    Column("backbone", number=False),
    Column("variant", number=False),
    *map(Column, ("peak MiB", "kept MiB", "gradients MiB", "parameters M", "published AP", "published GB")),
)


def _parser() -> command.ArgumentParser:
    parser = command.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=DEFAULT, help="comma list of wildcards, as in resnet50,revbifpn_s*/fast")
    parser.add_argument("--size", default="800x1344", metavar="HxW", help="of the image (default: %(default)s)")
    parser.add_argument("--output", default=str(results.RESULTS), help="directory for the results")
    return parser


@entry
def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    height, width = _size(arguments.size)
    chosen = command.select("--models", arguments.models, catalogue(), lambda b: (b.name, b.key))
    output = command.pick_output(arguments.output)
    command.require("torchvision")
    rows = [measure(b, height, width) for b in track(chosen, lambda b: b.key, "detection")]

    environment = results.environment(torch.device("cpu"))
    settings = {"height": height, "width": width, "images": 1, "classes": CLASSES, "objects": OBJECTS}
    units = {"peak_bytes": "B", "kept_bytes": "B", "gradient_bytes": "B", "parameters": "1"}
    name = "detection_memory_cpu" + ("" if arguments.size == "800x1344" else f"_{arguments.size}")
    print_table(
        f"Faster R-CNN, one image of {height} x {width}, float32, norms frozen",
        COLUMNS,
        [list(_table(rows))],
        results.origin(environment),
    )
    print(results.save(output / name, environment, settings, rows, ("model", "variant"), units))


if __name__ == "__main__":
    sys.exit(main())
