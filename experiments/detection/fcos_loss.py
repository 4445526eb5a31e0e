# SPDX-License-Identifier: Apache-2.0
"""Which point of the detector is to find which object, and the loss; Tian et al., ICCV 2019, sections 3.1 and 3.2.

All points are computed and the negative ones weighted by 0: no shape depends on the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.vision import torchvision

from .fcos import STRIDE, Predictions, to_boxes, to_distances

CENTRE_RADIUS = 1.5  # strides; "center sampling" of the paper's second version: points near a box's rim learn nothing
_GAMMA = 2.0  # of the focal loss (Lin et al., ICCV 2017)


class Assignment(NamedTuple):
    """For each point: labels int64 [B, P], -1 for background; distances [B, P, 4] in pixels and centreness [B, P]
    of its object, 1 and 0 for background."""

    labels: Tensor
    distances: Tensor
    centreness: Tensor


def assign(at: Tensor, boxes: Tensor, labels: Tensor) -> Assignment:
    """Each point to the smallest object whose box holds it and whose centre is near (CENTRE_RADIUS in x and in y).

    at: [P, 2]; boxes: [B, M, 4]; labels: [B, M], -1 where a row holds no object.
    """
    distances = to_distances(at[:, None], boxes[:, None])  # [B, P, M, 4]
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    near = (at[:, None] - centres[:, None]).abs().amax(dim=3) < CENTRE_RADIUS * STRIDE
    candidate = (distances.amin(dim=3) > 0) & near & (labels[:, None] >= 0)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2)[:, None].expand(candidate.shape)
    chosen = torch.where(candidate, areas, torch.inf).argmin(dim=2, keepdim=True)  # [B, P, 1]
    positive = candidate.gather(2, chosen).squeeze(2)
    own = distances.gather(2, chosen.unsqueeze(3).expand(-1, -1, -1, 4)).squeeze(2)
    own = torch.where(positive.unsqueeze(2), own, 1.0)
    own_labels = labels[:, None].expand(candidate.shape).gather(2, chosen).squeeze(2)
    return Assignment(
        torch.where(positive, own_labels, -1),
        own,
        torch.where(positive, centreness(own), 0.0),
    )


def centreness(distances: Tensor) -> Tensor:
    """1 in the middle of a box, 0 at its rim; distances [..., 4] to its sides, all > 0."""
    sides = torch.stack([distances[..., 0::2], distances[..., 1::2]], dim=-2)  # left and right, upper and lower
    return (sides.amin(dim=-1) / sides.amax(dim=-1)).prod(dim=-1).sqrt()


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over points and classes; logits [B, P, classes], labels [B, P] with -1 for background.

    Without Lin's alpha: positive and negative points count alike, since here one point in seven is positive.
    """
    truth = (labels.unsqueeze(2) == torch.arange(logits.shape[2], device=logits.device)).to(logits.dtype)
    return torchvision.ops.sigmoid_focal_loss(logits, truth, alpha=-1, gamma=_GAMMA, reduction="sum")


def giou_loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al., CVPR 2019) of boxes around the same point, as distances [..., 4] > 0."""
    at = predicted.new_zeros(2)
    return torchvision.ops.generalized_box_iou_loss(to_boxes(at, predicted), to_boxes(at, wanted))


def loss(predictions: Predictions, truth: Assignment) -> Tensor:
    """Classification + box + centreness: the first and last per positive point, the box weighted by centreness."""
    positive = (truth.labels >= 0).float()
    count = positive.sum().clamp(min=1)
    classification = focal_loss(predictions.logits, truth.labels) / count
    off = giou_loss(predictions.distances, truth.distances)
    box = (off * truth.centreness).sum() / truth.centreness.sum().clamp(min=1e-6)
    centre = F.binary_cross_entropy_with_logits(predictions.centreness, truth.centreness, reduction="none")
    return classification + box + (centre * positive).sum() / count
