# SPDX-License-Identifier: Apache-2.0
"""Scenes for object detection: real images of a classification set on a grey canvas with clutter and noise.

Scene i of a seed is a function of (images, seed, i) alone: all randomness comes from one numpy generator per scene,
resampling and drawing are Pillow's, in whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels of the square canvas
ITEMS = (1, 4)  # fewest and most objects of a scene
ITEM_SIDE = 28  # pixels of an object's longer side at scale 1, whatever the size of its source
SCALES = (0.75, 1.5)
CLUTTER = (4, 10)
# Intersection over the area of the smaller box: unlike an IoU it also keeps a small object from vanishing under a
# big one. It bounds the IoU by 0.25 / (2 - 0.25) = 0.143.
MAX_OVERLAP = 0.25
_VISIBLE = 16  # grey levels: fainter pixels of an object would be lost in the noise, and are cleared
_BACKGROUND = (0, 80)  # grey levels
_NOISE = 6.0  # standard deviation in grey levels
_TRIES = 30  # for the place of one object; a scene that has no room for it does without


@dataclass(frozen=True)
class Scenes:
    """images uint8 [N, SIDE, SIDE]; boxes float32 [N, max ITEMS, 4] as x1, y1, x2, y2 in pixels, x2 and y2
    exclusive; labels int64 [N, max ITEMS]. A row that holds no object has label -1 and box 0."""

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def make_scenes(
    images: np.ndarray, labels: np.ndarray, seed: int | tuple[int, ...], count: int, first: int = 0
) -> Scenes:
    """Scenes first .. first + count - 1 of ``seed`` (integers >= 0) from uint8 ``images`` [M, H, W], ``labels`` [M].

    0 is the background of the source images; the brightest value of all of them becomes white.
    """
    white = max(int(images.max()), 1)
    result = Scenes(
        np.empty((count, SIDE, SIDE), np.uint8),
        np.zeros((count, ITEMS[1], 4), np.float32),
        np.full((count, ITEMS[1]), -1, np.int64),
    )
    for i in range(count):
        canvas, boxes, sources = _scene(images, white, np.random.default_rng([*np.atleast_1d(seed), first + i]))
        result.images[i] = canvas
        result.boxes[i, : len(boxes)] = np.reshape(boxes, (-1, 4))  # also where images without a pixel left none
        result.labels[i, : len(boxes)] = labels[np.array(sources, int)]
    return result


def _scene(images: np.ndarray, white: int, rng: np.random.Generator) -> tuple[np.ndarray, list, list]:
    """The canvas, the boxes of its objects and which images they are."""
    canvas = np.full((SIDE, SIDE), rng.integers(*_BACKGROUND), np.uint8)
    canvas = _draw_clutter(canvas, images, white, rng)
    boxes, sources = [], []
    for _ in range(rng.integers(ITEMS[0], ITEMS[1], endpoint=True)):
        source = int(rng.integers(len(images)))
        item = _cut_tight(_resample(images[source], white, rng.uniform(*SCALES)))
        if item is not None and (box := _free_place(item.shape, boxes, rng)) is not None:
            _paste(canvas, item, *box[:2])
            boxes.append(box)
            sources.append(source)
    noisy = canvas + rng.normal(0, _NOISE, canvas.shape).round()
    return noisy.clip(0, 255).astype(np.uint8), boxes, sources


def _resample(image: np.ndarray, white: int, scale: float) -> np.ndarray:
    """The image with its longer side at ITEM_SIDE * scale pixels, 0 to 255, faint pixels cleared."""
    factor = ITEM_SIDE * scale / max(image.shape)
    size = [max(1, round(n * factor)) for n in reversed(image.shape)]
    bright = (image.astype(np.uint16) * 255 // white).astype(np.uint8)
    result = np.array(Image.fromarray(bright).resize(size, Image.Resampling.BILINEAR))
    result[result < _VISIBLE] = 0
    return result


def _cut_tight(item: np.ndarray) -> np.ndarray | None:
    """The part that holds all non-zero pixels; None where there are none."""
    rows, columns = np.flatnonzero(item.any(1)), np.flatnonzero(item.any(0))
    return item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else None


def _free_place(shape: tuple[int, int], boxes: list, rng: np.random.Generator) -> tuple[int, int, int, int] | None:
    height, width = shape
    for _ in range(_TRIES):
        x, y = int(rng.integers(SIDE - width + 1)), int(rng.integers(SIDE - height + 1))
        box = (x, y, x + width, y + height)
        if all(overlap(box, other) <= MAX_OVERLAP for other in boxes):
            return box
    return None


def overlap(a: tuple, b: tuple) -> float:
    """Area of the intersection of two boxes (x1, y1, x2, y2) over the area of the smaller one."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _paste(canvas: np.ndarray, item: np.ndarray, x: int, y: int) -> None:
    """Put the non-zero pixels of ``item`` onto the canvas, what sticks out is cut off."""
    window = canvas[y : y + item.shape[0], x : x + item.shape[1]]
    item = item[: window.shape[0], : window.shape[1]]
    np.copyto(window, item, where=item > 0)


def _draw_clutter(canvas: np.ndarray, images: np.ndarray, white: int, rng: np.random.Generator) -> np.ndarray:
    """Fragments of objects, lines and blobs, none of which is an object; below the objects, so it hides none."""
    for _ in range(rng.integers(*CLUTTER, endpoint=True)):
        kind, grey = rng.integers(3), int(rng.integers(_BACKGROUND[1], 256))
        x, y = (int(v) for v in rng.integers(SIDE - 4, size=2))
        if kind == 0:
            _paste(canvas, _fragment(images, white, rng), x, y)
            continue
        picture = Image.fromarray(canvas)
        draw = ImageDraw.Draw(picture)
        if kind == 1:
            dx, dy = (int(v) for v in rng.integers(-40, 41, size=2))
            draw.line((x, y, x + dx, y + dy), fill=grey, width=int(rng.integers(1, 3)))
        else:
            width, height = (int(v) for v in rng.integers(3, 10, size=2))
            draw.ellipse((x, y, x + width, y + height), fill=grey)
        canvas = np.array(picture)
    return canvas


def _fragment(images: np.ndarray, white: int, rng: np.random.Generator) -> np.ndarray:
    """A random cut of a third by a third of an object's picture: texture and edges, too little to tell what it is."""
    item = _resample(images[rng.integers(len(images))], white, rng.uniform(*SCALES))
    height, width = (max(1, n // 3) for n in item.shape)
    y, x = (int(rng.integers(n - part + 1)) for n, part in zip(item.shape, (height, width), strict=True))
    return item[y : y + height, x : x + width]
