# SPDX-License-Identifier: Apache-2.0
"""ResNet (He et al., 2016) for images as small as those of CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BasicBlock, conv3x3, initialise, stages


class CifarResNet(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: ``depth`` = 6 n + 2 layers in three stages.

    width: channels of the first stage; the others have twice and four times as many.
    """

    def __init__(self, depth: int, channels: int, classes: int, width: int = 16):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width), nn.BatchNorm2d(width)
        self.stages, last = stages(BasicBlock, width, [width, 2 * width, 4 * width], [(depth - 2) // 6] * 3)
        self.head = nn.Linear(last, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.stages(x).mean(dim=(2, 3)))
