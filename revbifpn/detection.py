"""torchvision's detectors on RevBiFPN: Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS.

    >>> from revbifpn.detection import fasterrcnn_revbifpn
    >>> detector = fasterrcnn_revbifpn(scale="s3", num_classes=91, pretrained=True, trainable_levels=4)
    >>> losses = detector(images, targets)  # images of any size, targets as torchvision's detectors take them

The five functions take ``num_classes``, the fields of :class:`Body`, and whatever the detector's class of torchvision
takes, ``min_size`` or ``box_detections_per_img`` say. They return torchvision's own classes, with its parameters'
names, losses and detections; torchvision's reference training runs them as it runs its own. The backbone is recomputed
by inversion, and so is, by default, what lies between it and the losses: what that saves is in docs/detection.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

try:
    from torchvision.models import detection
except ModuleNotFoundError as error:
    raise ImportError(
        f"revbifpn.detection needs torchvision ({error}): pip install 'revbifpn-fast[torchvision]'"
    ) from error

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from revbifpn.adapters.torchvision import BackboneWithFPN, revbifpn_fpn_backbone
from revbifpn.adapters.torchvision_heads import BACKGROUND, overlaps, recompute_heads
from revbifpn.streams import StreamFormat


class _Checked(nn.Module):
    """Mixin of a detector: targets that would give a wrong or no loss are refused, beside those torchvision refuses."""

    num_classes: int
    first_class = 0

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        for i, target in enumerate(targets or ()):
            boxes, labels = target["boxes"], target["labels"]
            if not boxes.isfinite().all():
                raise ValueError(f"targets[{i}]['boxes']: expected finite coordinates, got {boxes.tolist()}")
            if len(boxes) != len(labels):
                raise ValueError(f"targets[{i}]['labels']: expected {len(boxes)}, one per box, got {len(labels)}")
            if not ((labels >= self.first_class) & (labels < self.num_classes)).all():
                raise ValueError(
                    f"targets[{i}]['labels']: expected {self.first_class} to {self.num_classes - 1}, "
                    f"got {labels.tolist()}"
                )
        return super().forward(images, targets)


class FasterRCNN(_Checked, detection.FasterRCNN):
    """:class:`torchvision.models.detection.FasterRCNN` that checks its targets."""

    first_class = 1  # 0 is the background


class MaskRCNN(_Checked, detection.MaskRCNN):
    """:class:`torchvision.models.detection.MaskRCNN` that checks its targets."""

    first_class = 1


class KeypointRCNN(_Checked, detection.KeypointRCNN):
    """:class:`torchvision.models.detection.KeypointRCNN` that checks its targets."""

    first_class = 1


class RetinaNet(_Checked, detection.RetinaNet):
    """:class:`torchvision.models.detection.RetinaNet` that checks its targets and matches anchors by parts."""

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Any], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        matcher, head = cast(Any, self.proposal_matcher), cast(Any, self.head)
        matched = [
            matcher(overlaps(target["boxes"], own))
            if len(target["boxes"])
            else torch.full((len(own),), BACKGROUND, device=own.device)
            for target, own in zip(targets, anchors, strict=True)
        ]
        return head.compute_loss(targets, head_outputs, anchors, matched)


class FCOS(_Checked, detection.FCOS):
    """:class:`torchvision.models.detection.FCOS` that checks its targets."""


@dataclass(frozen=True)
class Body:
    """What all detectors are made of.

    Attributes:
        scale: ``"s0"`` to ``"s6"``.
        pretrained: load the published ImageNet weights.
        trainable_levels: how many layers of the stack train, counted from the last, each of which ends in a silo that
            fuses the levels of the pyramid; None: all. The others keep parameters and statistics.
        frozen_norms: norms keep the statistics and affine parameters that they have; None: if ``pretrained``.
        stream: how the reversible streams are stored, see :class:`revbifpn.RevBiFPN`.
        width: channels of FPN and heads.
        recompute: what FPN and heads compute is recomputed in backward instead of stored, where it pays.
        overrides: constructor arguments of :class:`revbifpn.fast.RevBiFPN` that replace the scale's.
    """

    scale: str = "s0"
    pretrained: bool = False
    trainable_levels: int | None = None
    frozen_norms: bool | None = None
    stream: str | StreamFormat | None = None
    width: int = 256
    recompute: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def backbone(self, **options: Any) -> BackboneWithFPN:
        """Body and FPN; ``options`` of :func:`revbifpn.adapters.torchvision.revbifpn_fpn_backbone`."""
        return revbifpn_fpn_backbone(
            f"revbifpn_{self.scale.removeprefix('revbifpn_')}",
            self.pretrained,
            trainable_layers=self.trainable_levels,
            frozen_norms=self.frozen_norms,
            out_channels=self.width,
            recompute=self.recompute,
            **{"stream": self.stream} | dict(self.overrides) | options,
        )


def fasterrcnn_revbifpn(num_classes: int = 91, **options: Any) -> FasterRCNN:
    """Faster R-CNN.

    Args:
        num_classes: with the background, which is 0.
        options: fields of :class:`Body`, and arguments of :class:`torchvision.models.detection.FasterRCNN`.

    Raises:
        ValueError: an argument does not fit, or, in training, a target; the message names it.
    """
    return _detector(FasterRCNN, num_classes, options)


def maskrcnn_revbifpn(num_classes: int = 91, **options: Any) -> MaskRCNN:
    """Mask R-CNN; see :func:`fasterrcnn_revbifpn`."""
    return _detector(MaskRCNN, num_classes, options)


def keypointrcnn_revbifpn(num_classes: int = 2, **options: Any) -> KeypointRCNN:
    """Keypoint R-CNN; see :func:`fasterrcnn_revbifpn`. ``num_keypoints`` is 17 unless given."""
    return _detector(KeypointRCNN, num_classes, options)


def retinanet_revbifpn(num_classes: int = 91, **options: Any) -> RetinaNet:
    """RetinaNet, on maps of stride 8 to 128.

    Args:
        num_classes: labels are 0 to ``num_classes - 1``.
        options: fields of :class:`Body`, and arguments of :class:`torchvision.models.detection.RetinaNet`.
    """
    sizes = tuple(tuple(int(size * 2 ** (k / 3)) for k in range(3)) for size in (32, 64, 128, 256, 512))
    options.setdefault("anchor_generator", AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)))
    return _detector(RetinaNet, num_classes, options, returned_levels=(1, 2, 3))


def fcos_revbifpn(num_classes: int = 91, **options: Any) -> FCOS:
    """FCOS, on maps of stride 8 to 128; see :func:`retinanet_revbifpn`."""
    return _detector(FCOS, num_classes, options, returned_levels=(1, 2, 3))


def _detector(cls: type, num_classes: int, options: dict[str, Any], **levels: Any) -> Any:
    body = Body(**{f.name: options.pop(f.name) for f in fields(Body) if f.name in options})
    if levels:
        levels["extra_blocks"] = LastLevelP6P7(body.width, body.width)
    model = cls(body.backbone(**levels), num_classes, **options)
    model.num_classes = num_classes
    if body.recompute:
        recompute_heads(model)
    return model
