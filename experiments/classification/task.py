# SPDX-License-Identifier: Apache-2.0
"""Image classification; here on data that lie on the device as uint8, batches are taken by index."""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import data, models
from experiments.data.augment import Augmentation
from experiments.seeding import order
from experiments.task import DataOptions, Task

TEST_BATCH = 500  # images
_TIMED_PASSES = 15  # forward passes of each network
FOLDER = "imagefolder"  # the one data set that is read while the network trains


class Classifier(Task):
    """What does not depend on where the images come from. Cross-entropy in nats per image, accuracy 0 to 1.

    size: of the images, (C, H, W); mean, std: of grey levels, [C, 1, 1]; splits: the images to evaluate on by name.
    """

    metrics = ("accuracy", "loss")

    def __init__(self, size: tuple[int, ...], classes: int, mean: Tensor, std: Tensor, splits: Mapping[str, Sized]):
        self.size, self.classes, self.mean, self.std = size, classes, mean, std
        self.splits = tuple(splits)
        self._counts = {name: len(split) for name, split in splits.items()}

    @classmethod
    def create(cls, options: DataOptions) -> Classifier:
        """On one of data.READERS, or on image files."""
        if options.data == FOLDER:
            from .image_folder import ImageFolder

            return ImageFolder.create(options)
        return Classification(data.load(options), options.augment)

    def _describe(self, train: int) -> dict[str, Any]:
        return {"images": {"train": train, **self._counts}, "image_size": list(self.size), "classes": self.classes}

    def build_model(self, name: str, seed: int) -> nn.Module:
        """One of models.NAMES for the images' channels, size and classes."""
        channels, height, width = self.size
        return models.build(name, seed, models.Shape(channels, (height, width), self.classes))

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """Moves mean and standard deviation, too."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device, dtype, channels_last)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits [B, classes], computed in float32."""
        return F.cross_entropy(model(inputs).float(), targets)

    @abstractmethod
    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images [B, C, H, W], int64 labels [B]) on the device, all of a split."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test") -> dict[str, float]:
        """Accuracy and mean cross-entropy over all images of the split."""
        model.eval()
        loss_sum, right = 0.0, 0
        for images, labels in self.evaluation_batches(split):
            logits = model(self.cast(self.normalised(images))).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
        return {"accuracy": right / self._counts[split], "loss": loss_sum / self._counts[split]}

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] as float32 with mean 0 and standard deviation 1 in each channel."""
        return (images.float() - self.mean) / self.std


class Classification(Classifier):
    """On images that fit into memory."""

    def __init__(self, images: data.ImageSet, augment: bool = False):
        self._train, self._flips, self._augment = images.train, images.flips, augment
        self._checksum = images.checksum()
        self._splits = {"test": images.test}
        if images.validation is not None:
            self._splits = {"validation": images.validation, **self._splits}
        size = tuple(images.train.images.shape[1:])
        super().__init__(size, images.classes, *images.mean_and_std(), self._splits)

    def about(self) -> dict[str, Any]:
        """Numbers and size of the images."""
        return {**self._describe(len(self._train)), "checksum": self._checksum}

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Task:
        """Moves the images, too."""
        self._train = self._train.to(device)
        self._splits = {name: split.to(device) for name, split in self._splits.items()}
        return super().to(device, dtype, channels_last)

    def batches(self, seed: int, epoch: int, batch_size: int) -> _Epoch:
        """In a new order each epoch; the last batch may be smaller."""
        augmentation = None
        if self._augment:
            augmentation = Augmentation(len(self._train), self.size[1:], self._flips, seed, epoch)
        return _Epoch(self, self._train, order(len(self._train), seed, epoch), batch_size, augmentation)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """In the order of the files."""
        part = self._splits[split]
        yield from zip(part.images.split(TEST_BATCH), part.labels.split(TEST_BATCH), strict=True)


class _Epoch:
    """The batches of one epoch: (inputs [B, C, H, W] in the task's dtype, labels int64 [B])."""

    def __init__(
        self, task: Classification, split: data.Split, order: Tensor, batch_size: int, augmentation: Augmentation | None
    ):
        self._task, self._split, self._order = task, split, order
        self._batch_size, self._augmentation = batch_size, augmentation

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i, chosen in enumerate(self._order.to(self._task.device).split(self._batch_size)):
            images = self._split.images[chosen]
            if self._augmentation is not None:
                images = self._augmentation.apply(images, i * self._batch_size)
            yield self._task.cast(self._task.normalised(images)), self._split.labels[chosen]


def forward_seconds(networks: list[nn.Module], inputs: Tensor) -> list[float]:
    """Median time of a forward pass of each, taken in turn."""
    times: list[list[float]] = [[] for _ in networks]
    for round_ in range(_TIMED_PASSES + 1):
        for network, taken in zip(networks, times, strict=True):
            start = time.perf_counter()
            network(inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize(inputs.device)
            if round_:  # not the first, in which memory is allocated
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
