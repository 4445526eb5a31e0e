# SPDX-License-Identifier: Apache-2.0
"""Classifiers that take a parameter vector beside the image, and the estimator of that vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.small import SmallCNN, pool

_HIDDEN = 32  # units between the parameter vector and the modulation


class PlaneCNN(nn.Module):
    """The parameter vector as further input planes, each constant over the image."""

    def __init__(self, classes: int, width: int, channels: int, parameters: int):
        super().__init__()
        self.cnn = SmallCNN(classes, width, channels + parameters)

    def forward(self, images: Tensor, vector: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with parameter vectors [B, P]."""
        return self.cnn.head(self.features(images, vector))

    def features(self, images: Tensor, vector: Tensor) -> Tensor:
        """What the last layer sees, [B, 4 * width]."""
        planes = vector[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return self.cnn.features(torch.cat([images, planes], dim=1))


class FilmCNN(SmallCNN):
    """The parameter vector scales and shifts each channel of each layer before its ReLU.

    Feature-wise linear modulation (Perez et al., "FiLM", AAAI 2018): x * (1 + scale) + shift, after the batch
    normalisation; scales and shifts are those of a network with one hidden layer, and start at 0.
    """

    def __init__(self, classes: int, width: int, channels: int, parameters: int):
        super().__init__(classes, width, channels)
        self._channels = [norm.num_features for norm in (self.bn1, self.bn2, self.bn3)]
        self.modulation = nn.Sequential(
            nn.Linear(parameters, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 2 * sum(self._channels))
        )
        nn.init.zeros_(self.modulation[2].weight)
        nn.init.zeros_(self.modulation[2].bias)

    def forward(self, images: Tensor, vector: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with parameter vectors [B, P]."""
        return self.head(self.features(images, vector))

    def features(self, images: Tensor, vector: Tensor) -> Tensor:
        """What the last layer sees, [B, 4 * width]."""
        scales, shifts = self.modulation(vector)[:, :, None, None].chunk(2, dim=1)
        scales, shifts = scales.split(self._channels, dim=1), shifts.split(self._channels, dim=1)
        x = pool(F.relu(self.bn1(self.conv1(images)) * (1 + scales[0]) + shifts[0]))
        x = pool(F.relu(self.bn2(self.conv2(x)) * (1 + scales[1]) + shifts[1]))
        x = F.relu(self.bn3(self.conv3(x)) * (1 + scales[2]) + shifts[2])
        return x.mean(dim=(2, 3))


class Estimator(nn.Module):
    """The parameter vector of an image from the image alone, by the network that classifies, but with P outputs.

    They are linear: a sigmoid would hardly reach 0 and 1, where the cleanest and the worst images are.
    """

    def __init__(self, width: int, channels: int, parameters: int):
        super().__init__()
        self.cnn = SmallCNN(parameters, width, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Parameter vectors [B, P] of images [B, C, H, W]; in training as they are, else between 0 and 1."""
        vectors = self.cnn(images)
        return vectors if self.training else vectors.clamp(0, 1)


INJECTIONS = {"film": FilmCNN, "plane": PlaneCNN}
