# SPDX-License-Identifier: Apache-2.0
"""Object detection in scenes made of the images of a classification set; see canvas.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments import data
from experiments.seeding import order
from experiments.task import DataOptions, Task
from tools.program import UserError

from . import canvas, fcos, fcos_loss
from .coco import check_installed, mean_average_precision

TRAIN_SCENES = 4000
TEST_SCENES = 500  # of the test images, and as many of held-out ones
# What scenes are for is part of their seed: else training seed 0 would have the layouts of the test scenes.
_PURPOSES = {"train": 0, "validation": 1, "test": 2}
_TEST_BATCH = 100  # scenes
_WIDTHS = {"fcos": 16, "fcos-wide": 32}  # channels after the first layer


class Targets(NamedTuple):
    """boxes [B, M, 4] as x1, y1, x2, y2 in pixels; labels int64 [B, M], -1 where a row holds no object."""

    boxes: Tensor
    labels: Tensor


class Scenes(NamedTuple):
    """canvas.Scenes as tensors on a device."""

    images: Tensor
    boxes: Tensor
    labels: Tensor


class Detection(Task):
    """mAP: COCO's, IoU 0.5 to 0.95; mAP50: at IoU 0.5; loss: FCOS's, mean over batches of 100 scenes.

    A training sees scenes of its own seed, made of training images; all are tested on the same scenes.
    """

    metrics = ("mAP", "mAP50", "loss")

    def __init__(
        self, images: data.ImageSet, scenes: int = TRAIN_SCENES, test_scenes: int = TEST_SCENES, augment: bool = False
    ):
        """``scenes`` for training; with ``augment`` each epoch has as many new ones."""
        if images.train.images.shape[1] != 1:
            raise UserError(f"detection: takes grey images, those of {images.name} have colours.")
        self.images, self.augment, self._count = images, augment, scenes
        sources = {"test": images.test}
        if images.validation is not None:
            sources = {"validation": images.validation, "test": images.test}
        self._splits = {name: _make(split, (_PURPOSES[name], 0), 0, test_scenes) for name, split in sources.items()}
        self.splits = tuple(self._splits)
        self._train: tuple[tuple[int, int], Scenes] | None = None  # (seed, first scene) and the scenes
        self._checksum = zlib.crc32(self._splits["test"].images.numpy())

    @classmethod
    def create(cls, options: DataOptions) -> Task:
        """On one of data.READERS; a limit bounds the training images and the training scenes."""
        check_installed()
        scenes = TRAIN_SCENES if options.limit is None else min(TRAIN_SCENES, options.limit)
        return cls(data.load(options), scenes, augment=options.augment)

    def about(self) -> dict[str, Any]:
        """Numbers and size of the scenes."""
        return {
            "images": {"train": self._count, **{name: len(split.labels) for name, split in self._splits.items()}},
            "image_size": [1, canvas.SIDE, canvas.SIDE],
            "classes": self.images.classes,
            "source_images": len(self.images.train),
            "checksum": f"{self.images.checksum()}-{self._checksum:08x}",
        }

    def build_model(self, name: str, seed: int) -> nn.Module:
        """An FCOS for the images' classes."""
        if name not in _WIDTHS:
            raise UserError(f"--model {name}: detection has {', '.join(_WIDTHS)}.")
        return fcos.build(self.images.classes, _WIDTHS[name], seed)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """Moves the scenes, too."""
        self._splits = {name: _to(scenes, device) for name, scenes in self._splits.items()}
        if self._train is not None:
            self._train = (self._train[0], _to(self._train[1], device))
        return super().to(device, dtype, channels_last)

    def batches(self, seed: int, epoch: int, batch_size: int) -> _Epoch:
        """In a new order each epoch; the last batch may be smaller."""
        return _Epoch(self, seed, epoch, batch_size)

    def train_scenes(self, seed: int, epoch: int) -> Scenes:
        """The scenes of an epoch, the same in each unless augmented; those asked for last are kept."""
        first = epoch * self._count if self.augment else 0
        if self._train is None or self._train[0] != (seed, first):
            scenes = _make(self.images.train, (_PURPOSES["train"], seed), first, self._count)
            self._train = ((seed, first), _to(scenes, self.device))
        return self._train[1]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Targets) -> Tensor:
        """FCOS's loss, computed in float32."""
        return self._loss(model(inputs), targets)

    def _loss(self, predictions: fcos.Predictions, targets: Targets) -> Tensor:
        at = fcos.points(canvas.SIDE, canvas.SIDE, targets.boxes.device)
        return fcos_loss.loss(predictions, fcos_loss.assign(at, *targets))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        """mAP, mAP50 and mean loss on all scenes of the split."""
        model.eval()
        scenes, found, loss_sum = self._splits[split], [], 0.0
        for images, *targets in zip(*(tensor.split(_TEST_BATCH) for tensor in scenes), strict=True):
            predictions = model(self.inputs(images))
            loss_sum += self._loss(predictions, Targets(*targets)).item() * len(images)
            found += fcos.detect(predictions, canvas.SIDE, canvas.SIDE)
        precision, precision50 = mean_average_precision(found, scenes.boxes, scenes.labels)
        return {"mAP": precision, "mAP50": precision50, "loss": loss_sum / len(scenes.labels)}

    def scenes(self, split: str, count: int) -> Scenes:
        """The first ``count`` scenes of a split."""
        return Scenes(*(tensor[:count] for tensor in self._splits[split]))

    @torch.no_grad()
    def find(self, model: nn.Module, images: Tensor) -> list[fcos.Detections]:
        """What the model finds in scenes, uint8 [B, SIDE, SIDE]."""
        model.eval()
        return fcos.detect(model(self.inputs(images)), canvas.SIDE, canvas.SIDE)

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 scenes [B, SIDE, SIDE] as the network takes them: [B, 1, SIDE, SIDE], -1 to 1."""
        return self.cast(images.unsqueeze(1).float() / 127.5 - 1)


class _Epoch:
    """The batches of one epoch: (inputs [B, 1, SIDE, SIDE] in the task's dtype, Targets)."""

    def __init__(self, task: Detection, seed: int, epoch: int, batch_size: int):
        self._task, self._seed, self._epoch, self._batch_size = task, seed, epoch, batch_size
        self._order = order(task._count, seed, epoch)

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Targets]]:
        scenes = self._task.train_scenes(self._seed, self._epoch)
        for chosen in self._order.to(self._task.device).split(self._batch_size):
            yield self._task.inputs(scenes.images[chosen]), Targets(scenes.boxes[chosen], scenes.labels[chosen])


def _make(split: data.Split, seed: tuple[int, ...], first: int, count: int) -> Scenes:
    scenes = canvas.make_scenes(split.images[:, 0].numpy(), split.labels.numpy(), seed, count, first)
    return Scenes(*(torch.from_numpy(array) for array in (scenes.images, scenes.boxes, scenes.labels)))


def _to(scenes: Scenes, device: torch.device) -> Scenes:
    return Scenes(*(tensor.to(device) for tensor in scenes))
