# SPDX-License-Identifier: Apache-2.0
"""The scenes of detection: layouts, boxes and labels, and which images are in which."""

import dataclasses

import numpy as np
import pytest
import torch

from experiments import __main__ as program
from experiments import data
from experiments.detection import canvas
from experiments.detection.task import Detection
from experiments.task import DataOptions, create
from tools.program import UserError

from ..pipe import to_head


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


def test_colours_are_refused(digits):
    colours = data.Split(digits.train.images.expand(-1, 3, -1, -1), digits.train.labels)
    with pytest.raises(UserError, match="grey"):
        Detection(dataclasses.replace(digits, train=colours))


def test_scenes_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("pycocotools")
    with to_head():  # which must lose nothing
        assert program.main(["scenes", "--out", str(tmp_path / "scenes.png")]) == 0
    assert (tmp_path / "scenes.png").stat().st_size > 10_000
    assert program.main(["scenes", "--out", str(tmp_path / "missing" / "scenes.png")]) == 2
    assert program.main(["scenes", "--out", str(tmp_path / "scenes.txt")]) == 2
