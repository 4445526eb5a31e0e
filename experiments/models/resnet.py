# SPDX-License-Identifier: Apache-2.0
"""ResNet (He et al., 2016) for ImageNet, with the stride on the 3 x 3 convolution, and for CIFAR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BasicBlock, ConvShortcut, PadShortcut, conv3x3, initialise, stages


class ResNet(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: four stages after a stem that divides the size by four."""

    def __init__(self, block: type, depths: list[int], channels: int, classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.stages, width = stages(block, 64, [64, 128, 256, 512], depths, shortcut=ConvShortcut)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.head(self.stages(x).mean(dim=(2, 3)))


class CifarResNet(nn.Module):
    """The same for small images, of ``depth`` = 6 n + 2 layers in three stages, shortcuts without parameters."""

    def __init__(self, depth: int, channels: int, classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, 16), nn.BatchNorm2d(16)
        self.stages, width = stages(BasicBlock, 16, [16, 32, 64], [(depth - 2) // 6] * 3, shortcut=PadShortcut)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.stages(x).mean(dim=(2, 3)))
