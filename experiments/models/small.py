# SPDX-License-Identifier: Apache-2.0
"""A small network: three times convolution, batch normalisation and ReLU, then a linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

POOL_FROM_SIDE = 8  # pixels: 28 x 28 is halved twice, 8 x 8 once


class SmallCNN(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]; the channels are width, 2 * width and 4 * width."""

    def __init__(self, classes: int, width: int, channels: int = 1):
        super().__init__()
        # No bias in the convolutions: the batch normalisation after them has one.
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], in the dtype of the network."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, [B, 4 * width]."""
        x = pool(F.relu(self.bn1(self.conv1(x))))
        x = pool(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3(self.conv3(x)))
        return x.mean(dim=(2, 3))


def pool(x: Tensor) -> Tensor:
    """[B, C, H, W] at half the size, where that leaves enough pixels."""
    # Averages, because the backward pass of max pooling adds atomically on CUDA: not the same bits twice.
    return F.avg_pool2d(x, 2) if min(x.shape[2:]) >= POOL_FROM_SIDE else x
