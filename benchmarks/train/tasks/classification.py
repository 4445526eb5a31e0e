# SPDX-License-Identifier: Apache-2.0
"""Image classification on data that fit into memory: they lie on the device as uint8, batches are taken by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, models
from ..data.augment import Augmentation
from ..data.seeding import order
from .base import DataOptions, Task

_TEST_BATCH = 500  # images


class Classification(Task):
    """Cross-entropy in nats per image, accuracy 0 to 1."""

    name = "classification"
    models = models.NAMES
    metrics = ("accuracy", "loss")

    def __init__(self, images: data.ImageSet, augment: bool = False):
        self.images, self.augment = images, augment
        self.checksum = images.checksum()
        self.mean, self.std = images.mean_and_std()
        self._splits = {"test": images.test}
        if images.validation is not None:
            self._splits = {"validation": images.validation, "test": images.test}
        self.splits = tuple(self._splits)
        self._train = images.train

    @classmethod
    def create(cls, options: DataOptions) -> Task:
        """On one of data.READERS."""
        return cls(data.load(options), options.augment)

    def about(self) -> dict[str, Any]:
        """Numbers and size of the images."""
        return {
            "images": {"train": len(self._train), **{name: len(split) for name, split in self._splits.items()}},
            "image_size": list(self._train.images.shape[1:]),
            "classes": self.images.classes,
            "checksum": self.checksum,
        }

    def build_model(self, name: str, seed: int) -> nn.Module:
        """One of models.NAMES for the images' channels, size and classes."""
        channels, height, width = self._train.images.shape[1:]
        return models.build(name, seed, models.Shape(channels, (height, width), self.images.classes))

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """Moves the images, too."""
        self._train = self._train.to(device)
        self._splits = {name: split.to(device) for name, split in self._splits.items()}
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device, dtype, channels_last)

    def batches(self, seed: int, epoch: int, batch_size: int) -> _Epoch:
        """In a new order each epoch; the last batch may be smaller."""
        return _Epoch(self, seed, epoch, batch_size)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits [B, classes], computed in float32."""
        return F.cross_entropy(model(inputs).float(), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Accuracy and mean cross-entropy over all images of the split."""
        model.eval()
        part = self._splits[split]
        loss_sum, right = 0.0, 0
        for images, labels in zip(part.images.split(_TEST_BATCH), part.labels.split(_TEST_BATCH), strict=True):
            logits = model(self.cast(self.normalised(images))).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
        return {"accuracy": right / len(part), "loss": loss_sum / len(part)}

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] as float32 with mean 0 and standard deviation 1 in each channel."""
        return (images.float() - self.mean) / self.std


class _Epoch:
    """The batches of one epoch: (inputs [B, C, H, W] in the task's dtype, labels int64 [B])."""

    def __init__(self, task: Classification, seed: int, epoch: int, batch_size: int):
        self._task, self._split = task, task._train
        self._batch_size = batch_size
        self._order = order(len(self._split), seed, epoch)
        self._augmentation = None
        if task.augment:
            size = tuple(self._split.images.shape[2:])
            self._augmentation = Augmentation(len(self._split), size, task.images.flips, seed, epoch)

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, chosen in enumerate(self._order.to(self._task.device).split(self._batch_size)):
            images = self._split.images[chosen]
            if self._augmentation is not None:
                images = self._augmentation.apply(images, i * self._batch_size)
            yield self._task.cast(self._task.normalised(images)), self._split.labels[chosen]
