# SPDX-License-Identifier: Apache-2.0
"""Classifiers that take a parameter vector beside the image, and the estimator of that vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.small import SmallCNN, pool
from experiments.models.vgg_small import SmallVGG

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


class Modulation(nn.Module):
    """A scale and a shift for each channel of each layer, from the parameter vector; at first 0.

    Feature-wise linear modulation (Perez et al., "FiLM", AAAI 2018): x * (1 + scale) + shift, after the batch
    normalisation and before the ReLU; scales and shifts are those of a network with one hidden layer.
    """

    def __init__(self, parameters: int, channels: list[int]):
        super().__init__()
        self._channels = channels
        self.layers = nn.Sequential(nn.Linear(parameters, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 2 * sum(channels)))
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, vector: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(scale, shift), each [B, channels, 1, 1], for each layer."""
        scales, shifts = self.layers(vector)[:, :, None, None].chunk(2, dim=1)
        return list(zip(scales.split(self._channels, dim=1), shifts.split(self._channels, dim=1), strict=True))


class FilmCNN(SmallCNN):
    """The parameter vector modulates each layer."""

    def __init__(self, classes: int, width: int, channels: int, parameters: int):
        super().__init__(classes, width, channels)
        self.modulation = Modulation(parameters, [norm.num_features for norm in (self.bn1, self.bn2, self.bn3)])

    def forward(self, images: Tensor, vector: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with parameter vectors [B, P]."""
        return self.head(self.features(images, vector))

    def features(self, images: Tensor, vector: Tensor) -> Tensor:
        """What the last layer sees, [B, 4 * width]."""
        (scale1, shift1), (scale2, shift2), (scale3, shift3) = self.modulation(vector)
        x = pool(F.relu(self.bn1(self.conv1(images)) * (1 + scale1) + shift1))
        x = pool(F.relu(self.bn2(self.conv2(x)) * (1 + scale2) + shift2))
        x = F.relu(self.bn3(self.conv3(x)) * (1 + scale3) + shift3)
        return x.mean(dim=(2, 3))


class FilmVGG(SmallVGG):
    """The same with the six convolutions of SmallVGG, of width, 2 * width and 4 * width channels."""

    def __init__(self, classes: int, width: int, channels: int, parameters: int):
        super().__init__(channels, classes, (width, 2 * width, 4 * width))
        self.modulation = Modulation(parameters, [norm.num_features for norm in self.norms])

    def forward(self, images: Tensor, vector: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] with parameter vectors [B, P]."""
        return self.head(self.features(images, vector))

    def features(self, images: Tensor, vector: Tensor) -> Tensor:
        """What the last layer sees, [B, 4 * width]."""
        x = images
        layers = zip(self.convs, self.norms, self.modulation(vector), strict=True)
        for i, (conv, norm, (scale, shift)) in enumerate(layers):
            x = F.relu(norm(conv(self.halved(x, i))) * (1 + scale) + shift)
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


INJECTIONS = {"film": FilmCNN, "plane": PlaneCNN, "film-vgg": FilmVGG}
