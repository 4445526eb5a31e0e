# SPDX-License-Identifier: Apache-2.0
"""The detector: which point learns which object, losses, and the mAP of what it finds."""

import importlib.util

import pytest
import torch

from experiments.detection import canvas, coco, fcos, fcos_loss

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)


def assign(boxes, labels, side=48):
    at = fcos.points(side, side, torch.device("cpu"))
    return at, fcos_loss.assign(at, torch.tensor([boxes], dtype=torch.float32), torch.tensor([labels]))


def test_points_are_the_middles_of_the_strides():
    at = fcos.points(16, 24, torch.device("cpu"))
    assert at.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    model = fcos.build(3, 8, 0)
    assert model(torch.zeros(2, 1, 16, 24)).distances.shape == (2, 6, 4)


def test_a_point_in_the_middle_finds_its_object():
    # Centre (20, 20): the points 12, 20 and 28 are near it in each direction, 4 and 36 are not.
    at, found = assign([[0, 0, 40, 40], [0, 0, 0, 0]], [7, -1])
    positive = found.labels[0] == 7
    assert sorted(map(tuple, at[positive].tolist())) == [(x, y) for x in (12, 20, 28) for y in (12, 20, 28)]
    assert (found.labels[0][~positive] == -1).all()
    middle, corner = (at.tolist().index([x, x]) for x in (20, 12))
    assert found.distances[0, middle].tolist() == [20, 20, 20, 20]
    assert found.distances[0, corner].tolist() == [12, 12, 28, 28]
    assert found.centreness[0, middle] == 1
    assert found.centreness[0, corner].item() == pytest.approx(12 / 28)
    assert (found.centreness[0][~positive] == 0).all()


def test_a_point_outside_the_box_finds_nothing():
    at, found = assign([[16, 18, 24, 22]], [2])  # flat: 12 and 28 are near the centre, but not inside
    assert at[found.labels[0] >= 0].tolist() == [[20, 20]]


def test_the_smaller_of_two_objects_wins():
    for order in (slice(None), slice(None, None, -1)):
        boxes, labels = [[0, 0, 40, 40], [16, 16, 32, 32]][order], [1, 2][order]
        at, found = assign(boxes, labels)
        own = dict(zip(map(tuple, at.tolist()), found.labels[0].tolist(), strict=True))
        assert own[20, 20] == own[28, 28] == 2
        assert own[12, 12] == 1
        assert found.distances[0, at.tolist().index([20, 20])].tolist() == [4, 4, 12, 12]


def test_loss_of_the_truth_is_nearly_nothing(scenes):
    at = fcos.points(canvas.SIDE, canvas.SIDE, torch.device("cpu"))
    truth = fcos_loss.assign(at, torch.from_numpy(scenes.boxes), torch.from_numpy(scenes.labels))
    right = perfect(truth)
    # The cross-entropy of the centreness has its minimum at the truth, and is not 0 there.
    share = truth.centreness[truth.labels >= 0]
    floor = torch.distributions.Bernoulli(share).entropy().mean().item()
    assert fcos_loss.loss(right, truth).item() == pytest.approx(floor, abs=1e-3)
    wrong_class = right._replace(logits=right.logits.roll(1, dims=2))
    shifted = right._replace(distances=right.distances * 1.2)
    elsewhere = right._replace(centreness=-right.centreness)
    for worse in (wrong_class, shifted, elsewhere):
        assert fcos_loss.loss(worse, truth) > floor + 0.1


def perfect(truth):
    logits = 30 * (2 * torch.nn.functional.one_hot(truth.labels + 1, 11)[..., 1:].float() - 1)
    return fcos.Predictions(logits, truth.distances, truth.centreness.clamp(1e-6, 1 - 1e-6).logit())


