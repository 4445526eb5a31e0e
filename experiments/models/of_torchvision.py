# SPDX-License-Identifier: Apache-2.0
"""Networks of torchvision, for any number of channels and classes."""

from __future__ import annotations

from torch import nn

from experiments.vision import torchvision

from .blocks import initialise

# VGG-11 without its last pooling, which the mean over what is left replaces: 28 x 28 pixels are one after four.
_VGG_11 = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512]


def build_resnet(name: str, channels: int, classes: int) -> nn.Module:
    """ResNet (He et al., 2016) for ImageNet, with the stride on the 3 x 3 convolution."""
    model = torchvision.models.get_model(name, num_classes=classes)
    if channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
        initialise(model.conv1)
    return model


def build_vgg(channels: int, classes: int) -> nn.Module:
    """VGG-11 (Simonyan and Zisserman, 2015) with batch normalisation, for small images: one linear layer."""
    features = torchvision.models.vgg.make_layers(_VGG_11, batch_norm=True)
    features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
    initialise(model)
    return model
