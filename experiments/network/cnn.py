# SPDX-License-Identifier: Apache-2.0
"""The network whose gradients are exchanged: most of its parameters in two linear layers, so little is computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.seeding import seeded

HIDDEN = 4096  # 10.1 million parameters
SIDE, CLASSES = 28, 10  # as Fashion-MNIST


class WideCNN(nn.Module):
    """Images [B, 1, 28, 28] to logits [B, 10]."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * (SIDE // 4) ** 2, hidden)
        self.fc2 = nn.Linear(hidden, 896)
        self.fc3 = nn.Linear(896, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        x = F.avg_pool2d(F.relu(self.conv1(images)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def build(hidden: int) -> WideCNN:
    """The same weights in every process."""
    with seeded(0):
        return WideCNN(hidden)
