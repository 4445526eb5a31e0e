# SPDX-License-Identifier: Apache-2.0
"""A small network in the manner of VGG (Simonyan and Zisserman, 2015): pairs of 3 x 3 convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv3x3
from .small import pool


class SmallVGG(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: two convolutions of each width, with batch normalisation and ReLU.

    The size is halved between the pairs, as in SmallCNN.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for width in (width for width in widths for _ in range(2)):
            self.convs.append(conv3x3(channels, width))
            self.norms.append(nn.BatchNorm2d(width))
            channels = width
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i and i % 2 == 0:
                x = pool(x)
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(dim=(2, 3)))
