"""Detectors and segmenters whose training memory is compared: every backbone in every variant, under the same heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revbifpn
from benchmarks.harness.networks import CHECKPOINTED, FAST, REVERSIBLE, STORED
from benchmarks.harness.rivals import Checkpointed, checkpoint_hrnet, import_timm
from revbifpn.configs import CONFIGS

FASTER, MASK, RETINA, SEGMENT = "fasterrcnn", "maskrcnn", "retinanet", "segmentation"
LARGE = f"{FASTER}_large"  # the same on larger images
SIXTEEN = f"{FAST} bf16 fixed16"
HEADS = "heads recomputed"  # of a rival whose backbone is stored
SIZES = {FASTER: (800, 1344), MASK: (800, 1344), RETINA: (800, 1344), SEGMENT: (1024, 2048), LARGE: (1024, 2048)}
CLASSES, SEGMENTED, WIDTH, OBJECTS = 91, 19, 256, 8
STATISTICS, FROZEN = "statistics", "frozen"  # what of the norms is frozen: as in MMDetection, as in torchvision

# Box AP on COCO (schedule 1x) and GB per image, as published; read off the paper's figure where it prints no number.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    FASTER: {
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
    },
    MASK: {
        "revbifpn_s0": (31.4, 0.87),
        "revbifpn_s1": (34.0, 0.91),
        "revbifpn_s2": (37.1, 1.06),
        "revbifpn_s3": (39.4, 1.33),
        "revbifpn_s4": (41.5, 2.05),
        "revbifpn_s5": (42.2, 2.77),
        "revbifpn_s6": (43.3, 3.71),
        "resnet50": (37.8, 2.09),
        "resnet101": (40.0, 2.88),
        "hrnet_w18": (37.1, 3.33),
        "hrnet_w32": (40.9, 4.51),
    },
    RETINA: {},
    SEGMENT: {},
    LARGE: {},
}


@dataclass(frozen=True)
class Candidate:
    """A backbone, how its activations are kept, and the detector over it."""

    detector: str
    model: str
    variant: str

    @property
    def key(self) -> str:
        return f"{self.model}/{self.variant}"

    @property
    def label(self) -> str:
        return f"{self.detector} {self.key}"


def candidates(detectors: Sequence[str]) -> list[Candidate]:
    rivals = ("resnet50", "resnet101", "hrnet_w18", "hrnet_w32", "hrnet_w48")
    families = ((tuple(CONFIGS), (FAST, SIXTEEN, REVERSIBLE, STORED)), (rivals, (STORED, HEADS, CHECKPOINTED)))
    left_out = {SEGMENT: (HEADS,), LARGE: (HEADS, REVERSIBLE)}  # the former's head is one map
    return [
        Candidate(detector, model, variant)
        for detector in detectors
        for models, variants in families
        for model in models
        for variant in variants
        if variant not in left_out.get(detector, ())
    ]


# Backbones --------------------------------------------------------------------------------------


class HRFPN(nn.Module):
    """HRNet's neck: all levels, upsampled and concatenated, to one map; pooled to ``outputs`` levels, convolved.

    Source: Sun et al., High-Resolution Representations for Labeling Pixels and Regions, arXiv 1904.04514.

    Args:
        channels: of the levels.
        outputs: number of maps, from the resolution of the first level on, divided by ``stride``.
        recompute: keep the levels alone.
    """

    def __init__(self, channels: Sequence[int], outputs: int = 5, stride: int = 1, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.reduction = nn.Conv2d(sum(channels), WIDTH, 1)
        self.outputs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, stride, 1) for _ in range(outputs))

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        run = self._run
        found = checkpoint(run, *maps, use_reentrant=False) if self.recompute else run(*maps)
        return {str(i): y for i, y in enumerate(found)}

    def _run(self, first: Tensor, *others: Tensor) -> list[Tensor]:
        size = first.shape[-2:]
        whole = torch.cat([first, *(F.interpolate(x, size=size, mode="bilinear") for x in others)], 1)
        merged = self.reduction(whole)
        return [conv(F.avg_pool2d(merged, 2**i) if i else merged) for i, conv in enumerate(self.outputs)]


class Features(nn.Module):
    """A network that returns a list of maps, and a neck."""

    def __init__(self, body: nn.Module, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, WIDTH

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


def _backbone(c: Candidate) -> nn.Module:
    one_stage, recompute = c.detector == RETINA, c.variant == CHECKPOINTED
    heads = c.variant in (HEADS, CHECKPOINTED)
    if c.model.startswith("resnet"):
        return _resnet(c.model, one_stage, recompute, heads)
    timm = import_timm()
    body = timm.create_model(c.model, features_only=True, feature_location="", out_indices=(1, 2, 3, 4))
    if recompute:
        checkpoint_hrnet(body)
    fpn = HRFPN(body.feature_info.channels(), stride=2 if one_stage else 1, recompute=heads)
    return Features(body, fpn)


def _resnet(name: str, one_stage: bool, recompute: bool, heads: bool) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from revbifpn.adapters.torchvision import FeaturePyramid

    options: dict[str, Any] = {"norm_layer": nn.BatchNorm2d, "trainable_layers": 3}
    if one_stage:
        options |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(WIDTH, WIDTH)}
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, **options)
    if heads:
        backbone.fpn.__class__ = FeaturePyramid
    if recompute:
        for stage in ("layer2", "layer3", "layer4"):  # the first does not train
            blocks = backbone.body[stage]
            for i, block in enumerate(blocks):
                blocks[i] = Checkpointed(block)
    return backbone


# Detectors --------------------------------------------------------------------------------------


def make(c: Candidate, norms: str) -> nn.Module:
    """The model in train mode; its parts are attributes ``body`` and ``fpn`` of its backbone."""
    torch.manual_seed(0)
    model = _segmenter(c) if c.detector == SEGMENT else _detector(c)
    model.train()
    if c.detector != SEGMENT:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.requires_grad_(module.weight.requires_grad and norms == STATISTICS)
    return model


def _detector(c: Candidate) -> nn.Module:
    from revbifpn import detection
    from revbifpn.adapters.torchvision import BackboneWithFPN

    height, width = SIZES[c.detector]
    options: dict[str, Any] = {"min_size": height, "max_size": width}
    if c.detector != RETINA:
        options["rpn_nms_thresh"] = 1.0  # proposals are anchors, which overlap
    options["recompute"] = c.variant in (FAST, SIXTEEN, HEADS, CHECKPOINTED)
    if c.model in CONFIGS:
        options["scale"] = c.model
        if c.variant == SIXTEEN:
            options["stream"] = "fixed16"
    name = c.detector.removesuffix("_large")
    model = getattr(detection, f"{name}_revbifpn")(CLASSES, **options)
    if c.model in CONFIGS and c.variant in (REVERSIBLE, STORED):
        body = getattr(revbifpn, c.model)(classes=None, reversible=c.variant == REVERSIBLE)
        made = model.backbone
        made.body = BackboneWithFPN(body, returned_levels=made.returned_levels).body
    if c.model not in CONFIGS:
        model.backbone = _backbone(c)
    if c.detector != RETINA:
        for layer in (model.rpn.head.bbox_pred, model.rpn.head.cls_logits):  # zeros, as without arithmetic
            nn.init.zeros_(layer.weight)
    return model


def _segmenter(c: Candidate) -> nn.Module:
    import_timm()
    import segmentation_models_pytorch as smp

    import revbifpn.adapters.timm  # noqa: F401

    options: dict[str, Any] = {}
    if c.model in CONFIGS:
        options = {"reversible": c.variant != STORED, "fused": c.variant in (FAST, SIXTEEN)}
        if c.variant == SIXTEEN:
            options["stream"] = "fixed16"
    model = smp.FPN(f"tu-{c.model}", encoder_weights=None, classes=SEGMENTED, **options)
    if c.variant == CHECKPOINTED:
        network = model.encoder.model
        if c.model.startswith("hrnet"):
            checkpoint_hrnet(network)
        else:
            for stage in ("layer1", "layer2", "layer3", "layer4"):
                network[stage] = nn.Sequential(*map(Checkpointed, network[stage]))
    return model


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Backbone and neck."""
    if hasattr(model, "encoder"):
        return model.encoder, model.decoder
    return model.backbone.body, model.backbone.fpn


def objects(detector: str, height: int, width: int) -> dict[str, Tensor]:
    """Boxes [n, 4] of several sizes all over an image, and what else the detector learns."""
    limit = torch.tensor([width, height])
    centre = torch.rand(OBJECTS, 2) * limit
    extent = torch.logspace(-5, -1, OBJECTS, base=2)[:, None] * min(width, height)
    boxes = torch.cat([(centre - extent / 2).clamp(min=0), torch.minimum(centre + extent / 2, limit)], 1)
    found = {"boxes": boxes, "labels": torch.randint(1, CLASSES, (OBJECTS,))}
    return found | ({"masks": torch.zeros(OBJECTS, height, width, dtype=torch.uint8)} if detector == MASK else {})
