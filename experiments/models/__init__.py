# SPDX-License-Identifier: Apache-2.0
"""The networks by name, for any number of channels and classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments.seeding import seeded
from tools.program import UserError

from .chain import SMALLEST_SIDE as CHAIN_SIDE
from .chain import build_chain
from .lenet import SMALLEST_SIDE as LENET_SIDE
from .lenet import LeNet
from .resnet import CifarResNet
from .small import SmallCNN
from .vgg_small import SmallVGG, halvings
from .wide_resnet import WideResNet

_SMALL_WIDTH = 32  # channels after the first layer
_TIMM = "timm:"


@dataclass(frozen=True)
class Shape:
    """What a network is built for: images [B, channels, *size], ``classes`` logits."""

    channels: int
    size: tuple[int, int]
    classes: int


@dataclass(frozen=True)
class _Network:
    build: Callable[[Shape], nn.Module]
    smallest_side: int = 1  # pixels


_NETWORKS = {
    "small": _Network(lambda s: SmallCNN(s.classes, _SMALL_WIDTH, s.channels)),
    "lenet": _Network(lambda s: LeNet(s.channels, s.size, s.classes), LENET_SIDE),
    "chain": _Network(lambda s: build_chain(s.channels, s.classes), CHAIN_SIDE),
    "vgg": _Network(lambda s: _of_torchvision().build_vgg(s.channels, s.classes)),
    "vgg-small": _Network(lambda s: SmallVGG(s.channels, s.classes, halvings=halvings(s.size))),
    "vgg-small-half": _Network(lambda s: SmallVGG(s.channels, s.classes, (16, 32, 64), halvings(s.size))),
    "resnet20": _Network(lambda s: CifarResNet(20, s.channels, s.classes)),
    "resnet20-half": _Network(lambda s: CifarResNet(20, s.channels, s.classes, width=8)),
    "resnet56": _Network(lambda s: CifarResNet(56, s.channels, s.classes)),
    "wrn16-4": _Network(lambda s: WideResNet(16, 4, s.channels, s.classes)),
    "wrn28-10": _Network(lambda s: WideResNet(28, 10, s.channels, s.classes)),
    "resnet18": _Network(lambda s: _of_torchvision().build_resnet("resnet18", s.channels, s.classes)),
    "resnet50": _Network(lambda s: _of_torchvision().build_resnet("resnet50", s.channels, s.classes)),
}
NAMES = (*_NETWORKS, f"{_TIMM}NAME")
SMALL = ("small", "lenet", "chain")  # a step takes so little that threads mostly wait for each other


def build(name: str, seed: int, shape: Shape) -> nn.Module:
    """The network in float32 on the CPU, initialised by ``seed`` alone; the global random state stays as it was.

    Raises UserError where there is no such network, or none for images of this size.
    """
    with seeded(seed):
        if name.startswith(_TIMM):
            return _timm(name.removeprefix(_TIMM), shape)
        if name not in _NETWORKS:
            raise UserError(f"--model {name}: not among {', '.join(NAMES)}.")
        smallest = _NETWORKS[name].smallest_side
        if min(shape.size) < smallest:
            raise UserError(
                f"--model {name}: needs images of at least {smallest} x {smallest} pixels, these have "
                f"{shape.size[0]} x {shape.size[1]}; choose another network."
            )
        return _NETWORKS[name].build(shape)


def _of_torchvision():
    """The module; its import takes seconds, which other networks need not wait for."""
    return importlib.import_module("experiments.models.of_torchvision")


def _timm(name: str, shape: Shape) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"--model {_TIMM}{name}: timm is not installed; pip install timm.")
    importlib.import_module("experiments.vision")  # which timm imports
    import timm

    if not timm.is_model(name):
        raise UserError(f"--model {_TIMM}{name}: timm {timm.__version__} has no such network; timm.list_models() does.")
    return timm.create_model(name, num_classes=shape.classes, in_chans=shape.channels)


__all__ = ["NAMES", "SMALL", "Shape", "build"]
