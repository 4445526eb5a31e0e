# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression, all images of a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] (x1, y1, x2, y2; broadcast); 0 where both are empty."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp(min=0).prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(dim=-1) for box in (a, b)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def nms(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Which boxes stay, bool [B, K]: those with an IoU of at most ``threshold`` to each better one of their class
    that stays.

    boxes: [B, K, 4], best first within each image; labels: [B, K]. Costs K steps whatever the boxes, without
    waiting for the device.
    """
    rivals = (iou(boxes.unsqueeze(2), boxes.unsqueeze(1)) > threshold) & (labels.unsqueeze(2) == labels.unsqueeze(1))
    rivals = rivals.triu(diagonal=1)  # [B, better, worse]
    keep = torch.ones(labels.shape, dtype=torch.bool, device=boxes.device)
    for k in range(labels.shape[1]):
        keep &= ~(rivals[:, k] & keep[:, k, None])
    return keep
