# SPDX-License-Identifier: Apache-2.0
"""A small network in the manner of VGG (Simonyan and Zisserman, 2015): pairs of 3 x 3 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv3x3

_POOL_FROM_SIDE = 8  # pixels, as SmallCNN


class SmallVGG(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: two convolutions of each width, with batch normalisation and ReLU.

    The size is halved between the pairs, where that leaves enough pixels; so torch.fx can follow the forward, it is
    decided here, for images of this ``size``.
    """

    def __init__(self, channels: int, size: tuple[int, int], classes: int, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        side = min(size)
        self.halvings = sum(side >> k >= _POOL_FROM_SIDE for k in range(len(widths) - 1))
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in (width for width in widths for _ in range(2)):
            self.convs.append(conv3x3(channels, width))
            self.norms.append(nn.BatchNorm2d(width))
            channels = width
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i % 2 == 0 and 0 < i // 2 <= self.halvings:
                # Averages, because the backward pass of max pooling adds atomically on CUDA: not the same bits twice.
                x = F.avg_pool2d(x, 2)
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(dim=(2, 3)))
