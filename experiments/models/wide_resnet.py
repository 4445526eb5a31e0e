# SPDX-License-Identifier: Apache-2.0
"""Wide ResNet (Zagoruyko and Komodakis, 2016), without dropout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv1x1, conv3x3, initialise, stages


class _Block(nn.Module):
    """Normalisation and ReLU before each convolution; a projection, where needed, of what comes out of the first."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.shortcut = conv1x1(inputs, width, stride) if stride > 1 or inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, width, H / stride, W / stride]."""
        y = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + kept


class WideResNet(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]; ``depth`` = 6 n + 4 layers, ``factor`` times as wide as ResNet."""

    def __init__(self, depth: int, factor: int, channels: int, classes: int):
        super().__init__()
        self.conv1 = conv3x3(channels, 16)
        widths = [16 * factor, 32 * factor, 64 * factor]
        self.stages, width = stages(_Block, 16, widths, [(depth - 4) // 6] * 3)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.head(x.mean(dim=(2, 3)))
