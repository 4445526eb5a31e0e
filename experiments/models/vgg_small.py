# SPDX-License-Identifier: Apache-2.0
"""A small network in the manner of VGG (Simonyan and Zisserman, 2015): pairs of 3 x 3 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv3x3
from .small import POOL_FROM_SIDE


def halvings(size: tuple[int, int]) -> int:
    """How often images of ``size`` can be halved between three pairs, so that enough pixels are left."""
    return sum(min(size) >> k >= POOL_FROM_SIDE for k in range(2))


class SmallVGG(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: two convolutions of each width, with batch normalisation and ReLU.

    halvings: after how many of the pairs the size is halved. The forward does not look at sizes, so that torch.fx can
    follow it.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 128), halvings: int = 2):
        super().__init__()
        self.halvings = halvings
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in (width for width in widths for _ in range(2)):
            self.convs.append(conv3x3(channels, width))
            self.norms.append(nn.BatchNorm2d(width))
            channels = width
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(self.halved(x, i))))
        return self.head(x.mean(dim=(2, 3)))

    def halved(self, x: Tensor, i: int) -> Tensor:
        """What convolution ``i`` gets of what the one before it gives."""
        # Averages, because the backward pass of max pooling adds atomically on CUDA: not the same bits twice.
        return F.avg_pool2d(x, 2) if i % 2 == 0 and 0 < i // 2 <= self.halvings else x
