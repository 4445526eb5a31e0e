# SPDX-License-Identifier: Apache-2.0
"""Classification of image files that are read while the network trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data import image_folder
from experiments.data.images import trained_on
from experiments.seeding import order
from experiments.task import DataOptions
from tools.program import UserError

from .task import TEST_BATCH, Classifier

# Of ImageNet's training images, in shares of the brightest value, as is usual.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder(Classifier):
    """Images of 224 x 224 pixels: with ``augment`` random crops and flips, else the centre, as in evaluation."""

    def __init__(self, folder: image_folder.Folder, options: DataOptions):
        total = len(folder.train)
        kept = trained_on(options.data, total, options.limit, options.holdout)
        self._options, self._checksum = options, folder.checksum()
        self._train = folder.train[:kept]
        self._splits = {"test": folder.test}
        if options.holdout:
            self._splits = {"validation": folder.train[total - options.holdout :], **self._splits}
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        super().__init__((3, image_folder.SIDE, image_folder.SIDE), len(folder.classes), mean, std, self._splits)

    @classmethod
    def create(cls, options: DataOptions) -> ImageFolder:
        """On the folders train and val in the directory."""
        if options.shrink != 1:
            raise UserError("--shrink: image files are scaled to one size when they are read; leave it out.")
        return cls(image_folder.scan(options.directory, options.skip_unreadable), options)

    def about(self) -> dict[str, Any]:
        """Numbers and size of the images."""
        return {**self._describe(len(self._train)), "checksum": self._checksum}

    def batches(self, seed: int, epoch: int, batch_size: int) -> _Epoch:
        """In a new order each epoch, whatever the number of processes that read; the last batch may be smaller."""
        images = image_folder.Images(self._train, (seed, epoch) if self._options.augment else None)
        return _Epoch(self, self.loader(images, batch_size, order(len(self._train), seed, epoch).tolist()))

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The files in their order."""
        files = self._splits[split]
        yield from self.read(self.loader(image_folder.Images(files), TEST_BATCH, range(len(files))))

    def loader(self, images: image_folder.Images, batch_size: int, positions: Any) -> DataLoader:
        """Reads the images at ``positions``, in this order."""
        pin = self.device.type == "cuda"
        return DataLoader(images, batch_size, sampler=positions, num_workers=self._options.loaders, pin_memory=pin)

    def read(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches on the task's device; UserError for a file that is no image."""
        try:
            for images, labels in loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except UserError as error:
            message = str(error)
            if message.startswith("Caught UserError in DataLoader worker"):  # a traceback, which ends in the message
                message = message.strip().splitlines()[-1].partition("UserError: ")[2]
            raise UserError(message) from None


class _Epoch:
    """The batches of one epoch: (inputs [B, 3, H, W] in the task's dtype, labels int64 [B])."""

    def __init__(self, task: ImageFolder, loader: DataLoader):
        self._task, self._loader = task, loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._task.read(self._loader):
            yield self._task.cast(self._task.normalised(images)), labels
