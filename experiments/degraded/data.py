# SPDX-License-Identifier: Apache-2.0
"""Batches of degraded images, a function of seed, epoch and the image's position alone."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.data import ImageSet, Split

from .mixture import Condition, Mixture


@dataclass(frozen=True)
class Draws:
    """Which random numbers an image is degraded with; ``purpose`` keeps those of training and test apart."""

    purpose: str
    seed: int
    epoch: int

    def generator(self, image: int) -> np.random.Generator:
        """That of the image at this position of the data set; the same whichever process asks, and when."""
        return np.random.default_rng([zlib.crc32(self.purpose.encode()), self.seed, self.epoch, image])


class DegradedImages(Dataset):
    """Images of a split, degraded when asked for.

    condition: how all of them are degraded; None draws that for each image.
    """

    def __init__(self, split: Split, mixture: Mixture, draws: Draws, condition: Condition | None = None):
        self.split, self.mixture, self.draws, self.condition = split, mixture, draws, condition

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: images uint8 [B, C, H, W], parameter vectors float32 [B, kinds], labels int64 [B]."""
        images, vectors = zip(*(self._degraded(position) for position in positions), strict=True)
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(vectors)), self.split.labels[positions]

    def _degraded(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        draws = self.draws.generator(position)
        if self.condition is None:
            vector = self.mixture.draw(draws)
        else:
            vector = np.array(self.condition.vector, dtype=np.float32)
        return self.mixture.apply(self.split.images[position].numpy(), vector, draws), vector


def batches(images: DegradedImages, order: Tensor, batch_size: int, loaders: int) -> DataLoader:
    """The batches in this order of the images; ``loaders`` processes degrade them, 0: this one does."""
    return DataLoader(
        images,
        batch_size=None,  # the sampler names whole batches
        sampler=[part.tolist() for part in order.split(batch_size)],
        num_workers=loaders,
        # Forking a process that has run torch's threads may hang.
        multiprocessing_context="spawn" if loaders else None,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )


def stretched(images: ImageSet) -> ImageSet:
    """The same images with the brightest grey level of the training images at 255, which sigmas refer to.

    scikit-learn's digits go to 16 only, where the codec would leave nothing of them.
    """
    brightest = max(1, int(images.train.images.max()))

    def stretch(split: Split) -> Split:
        levels = (split.images.float() * (255 / brightest)).round().clamp(max=255)
        return Split(levels.to(torch.uint8), split.labels)

    return replace(images, train=stretch(images.train), test=stretch(images.test))
