# SPDX-License-Identifier: Apache-2.0
"""A chain of three convolutions with batch normalisation, and a linear layer."""

from __future__ import annotations

from torch import nn

SMALLEST_SIDE = 4  # pixels: one is left after the second pooling
_WIDTHS = (16, 32, 64)


def build_chain(channels: int, classes: int) -> nn.Sequential:
    """Images [B, C, H, W] to logits [B, classes]."""
    layers: list[nn.Module] = []
    for width in _WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if width < _WIDTHS[-1] else [nn.AdaptiveAvgPool2d(1)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))
