# SPDX-License-Identifier: Apache-2.0
"""A plain network in the style of VGG-11 (Simonyan and Zisserman, 2015) for small images.

Batch normalisation after each convolution, and one linear layer on the mean of the last feature maps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import initialise

# Channels of the convolutions between two poolings.
_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.stages = nn.ModuleList()
        for widths in _STAGES:
            layers = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.stages.append(nn.Sequential(*layers))
        self.head = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for stage in self.stages:
            x = stage(x)
            if min(x.shape[2:]) > 1:  # 28 x 28 pixels are one after four poolings
                x = F.max_pool2d(x, 2)
        return self.head(x.mean(dim=(2, 3)))
