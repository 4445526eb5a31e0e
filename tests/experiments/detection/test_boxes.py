# SPDX-License-Identifier: Apache-2.0
"""The boxes of the detector: from distances and back, suppression of all but the best, and what comes out."""

from unittest import mock

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.detection import canvas, fcos


def test_distances_and_boxes_are_inverse(scenes):
    at = fcos.points(canvas.SIDE, canvas.SIDE, torch.device("cpu"))[:, None]
    boxes = torch.from_numpy(scenes.boxes[scenes.labels >= 0])
    assert torch.equal(fcos.to_boxes(at, fcos.to_distances(at, boxes)), boxes.expand(144, -1, -1))


corners = st.lists(st.integers(0, 12), min_size=4, max_size=4)
candidates = st.lists(st.tuples(corners, st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(image=candidates, threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]))
def test_suppression_is_that_of_a_plain_loop(image, threshold):
    boxes = torch.tensor([[min(x), min(y), max(x), max(y)] for (*x, y1, y2), _ in image for y in [(y1, y2)]])
    labels = torch.tensor([label for _, label in image])
    scores = torch.arange(len(image), 0, -1) / len(image)
    with mock.patch.object(fcos, "NMS_IOU", threshold):
        found = fcos.suppress(boxes.float(), scores, labels)
    kept = torch.tensor(plain_nms(boxes.tolist(), labels.tolist(), threshold))
    assert found.scores.tolist() == scores[kept].tolist()
    assert found.boxes.tolist() == boxes[kept].tolist()
    assert found.labels.tolist() == labels[kept].tolist()


def plain_nms(boxes, labels, threshold):
    kept = []
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if not any(labels[j] == label and plain_iou(boxes[j], box) > threshold for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


def plain_iou(a, b):
    """Counts unit squares."""
    cells = [{(x, y) for x in range(int(x1), int(x2)) for y in range(int(y1), int(y2))} for x1, y1, x2, y2 in (a, b)]
    union = cells[0] | cells[1]
    # As float32, as torch divides: 3 / 5 > 0.6 is to be answered alike.
    return np.float32(len(cells[0] & cells[1])) / np.float32(len(union)) if union else 0.0


def test_a_box_without_a_score_suppresses_nothing_and_is_not_found():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [torch.nan] * 4])
    found = fcos.suppress(boxes, torch.tensor([0.5, 0.0, 0.0]), torch.tensor([1, 1, 1]))
    assert found.boxes.tolist() == [[0, 0, 4, 4]]
    assert fcos.suppress(boxes, torch.zeros(3), torch.tensor([1, 1, 1])).scores.tolist() == []


def test_detections_are_sorted_finite_and_inside():
    generator = torch.Generator().manual_seed(0)
    predictions = fcos.Predictions(
        torch.randn(2, 16, 5, generator=generator),
        torch.rand(2, 16, 4, generator=generator) * 100,
        torch.randn(2, 16, generator=generator),
    )
    predictions.distances[0, 3] = torch.nan
    predictions.logits[1] = torch.nan
    first, second = fcos.detect(predictions, 32, 32)
    assert 0 < len(first.scores) <= fcos.MAX_DETECTIONS
    assert (first.scores.diff() <= 0).all()
    assert (first.scores > fcos.SCORE_THRESHOLD).all()
    assert ((first.boxes >= 0) & (first.boxes <= 32)).all()
    assert len(second.scores) == 0
