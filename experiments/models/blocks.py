# SPDX-License-Identifier: Apache-2.0
"""What the residual networks are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Keeps the size but for the stride; no bias, since batch normalisation comes before or after it."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """The same with one pixel."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def initialise(model: nn.Module) -> None:
    """He's initialisation of the convolutions (He et al., 2015), forward variance from fan-out as for ResNet."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PadShortcut(nn.Module):
    """Shortcut without parameters ("option A"): every stride-th pixel, new channels are zero."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        before = self.added // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.shortcut = PadShortcut(inputs, width, stride) if stride > 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, width, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def stages(block: type, inputs: int, widths: list[int], depths: list[int]) -> tuple[nn.Sequential, int]:
    """One stage of ``depth`` blocks per width, each but the first halving the size; the layers and their channels."""
    layers = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            layers.append(block(inputs, width, 2 if i and not j else 1))
            inputs = width
    return nn.Sequential(*layers), inputs
