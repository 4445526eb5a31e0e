# SPDX-License-Identifier: Apache-2.0
"""A small anchor-free detector after FCOS (Tian et al., ICCV 2019): one feature map, a box from each of its points."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.seeding import seeded
from experiments.vision import nms

STRIDE = 8  # pixels between two points of the feature map
MAX_DETECTIONS = 100  # per image, as many as COCO's mAP looks at
SCORE_THRESHOLD = 0.05
NMS_IOU = 0.6
_PRIOR = 0.05  # probability of each class at each point before training, so that the many negatives start at peace
_MAX_LOG_DISTANCE = 4.0  # a box side is at most 2 * STRIDE * e^4 = 874 pixels: no infinity on a bad step


class Predictions(NamedTuple):
    """At P points, row by row: logits [B, P, classes]; distances [B, P, 4] in pixels from the point to the left,
    upper, right and lower side of its box; centreness logits [B, P]. All float32."""

    logits: Tensor
    distances: Tensor
    centreness: Tensor


class Detections(NamedTuple):
    """Of one image, best first: boxes [D, 4] as x1, y1, x2, y2 in pixels, scores [D] in (0, 1], labels int64 [D]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class FCOS(nn.Module):
    """Images [B, 1, H, W] to Predictions; H and W are multiples of STRIDE.

    Batch normalisation also in the heads, where the paper has group normalisation: with one feature map there are no
    others whose statistics would mix in, and in a minute of training it reaches a far better mAP.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.backbone = nn.Sequential(
            *_layer(1, width, 2),
            *_layer(width, 2 * width, 2),
            *_layer(2 * width, 2 * width),
            *_layer(2 * width, 4 * width, 2),
            *_layer(4 * width, 4 * width),
            *_layer(4 * width, 4 * width),
        )
        self.class_tower = nn.Sequential(*_layer(4 * width, 4 * width))
        self.box_tower = nn.Sequential(*_layer(4 * width, 4 * width))
        self.logits = nn.Conv2d(4 * width, classes, 3, padding=1)
        self.distances = nn.Conv2d(4 * width, 4, 3, padding=1)
        self.centreness = nn.Conv2d(4 * width, 1, 3, padding=1)
        for head in (self.logits, self.distances, self.centreness):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.logits.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, x: Tensor) -> Predictions:
        """Predictions."""
        x = self.backbone(x)
        boxes = self.box_tower(x)
        log_distances = _by_point(self.distances(boxes)).clamp(max=_MAX_LOG_DISTANCE)
        return Predictions(
            _by_point(self.logits(self.class_tower(x))),
            STRIDE * log_distances.exp(),
            _by_point(self.centreness(boxes)).squeeze(2),
        )


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _by_point(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).float()


def points(height: int, width: int, device: torch.device) -> Tensor:
    """Where the points of the feature map lie in an image of ``height`` x ``width`` pixels: x, y; float32 [P, 2]."""
    y, x = (STRIDE * (torch.arange(n // STRIDE, device=device) + 0.5) for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1)


def to_distances(at: Tensor, boxes: Tensor) -> Tensor:
    """From points [..., 2] to the sides of boxes [..., 4] (broadcast): left, upper, right, lower; negative outside."""
    return torch.cat([at - boxes[..., :2], boxes[..., 2:] - at], dim=-1)


def to_boxes(at: Tensor, distances: Tensor) -> Tensor:
    """Inverse of to_distances()."""
    return torch.cat([at - distances[..., :2], at + distances[..., 2:]], dim=-1)


def detect(predictions: Predictions, height: int, width: int) -> list[Detections]:
    """The boxes found in each image, cut off at the image's border; at most MAX_DETECTIONS of each.

    The score is sqrt(class probability * centreness). Boxes with a coordinate that is not finite are left out.
    """
    logits, distances, centreness = predictions
    classes = logits.shape[2]
    boxes = to_boxes(points(height, width, logits.device), distances)
    limit = boxes.new_tensor([width, height, width, height])
    scores = (logits.sigmoid() * centreness.sigmoid().unsqueeze(2)).sqrt()
    usable = (scores > SCORE_THRESHOLD) & boxes.isfinite().all(dim=2, keepdim=True)
    scores = torch.where(usable, scores, 0.0).flatten(1)
    scores, best = scores.topk(min(MAX_DETECTIONS, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, (best // classes).unsqueeze(2).expand(-1, -1, 4)).clamp(min=0).minimum(limit)
    return [suppress(*image) for image in zip(boxes, scores, best % classes, strict=True)]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """Of one image, without boxes of score 0 and those that overlap a better one of their class by more than NMS_IOU.

    boxes: [K, 4], where the score is not 0 with finite coordinates of 0 and more; scores, labels: [K].
    """
    boxes, scores, labels = (part[scores > 0] for part in (boxes, scores, labels))
    apart = boxes + (labels * (boxes.amax() + 1))[:, None] if len(boxes) else boxes  # no overlap of different classes
    keep = nms(apart, scores, NMS_IOU)
    return Detections(boxes[keep], scores[keep], labels[keep])


def build(classes: int, width: int, seed: int) -> FCOS:
    """The detector, initialised by ``seed`` alone; the global random state stays as it was."""
    with seeded(seed):
        return FCOS(classes, width)
