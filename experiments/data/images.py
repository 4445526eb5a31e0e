# SPDX-License-Identifier: Apache-2.0
"""A data set of images that fits into memory."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.program import UserError

_CHUNK = 4096  # images


def trained_on(name: str, total: int, limit: int | None, holdout: int) -> int:
    """How many of ``total`` training images are trained on; UserError where that leaves none, or are too few."""
    kept = total - holdout if limit is None else limit
    if kept < 1 or kept + holdout > total:
        raise UserError(
            f"--limit and --holdout: {name} has {total} training images; {max(kept, 1)} to train on "
            f"and {holdout} held out are too many."
        )
    return kept


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, C, H, W]; labels: int64 [N] in [0, classes)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same images on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSet:
    """Training and test images, and a validation set where some are held out.

    flips: whether an image keeps its class when it is mirrored left to right.
    """

    name: str
    train: Split
    test: Split
    classes: int
    flips: bool
    validation: Split | None = None

    def divided(self, limit: int | None, holdout: int) -> ImageSet:
        """With the last ``holdout`` of all training images held out, and the first ``limit`` of them trained on."""
        total = len(self.train)
        kept = trained_on(self.name, total, limit, holdout)
        images, labels = self.train.images, self.train.labels
        train = Split(images[:kept], labels[:kept])
        held = Split(images[total - holdout :], labels[total - holdout :]) if holdout else None
        return replace(self, train=train, validation=held)

    def shrunk(self, factor: int) -> ImageSet:
        """With the mean of each square of ``factor`` x ``factor`` pixels, rounded, in place of the square."""
        if factor == 1:
            return self
        height, width = self.train.images.shape[2:]
        if height % factor or width % factor:
            raise UserError(f"--shrink {factor}: does not divide the {height} x {width} pixels of {self.name}.")
        return replace(self, **{name: _shrunk(getattr(self, name), factor) for name in ("train", "test")})

    def checksum(self) -> str:
        """CRC-32 of all images and labels as 8 hexadecimal digits."""
        crc = 0
        for split in (self.train, self.validation, self.test):
            for tensor in (split.images, split.labels) if split else ():
                crc = zlib.crc32(tensor.contiguous().numpy(), crc)
        return f"{crc:08x}"

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of each channel of the training images, in grey levels; float32 [C, 1, 1], from sums in whole numbers."""
        channels = self.train.images.shape[1]
        total, squares = (torch.zeros(channels, dtype=torch.int64) for _ in range(2))
        for chunk in self.train.images.split(_CHUNK):
            values = chunk.to(torch.int32)
            total += values.sum(dim=(0, 2, 3))
            squares += (values * values).sum(dim=(0, 2, 3))
        count = self.train.images.numel() // channels
        mean = total.double() / count
        std = (squares.double() / count - mean * mean).clamp(min=0).sqrt()
        std[std == 0] = 1.0  # constant images have no spread; 1 leaves them as they are
        return mean.float()[:, None, None], std.float()[:, None, None]


def _shrunk(split: Split, factor: int) -> Split:
    chunks = (F.avg_pool2d(chunk.float(), factor).round().to(torch.uint8) for chunk in split.images.split(_CHUNK))
    return Split(torch.cat(list(chunks)), split.labels)
