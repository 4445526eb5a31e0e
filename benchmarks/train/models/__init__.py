# SPDX-License-Identifier: Apache-2.0
"""The networks by name, for any number of channels and classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from examples.training.errors import UserError
from examples.training.model import SmallCNN

_SMALL_WIDTH = 32  # channels after the first layer, as in examples/train.py


@dataclass(frozen=True)
class Shape:
    """What a network is built for: images [B, channels, *size], ``classes`` logits."""

    channels: int
    size: tuple[int, int]
    classes: int


BUILDERS: dict[str, Callable[[Shape], nn.Module]] = {
    "small": lambda shape: SmallCNN(shape.classes, _SMALL_WIDTH, shape.channels),
}
NAMES = tuple(BUILDERS)


def build(name: str, seed: int, shape: Shape) -> nn.Module:
    """The network in float32 on the CPU, initialised by ``seed`` alone; the global random state stays as it was.

    Raises UserError where there is no such network, or none for images of this size.
    """
    if name not in BUILDERS:
        raise UserError(f"--model {name}: not among {', '.join(NAMES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[name](shape)
