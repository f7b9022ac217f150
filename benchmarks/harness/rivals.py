"""The networks that RevBiFPN is measured against, as timm defines them, with and without activation checkpointing.

Top-1 on ImageNet-1k's validation set is that of timm's ``results/results-imagenet.csv`` for the weights named in
``weights``: per network the best that was trained on ImageNet-1k alone with an ordinary step. So no Noisy Student or
ImageNet-21k weights (more data), and no AdvProp (two passes per image, hence twice the memory). ``resolution`` is what
the weights were trained at, which is what training memory is about; EfficientNetV2-S is trained at up to 300 pixels
and evaluated at 384. GMACs are timm's, at ``resolution``. All memory is measured, with random weights.

Checkpointing (recompute in backward what was not kept) is timm's own ``set_grad_checkpointing`` for EfficientNet.
timm's HRNet refuses it ("gradient checkpointing not supported"), so here its high-resolution modules and the blocks of
its first stage and its head are each put under ``torch.utils.checkpoint``, as any user could.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.command import UsageError, require


@dataclass(frozen=True)
class Rival:
    """A timm network: what it is called, how good it is, what it costs, and how to build it."""

    name: str
    label: str
    family: str
    weights: str
    resolution: int
    top1: float
    parameters: float  # millions
    gmacs: float  # at resolution

    def build(self, *, checkpointed: bool = False) -> nn.Module:
        """The network with random weights; ``checkpointed``: keep only the inputs of its segments."""
        model = import_timm().create_model(self.name)
        if checkpointed and self.family == "HRNet":
            checkpoint_hrnet(model)
        elif checkpointed:
            model.set_grad_checkpointing(True)
        return model


RIVALS = {
    rival.name: rival
    for rival in (
        Rival("hrnet_w18", "HRNet-W18", "HRNet", "ms_aug_in1k", 224, 78.11, 21.30, 4.32),
        Rival("hrnet_w32", "HRNet-W32", "HRNet", "ms_in1k", 224, 78.45, 41.23, 8.97),
        Rival("hrnet_w48", "HRNet-W48", "HRNet", "ms_in1k", 224, 79.33, 77.47, 17.34),
        Rival("tf_efficientnet_b0", "EfficientNet-B0", "EfficientNet", "aa_in1k", 224, 76.88, 5.29, 0.40),
        Rival("tf_efficientnet_b1", "EfficientNet-B1", "EfficientNet", "aa_in1k", 240, 78.84, 7.79, 0.71),
        Rival("tf_efficientnet_b2", "EfficientNet-B2", "EfficientNet", "aa_in1k", 260, 80.07, 9.11, 1.02),
        Rival("tf_efficientnet_b3", "EfficientNet-B3", "EfficientNet", "aa_in1k", 300, 81.65, 12.23, 1.87),
        Rival("tf_efficientnet_b4", "EfficientNet-B4", "EfficientNet", "aa_in1k", 380, 83.04, 19.34, 4.49),
        Rival("tf_efficientnet_b5", "EfficientNet-B5", "EfficientNet", "ra_in1k", 456, 83.83, 30.39, 10.46),
        Rival("tf_efficientnet_b6", "EfficientNet-B6", "EfficientNet", "aa_in1k", 528, 84.12, 43.04, 19.40),
        Rival("tf_efficientnet_b7", "EfficientNet-B7", "EfficientNet", "ra_in1k", 600, 84.93, 66.35, 38.33),
        Rival("tf_efficientnetv2_s", "EfficientNetV2-S", "EfficientNetV2", "in1k", 300, 83.90, 21.46, 5.35),
    )
}


class Checkpointed(nn.Module):
    """Keeps the input of ``module`` only, and runs it again in backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return checkpoint(self.module, x, use_reentrant=False)
        # HRNet's modules write into the list they are given: the second call needs one of its own.
        return checkpoint(lambda *streams: self.module(list(streams)), *x, use_reentrant=False)


def checkpoint_hrnet(model: nn.Module) -> None:
    """Puts the blocks of the first stage and of the head, and the high-resolution modules, under checkpoints."""
    for stage in (model.layer1, model.stage2, model.stage3, model.stage4, *(model.incre_modules or ())):
        for i, block in enumerate(stage):
            stage[i] = Checkpointed(block)


_declared: list[torch.library.Library] = []  # an op is declared for as long as its library object lives


def import_timm() -> ModuleType:
    """timm, also beside a torchvision whose compiled ops do not load.

    timm wants torchvision for its image transforms. A torchvision built for another torch (PyPI's, built for CUDA,
    beside a CPU torch) goes on without its compiled ops, but stops where it describes the result shapes of two of them
    that nobody declared: "operator torchvision::nms does not exist". Declaring them is enough; calling one still fails.
    """
    if importlib.util.find_spec("timm") is not None and "torchvision" not in sys.modules:
        try:
            require("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise UsageError(f"timm needs torchvision, which does not import beside this torch: {error}") from None
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
            for op in ("nms", "qnms"):
                _declared[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return require("timm")
