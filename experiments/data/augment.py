# SPDX-License-Identifier: Apache-2.0
"""Random variations of a batch of images: shifted by a few pixels (pad and crop), mirrored left to right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.seeding import generator

_PAD_SHARE = 8  # a side of 32 pixels is padded by 4, as is usual for CIFAR


class Augmentation:
    """The draws of one epoch, for each training image by its position in the epoch's order.

    A function of seed and epoch, the same on each device.
    """

    def __init__(self, images: int, side: tuple[int, int], flips: bool, seed: int, epoch: int):
        self.pad = tuple(length // _PAD_SHARE for length in side)
        draws = generator("augmentation", seed, epoch)
        shifts = [torch.randint(0, 2 * pad + 1, (images,), generator=draws) for pad in self.pad]
        self.rows, self.columns = shifts
        self.mirrored = torch.rand(images, generator=draws) < (0.5 if flips else 0)

    def apply(self, images: Tensor, first: int) -> Tensor:
        """``images`` [B, C, H, W], those from position ``first`` of the epoch on, shifted and mirrored."""
        chosen = slice(first, first + len(images))
        rows, columns, mirrored = (draw[chosen].to(images.device) for draw in (self.rows, self.columns, self.mirrored))
        return shift_and_mirror(images, self.pad, rows, columns, mirrored)


def shift_and_mirror(images: Tensor, pad: tuple[int, int], rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
    """Each image [C, H, W] of the batch, padded by zeros, cropped from (row, column) on, and mirrored where asked.

    pad: of the height and the width on either side; rows, columns: int64 [B], 0 to 2 * pad; mirrored: bool [B].
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (pad[1], pad[1], pad[0], pad[0]))
    y = rows[:, None] + torch.arange(height, device=images.device)
    x = columns[:, None] + torch.arange(width, device=images.device)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    image = torch.arange(batch, device=images.device)[:, None, None]
    # Indices on both sides of the channels: these come last in the result.
    return padded[image, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()
