"""Heads of torchvision's detectors that store little: the same parameters, losses and detections.

:func:`recompute_heads` puts them into any detector, whatever its backbone.

What their losses read is small (256 anchors per image, 128 objects, one number per class and anchor), and what leads
there is large. So the RPN's losses are computed at the sampled anchors alone, the heads of RoIs are recomputed some
RoIs at a time, and RetinaNet's classification a strip of rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou, sigmoid_focal_loss

from revbifpn.adapters.torchvision import Pyramid, strips

BACKGROUND, IGNORED = -1, -2  # in place of a class
ANCHORS = 2**14  # of which overlaps are computed at once
ROIS = 16  # that are recomputed at once

Targets = list[dict[str, Tensor]]


def overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:  # [n, 4], [A, 4] -> [n, A]
    """Intersection over union, without ``n A`` corners at once."""
    return torch.cat([box_iou(boxes, some) for some in anchors.split(ANCHORS)], 1)


# Region proposals -------------------------------------------------------------------------------


class SampledRPN(RegionProposalNetwork):
    """A region proposal network whose losses are computed at the anchors that they read.

    Proposals carry no gradient, and the losses read ``batch_size_per_image`` of some hundred thousand anchors. So the
    head runs over the maps without a graph, in strips of rows, and once more, with one, on the 3 x 3 pixels around each
    sampled anchor. Values and gradients are those of torchvision's ``RegionProposalNetwork``.
    """

    def forward(
        self, images: Any, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = list(features.values())
        with torch.no_grad():
            objectness, deltas = self._everywhere(maps)
            anchors = self.anchor_generator(images, maps)
            counts = [scores[0].numel() for scores in objectness]
            scores, shifts = concat_box_prediction_layers(objectness, deltas)
            boxes = self.box_coder.decode(shifts, anchors).view(len(anchors), -1, 4)
            proposals, _ = self.filter_proposals(boxes, scores, images.image_sizes, counts)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ValueError("targets: expected boxes in training mode, got None")
        del objectness, deltas, scores, shifts, boxes
        pyramid = features if isinstance(features, Pyramid) else Pyramid(features)
        return proposals, self._losses(pyramid, anchors, targets)

    def _everywhere(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [N, A, H, W] and deltas [N, 4 A, H, W] of every level."""
        levels = [[torch.cat(parts, 2) for parts in zip(*self._by_strips(p), strict=True)] for p in maps]
        return [scores for scores, _ in levels], [deltas for _, deltas in levels]

    def _by_strips(self, p: Tensor) -> list[tuple[Tensor, Tensor]]:
        n, channels, height, width = p.shape
        found = []
        for first, end in strips(height, n * channels * width * p.element_size(), p.device):
            low, high = max(first - 1, 0), min(end + 1, height)  # with the neighbours that the convolution reads
            (scores,), (deltas,) = self.head([p[:, :, low:high]])
            own = slice(first - low, end - low)
            found.append((scores[:, :, own].clone(), deltas[:, :, own].clone()))
        return found

    def _losses(self, pyramid: Pyramid, anchors: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        with torch.no_grad():
            labels, matched = self.assign_targets_to_anchors(anchors, targets)
            positive, negative = (torch.where(torch.stack(chosen)) for chosen in self.fg_bg_sampler(labels))
            image, anchor = (torch.cat(both) for both in zip(positive, negative, strict=True))  # [S], positives first
            wanted = torch.stack(labels)[image, anchor]
            boxes, corners = (torch.stack(each)[positive] for each in (matched, anchors))
            (shifts,) = self.box_coder.encode([boxes], [corners])
        scores, deltas = self._at(pyramid, image, anchor)
        count = len(image)
        box_loss = F.smooth_l1_loss(deltas[: len(shifts)], shifts, beta=1 / 9, reduction="sum") / count
        return {
            "loss_objectness": F.binary_cross_entropy_with_logits(scores, wanted),
            "loss_rpn_box_reg": box_loss,
        }

    def _at(self, pyramid: Pyramid, image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness [S] and deltas [S, 4] of these anchors, which count through levels, rows, columns and cells."""
        cells, first = self.anchor_generator.num_anchors_per_location()[0], 0
        found, places = [], []
        for name, p in pyramid.items():
            height, width = p.shape[-2:]
            end = first + cells * height * width
            (here,) = torch.where((anchor >= first) & (anchor < end))
            pixel, cell = (anchor[here] - first) // cells, (anchor[here] - first) % cells
            outputs = self._at_pixels(pyramid, name, image[here], pixel // width, pixel % width)
            rows = torch.arange(len(here), device=p.device)
            found.append(torch.cat([y.unflatten(1, (cells, -1))[rows, cell] for y in outputs], 1))  # [s, 1 + 4]
            places.append(here)
            first = end
        chosen = torch.cat(found)[torch.cat(places).argsort()]
        return chosen[:, 0], chosen[:, 1:]

    def _at_pixels(self, pyramid: Pyramid, name: str, image: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The head's outputs, [s, A] and [s, 4 A], at these pixels of a level, of which there may be none."""
        height, width = pyramid[name].shape[-2:]
        near = torch.arange(-1, 2, device=image.device)
        y, x = (y[:, None] + near.repeat_interleave(3)), (x[:, None] + near.repeat(3))  # [s, 9]
        exists = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        places = image[:, None].expand_as(y), y.clamp(0, height - 1), x.clamp(0, width - 1)
        patches = pyramid.pixels(name, *places) * exists[..., None]  # [s, 9, C]
        conv, activation = self.head.conv[0][0], self.head.conv[0][1]
        t = activation(F.conv2d(patches.mT.unflatten(2, (3, 3)), conv.weight, conv.bias))  # [s, C, 1, 1]
        return self.head.cls_logits(t).flatten(1), self.head.bbox_pred(t).flatten(1)


# Heads of regions -------------------------------------------------------------------------------


class _ByRoIs(nn.Module):
    """Mixin: ``forward`` keeps its input alone, and is recomputed some RoIs at a time."""

    def forward(self, x: Tensor) -> Tensor:
        run = super().forward
        if not (self.training and torch.is_grad_enabled() and len(x)):
            return run(x)
        return torch.cat([checkpoint(run, some, use_reentrant=False) for some in x.split(ROIS)])


class MaskHead(_ByRoIs, MaskRCNNHeads):
    """:class:`MaskRCNNHeads`, recomputed."""


class MaskPredictor(_ByRoIs, MaskRCNNPredictor):
    """:class:`MaskRCNNPredictor`, recomputed."""


class KeypointHead(_ByRoIs, KeypointRCNNHeads):
    """:class:`KeypointRCNNHeads`, recomputed."""


class KeypointPredictor(_ByRoIs, KeypointRCNNPredictor):
    """:class:`KeypointRCNNPredictor`, recomputed."""


# Dense heads ------------------------------------------------------------------------------------


class DenseRetinaNetHead(RetinaNetHead):
    """RetinaNet's head, whose losses are computed and recomputed level by level.

    In training ``forward`` returns the maps, and :meth:`compute_loss` reads them: the towers of a level are recomputed
    at once, the classes of its anchors, ``[N, A, classes]``, and their focal loss a strip of rows at a time.
    """

    def forward(self, x: list[Tensor]) -> dict[str, Any]:
        return {"maps": x} if self.training else super().forward(x)

    def compute_loss(
        self, targets: Targets, head_outputs: dict[str, Any], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        maps, regression = head_outputs["maps"], self.regression_head
        shifts = [checkpoint(regression, [p], use_reentrant=False) for p in maps]
        found = {"bbox_regression": torch.cat(shifts, 1)}
        classes = torch.stack([_classes(t["labels"], m) for t, m in zip(targets, matched_idxs, strict=True)])  # [N, A]
        foreground = (classes >= 0).sum(1).clamp(min=1)
        weights = 1 / (foreground.to(shifts[0].dtype) * len(classes))  # [N]
        counts = [p.shape[-2] * p.shape[-1] * self.classification_head.num_anchors for p in maps]
        losses = [
            checkpoint(self._classification, p, own, weights, use_reentrant=False)
            for p, own in zip(maps, classes.split(counts, 1), strict=True)
        ]
        return {
            "classification": torch.stack(losses).sum(),
            "bbox_regression": regression.compute_loss(targets, found, anchors, matched_idxs),
        }

    def _classification(self, p: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        """``sum_n w_n sum_a focal(logits, classes)`` over a level, with classes [N, H W A]."""
        head = self.classification_head
        tower, (height, width) = head.conv(p), p.shape[-2:]
        row = head.num_anchors * width
        loss = weights.new_zeros(())
        for first, end in strips(height, len(p) * row * head.num_classes * p.element_size(), p.device):
            low, high = max(first - 1, 0), min(end + 1, height)
            own = classes[:, first * row : end * row]
            bounds = first - low, end - low
            loss = loss + checkpoint(self._strip, tower[:, :, low:high], bounds, own, weights, use_reentrant=False)
        return loss

    def _strip(self, t: Tensor, bounds: tuple[int, int], classes: Tensor, weights: Tensor) -> Tensor:
        head = self.classification_head
        logits = head.cls_logits(t)[:, :, slice(*bounds)]
        logits = logits.unflatten(1, (head.num_anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # [N, a, classes]
        wanted = (classes[..., None] == torch.arange(head.num_classes, device=t.device)).to(logits.dtype)
        weighted = weights[:, None] * (classes != IGNORED)
        return (sigmoid_focal_loss(logits, wanted, reduction="none").sum(2) * weighted).sum()


def _classes(labels: Tensor, matched: Tensor) -> Tensor:  # [n], [A] -> [A]
    """The class of every anchor; RetinaNet's matcher marks others just as here."""
    if not len(labels):
        return torch.full_like(matched, BACKGROUND)
    return torch.where(matched >= 0, labels[matched.clamp(min=0)], matched)


class DenseFCOSHead(FCOSHead):
    """FCOS's head, whose towers are recomputed level by level, and its losses at once."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        run = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return run(x)
        levels = [checkpoint(run, [p], use_reentrant=False) for p in x]
        return {name: torch.cat([level[name] for level in levels], 1) for name in levels[0]}

    def compute_loss(self, *arguments: Any) -> dict[str, Tensor]:
        return checkpoint(super().compute_loss, *arguments, use_reentrant=False)


# All of them ------------------------------------------------------------------------------------

RECOMPUTED: dict[type, Any] = {
    RegionProposalNetwork: SampledRPN,
    MaskRCNNHeads: MaskHead,
    MaskRCNNPredictor: MaskPredictor,
    KeypointRCNNHeads: KeypointHead,
    KeypointRCNNPredictor: KeypointPredictor,
    RetinaNetHead: DenseRetinaNetHead,
    FCOSHead: DenseFCOSHead,
}


def recompute_heads(detector: nn.Module) -> None:
    """Have the heads of one of torchvision's detectors store little, from now on; parameters and names stay.

    Heads that are of none of torchvision's own classes stay as they are.
    """
    for module in detector.modules():
        kind = RECOMPUTED.get(type(module))
        if kind is None or (isinstance(module, RegionProposalNetwork) and not _is_sampled(module.head)):
            continue
        module.__class__ = kind  # whose attributes are the same
        if isinstance(module, SampledRPN):
            module.box_similarity = overlaps


def _is_sampled(head: Any) -> bool:
    """Whether :class:`SampledRPN` takes this head: torchvision's, of one 3 x 3 convolution."""
    return type(head) is RPNHead and len(head.conv) == 1
