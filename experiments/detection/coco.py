# SPDX-License-Identifier: Apache-2.0
"""COCO's mean average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io

import numpy as np
from torch import Tensor

from tools.program import UserError

from .fcos import Detections


def check_installed() -> None:
    """UserError where pycocotools is missing: before a training, not after its first epoch."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("detection: pycocotools is not installed; pip install pycocotools.")


def mean_average_precision(found: list[Detections], boxes: Tensor, labels: Tensor) -> tuple[float, float]:
    """AP averaged over the IoU thresholds 0.5, 0.55 ... 0.95 and over classes, and AP at IoU 0.5; 0 to 1.

    found: per image, scores best first; boxes: [N, M, 4] as x1, y1, x2, y2 in pixels; labels: [N, M], -1 where a row
    holds no object. Needs pycocotools.
    """
    from pycocotools.coco import COCO  # here: what needs no mAP needs no pycocotools
    from pycocotools.cocoeval import COCOeval

    if not any(len(detections.scores) for detections in found):
        return 0.0, 0.0  # loadRes() takes no empty list
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each of its steps
        truth = COCO()
        truth.dataset = _dataset(boxes, labels)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(_results(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def _dataset(boxes: Tensor, labels: Tensor) -> dict:
    """COCO's annotation format: boxes as x, y, width, height; numbers from 1, since 0 stands for "no match" there."""
    annotations = []
    for image, (image_boxes, image_labels) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        for (x1, y1, x2, y2), label in zip(image_boxes, image_labels, strict=True):
            if label >= 0:
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
    categories = sorted({annotation["category_id"] for annotation in annotations})
    return {
        "info": {},
        "images": [{"id": image} for image in range(len(boxes))],
        "categories": [{"id": category} for category in categories],
        "annotations": annotations,
    }


def _results(found: list[Detections]) -> np.ndarray:
    """Rows of image, x, y, width, height, score, category."""
    rows = []
    for image, (boxes, scores, labels) in enumerate(found):
        boxes = boxes.cpu().double().numpy()
        sizes = boxes[:, 2:] - boxes[:, :2]
        number = np.full((len(boxes), 1), image)
        rows.append(np.hstack([number, boxes[:, :2], sizes, scores.cpu()[:, None], labels.cpu()[:, None]]))
    return np.vstack(rows)
