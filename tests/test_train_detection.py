# SPDX-License-Identifier: Apache-2.0
"""Detection of benchmarks.train: scenes, which point learns which object, boxes, suppression, mAP, training."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.train import __main__ as program
from benchmarks.train import data
from benchmarks.train.data import canvas
from benchmarks.train.models import fcos, fcos_loss
from benchmarks.train.models.batch_norm import keep_float32_statistics
from benchmarks.train.models.nms import iou, nms
from benchmarks.train.tasks import DataOptions, coco, create
from benchmarks.train.tasks.detection import Detection
from csgd_cuda import CSGD
from examples.training.errors import UserError

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make so small a network slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return data.load(DataOptions("digits"))


@pytest.fixture(scope="module")
def scenes(digits):
    return canvas.make_scenes(digits.train.images[:, 0].numpy(), digits.train.labels.numpy(), 3, 200)


# Scenes


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_scenes_for_training_validation_and_testing_have_layouts_of_their_own():
    """Whatever the training seed: else the test would show what was trained on, with other images pasted in."""
    task = create("detection", DataOptions("digits", holdout=200, limit=60))
    layouts = [task.train_scenes(seed, 0).boxes for seed in range(3)]
    layouts += [task._splits[name].boxes[:60] for name in ("validation", "test")]
    for k, one in enumerate(layouts):
        for other in layouts[:k]:
            close = (one[:, 0] - other[:, 0]).abs().max(dim=1).values < 3
            assert close.float().mean() < 0.1, k


def test_a_scene_depends_on_seed_and_index_alone(digits, scenes):
    images, labels = digits.train.images[:, 0].numpy(), digits.train.labels.numpy()
    part = canvas.Scenes(*(array[150:160] for array in vars(scenes).values()))
    assert same(canvas.make_scenes(images, labels, 3, 10, first=150), part)
    assert not same(canvas.make_scenes(images, labels, 4, 10, first=150), part)
    assert len({image.tobytes() for image in scenes.images}) == 200


def test_boxes_lie_inside_and_hardly_overlap(scenes):
    counts = (scenes.labels >= 0).sum(axis=1)
    assert set(counts) == {1, 2, 3, 4}
    assert (scenes.boxes[scenes.labels < 0] == 0).all()
    for boxes, count in zip(scenes.boxes, counts, strict=True):
        boxes = boxes[:count]
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= canvas.SIDE).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        pairs = [(i, j) for i in range(count) for j in range(i)]
        for i, j in pairs:
            # Counted pixel by pixel, not by the formula that placed them.
            masks = np.zeros((2, canvas.SIDE, canvas.SIDE), bool)
            for mask, box in zip(masks, boxes[[i, j]].astype(int), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = True
            both = (masks[0] & masks[1]).sum()
            assert both <= canvas.MAX_OVERLAP * min(masks[0].sum(), masks[1].sum())
            assert both / (masks[0] | masks[1]).sum() <= canvas.MAX_OVERLAP / (2 - canvas.MAX_OVERLAP)


def test_boxes_are_tight(monkeypatch, digits):
    # Without clutter, noise and background what is not black is an object.
    monkeypatch.setattr(canvas, "CLUTTER", (0, 0))
    monkeypatch.setattr(canvas, "_NOISE", 0.0)
    monkeypatch.setattr(canvas, "_BACKGROUND", (0, 1))
    monkeypatch.setattr(canvas, "ITEMS", (1, 1))
    made = canvas.make_scenes(digits.train.images[:, 0].numpy(), digits.train.labels.numpy(), 0, 50)
    for image, (box,) in zip(made.images, made.boxes, strict=True):
        rows, columns = np.nonzero(image)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_nothing_of_an_object_is_cut_off():
    inner = np.array([[0, 3, 0, 0], [1, 0, 0, 2], [0, 0, 4, 0]], np.uint8)
    assert np.array_equal(canvas._cut_tight(np.pad(inner, ((2, 1), (3, 4)))), inner)
    assert canvas._cut_tight(np.zeros((5, 5), np.uint8)) is None


def test_sizes_span_the_scales(scenes):
    boxes = scenes.boxes[scenes.labels >= 0]
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    low, high = (canvas.ITEM_SIDE * scale for scale in canvas.SCALES)
    assert longer.max() <= round(high)
    assert longer.min() < low + 2  # an object may be smaller than its picture
    assert longer.max() > high - 2


def test_labels_are_those_of_the_images():
    # Three images that differ in shape: a square, a wide and a tall bar.
    images = np.zeros((3, 28, 28), np.uint8)
    images[0, 2:26, 2:26] = images[1, 10:18, 2:26] = images[2, 2:26, 10:18] = 255
    made = canvas.make_scenes(images, np.array([5, 6, 7]), 0, 50)
    sizes = made.boxes[..., 2:] - made.boxes[..., :2]
    wide, tall = (sizes[..., i] > 1.5 * sizes[..., 1 - i] for i in (0, 1))
    shape = np.where(wide, 6, np.where(tall, 7, 5))
    known = made.labels >= 0
    assert (shape[known] == made.labels[known]).all()


def test_training_scenes_hold_no_test_image(digits):
    black = data.Split(torch.zeros_like(digits.test.images), digits.test.labels)
    tasks = [Detection(images, 20, 5) for images in (digits, dataclasses.replace(digits, test=black))]
    first, second = (task.train_scenes(0, 0) for task in tasks)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(*(task.scenes("test", 5).images for task in tasks))
    assert (tasks[1].scenes("test", 5).labels < 0).all()  # black images are no objects: nothing else is in there


def test_test_scenes_hold_no_training_image(digits):
    black = data.Split(torch.zeros_like(digits.train.images), digits.train.labels)
    tasks = [Detection(images, 20, 5) for images in (digits, dataclasses.replace(digits, train=black))]
    assert all(map(torch.equal, *(task.scenes("test", 5) for task in tasks)))


def test_batches_are_a_function_of_seed_and_epoch(digits):
    task = Detection(digits, 20, 5)

    def epoch(seed, number):
        return [(x.clone(), *map(torch.clone, targets)) for x, targets in task.batches(seed, number, 8)]

    def equal(a, b):
        return all(map(torch.equal, (t for batch in a for t in batch), (t for batch in b for t in batch)))

    first = epoch(0, 0)
    assert [len(x) for x, *_ in first] == [8, 8, 4]
    assert len(task.batches(0, 0, 8)) == 3
    other_seed, other_epoch = epoch(1, 0), epoch(0, 1)
    assert equal(first, epoch(0, 0))
    assert not equal(first, other_seed)
    assert not equal(first, other_epoch)
    assert sorted(x.sum().item() for batch, *_ in first for x in batch) == pytest.approx(
        sorted(x.sum().item() for batch, *_ in other_epoch for x in batch)
    )


def test_augmented_epochs_have_new_scenes(digits):
    task = Detection(digits, 20, 5, augment=True)
    images = [task.train_scenes(0, epoch).images for epoch in (0, 1, 0)]
    assert torch.equal(images[0], images[2])
    assert not set(map(bytes, images[0].numpy())) & set(map(bytes, images[1].numpy()))


# Which point learns which object


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


# Losses


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


def test_loss_without_objects_is_finite():
    model = fcos.build(3, 8, 0)
    predictions = model(torch.rand(2, 1, 32, 32))
    at = fcos.points(32, 32, torch.device("cpu"))
    truth = fcos_loss.assign(at, torch.zeros(2, 4, 4), torch.full((2, 4), -1))
    fcos_loss.loss(predictions, truth).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Boxes and suppression


def test_distances_and_boxes_are_inverse(scenes):
    at = fcos.points(canvas.SIDE, canvas.SIDE, torch.device("cpu"))[:, None]
    boxes = torch.from_numpy(scenes.boxes[scenes.labels >= 0])
    assert torch.equal(fcos.to_boxes(at, fcos.to_distances(at, boxes)), boxes.expand(144, -1, -1))


corners = st.lists(st.integers(0, 12), min_size=4, max_size=4)
candidates = st.lists(st.tuples(corners, st.integers(0, 2)), min_size=1, max_size=12)


@settings(max_examples=200)
@given(images=st.lists(candidates, min_size=1, max_size=3), threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]))
def test_nms_is_that_of_a_plain_loop(images, threshold):
    size = min(map(len, images))
    images = [image[:size] for image in images]
    boxes = torch.tensor([[[min(x), min(y), max(x), max(y)] for (*x, y1, y2), _ in image for y in [(y1, y2)]]
                          for image in images], dtype=torch.float32)  # fmt: skip
    labels = torch.tensor([[label for _, label in image] for image in images])
    expected = [plain_nms(b, c, threshold) for b, c in zip(boxes.tolist(), labels.tolist(), strict=True)]
    assert nms(boxes, labels, threshold).tolist() == expected


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


def test_iou_of_empty_boxes_is_zero():
    empty = torch.tensor([3.0, 3, 3, 3])
    assert iou(empty, empty).item() == 0


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


# mAP


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


# Training


@needs_pycocotools
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_detector_learns_a_few_scenes_by_heart(digits, dtype):
    task = Detection(digits, 8, 1).to(torch.device("cpu"), dtype)
    task._splits = {"test": task.train_scenes(0, 0)}  # what it learns is what it is tested on
    model = keep_float32_statistics(task.build_model("fcos", 0).to(dtype))
    optimizer = CSGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(120):
        model.train()
        for inputs, targets in task.batches(0, epoch, 8):
            assert inputs.dtype == dtype
            optimizer.zero_grad()
            loss = task.loss(model, inputs, targets)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
    figures = task.evaluate(model)
    assert tuple(figures) == task.metrics
    assert figures["mAP50"] > 0.9


@needs_pycocotools
def test_the_program_trains_and_reports(tmp_path):
    what = ["run", "--task", "detection", "--model", "fcos", "--limit", "24", "--epochs", "1", "--seeds", "0"]
    assert program.main([*what, "--batch-size", "12", "--lrs", "0.02", "--out", str(tmp_path / "logs")]) == 0
    assert program.main(["report", str(tmp_path / "logs"), "--out", str(tmp_path / "report")]) == 0
    assert "mAP" in (tmp_path / "report" / "table.md").read_text()


def test_colours_are_refused(digits):
    colours = data.Split(digits.train.images.expand(-1, 3, -1, -1), digits.train.labels)
    with pytest.raises(UserError, match="grey"):
        Detection(dataclasses.replace(digits, train=colours))


def test_other_networks_are_refused(digits):
    with pytest.raises(UserError, match="--model small: --task detection has fcos"):
        Detection(digits, 1, 1).build_model("small", 0)


def test_missing_pycocotools_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        create("detection", DataOptions("digits"))


def test_scenes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pycocotools")
    assert program.main(["scenes", "--out", str(tmp_path / "scenes.png")]) == 0
    assert (tmp_path / "scenes.png").stat().st_size > 10_000
    assert program.main(["scenes", "--out", str(tmp_path / "missing" / "scenes.png")]) == 2
    assert program.main(["scenes", "--out", str(tmp_path / "scenes.txt")]) == 2