def test_giou_loss_by_hand():
    wanted = torch.tensor([2.0, 2, 2, 2])
    assert fcos_loss.giou_loss(wanted, wanted).item() == 0
    # 2 x 4 of 4 x 4: IoU 1/2, the hull is the bigger one.
    assert fcos_loss.giou_loss(torch.tensor([0.0, 2, 2, 2]), wanted).item() == pytest.approx(0.5)
    # 8 x 2 and 4 x 4 in a hull of 8 x 4: IoU 8 / 24, 8 of the hull's 32 in neither.
    assert fcos_loss.giou_loss(torch.tensor([4.0, 1, 4, 1]), wanted).item() == pytest.approx(1 - 1 / 3 + 1 / 4)


def test_losses_of_torchvision_are_those_that_the_results_were_made_with():
    """The formulas of the earlier code, on the same predictions: equal but for the last bits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 144, 10, generator=generator)
    labels = torch.randint(-1, 10, (4, 144), generator=generator)
    truth = (labels.unsqueeze(2) == torch.arange(10)).float()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focal = ((truth - logits.sigmoid()).abs() ** 2 * entropy).sum()
    torch.testing.assert_close(fcos_loss.focal_loss(logits, labels), focal, rtol=1e-6, atol=0)

    predicted, wanted = (0.5 + 40 * torch.rand(4, 144, 4, generator=generator) for _ in range(2))

    def area(sides):
        return (sides[..., 0] + sides[..., 2]) * (sides[..., 1] + sides[..., 3])

    intersection, hull = area(torch.minimum(predicted, wanted)), area(torch.maximum(predicted, wanted))
    union = area(predicted) + area(wanted) - intersection
    giou = 1 - intersection / union + (hull - union) / hull
    torch.testing.assert_close(fcos_loss.giou_loss(predicted, wanted), giou, rtol=1e-5, atol=1e-6)


def test_loss_without_objects_is_finite():
    model = fcos.build(3, 8, 0)
    predictions = model(torch.rand(2, 1, 32, 32))
    at = fcos.points(32, 32, torch.device("cpu"))
    truth = fcos_loss.assign(at, torch.zeros(2, 4, 4), torch.full((2, 4), -1))
    fcos_loss.loss(predictions, truth).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def as_found(boxes, labels):
    return [
        fcos.Detections(b[c >= 0], torch.ones(int((c >= 0).sum())), c[c >= 0])
        for b, c in zip(boxes, labels, strict=True)
    ]


@needs_pycocotools
def test_map_of_the_truth_is_one_and_of_less_is_less(scenes):
    boxes, labels = torch.from_numpy(scenes.boxes), torch.from_numpy(scenes.labels)
    right = as_found(boxes, labels)
    assert coco.mean_average_precision(right, boxes, labels) == (1, 1)
    shifted = [d._replace(boxes=d.boxes + 4) for d in right]
    far = [d._replace(boxes=d.boxes + 90) for d in right]
    other_class = [d._replace(labels=(d.labels + 1) % 10) for d in right]
    half = [d if i % 2 else fcos.Detections(*(part[:0] for part in d)) for i, d in enumerate(right)]
    strict, loose = coco.mean_average_precision(shifted, boxes, labels)
    assert 0 < strict < loose <= 1
    assert coco.mean_average_precision(half, boxes, labels)[0] == pytest.approx(0.5, abs=0.1)
    for wrong in (far, other_class):
        assert coco.mean_average_precision(wrong, boxes, labels)[1] < 0.05
    nothing = [fcos.Detections(*(part[:0] for part in d)) for d in right]
    assert coco.mean_average_precision(nothing, boxes, labels) == (0, 0)


@needs_pycocotools
def test_perfect_predictions_reach_a_map_of_one(scenes):
    """Through assignment, decoding and suppression: none of them loses an object or moves a box."""
    boxes, labels = torch.from_numpy(scenes.boxes), torch.from_numpy(scenes.labels)
    at = fcos.points(canvas.SIDE, canvas.SIDE, torch.device("cpu"))
    found = fcos.detect(perfect(fcos_loss.assign(at, boxes, labels)), canvas.SIDE, canvas.SIDE)
    assert coco.mean_average_precision(found, boxes, labels)[0] > 0.995
