# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 (LeCun et al., 1998) as it is built today: ReLU, every feature map connected, a linear classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SIDE = 12  # pixels: one is left after the second pooling


class LeNet(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]."""

    def __init__(self, channels: int, size: tuple[int, int], classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        height, width = ((side // 2 - 4) // 2 for side in size)
        self.fc1 = nn.Linear(16 * height * width, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))
