# SPDX-License-Identifier: Apache-2.0
"""What the convolutions of a network are made of, as methods of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from csgd_cuda import CSGD, GCConv2d, calibrate_filters
from experiments.methods import Method
from experiments.seeding import seeded


def with_base_filters(model: nn.Module, learned: bool = True, **options: Any) -> nn.Module:
    """The model with a new GCConv2d of the same size in place of each convolution.

    The new filters have the standard deviation of those they replace, however the model has initialised them. learned:
    whether the branch factors are trained. options: of GCConv2d.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                size = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding
                layer = GCConv2d(*size, bias=child.bias is not None, **options)
                with torch.no_grad():
                    layer.weight.mul_(child.weight.std() / layer.filters().std())
                layer.factors.requires_grad_(learned)
                setattr(module, name, layer)
    return model


def _drawn(**options: Any) -> Callable[[nn.Module, int], object]:
    return lambda model, seed: calibrate_filters(model, seed=seed, **options)


def _base(**options: Any) -> Callable[[nn.Module, int], object]:
    return lambda model, seed: with_base_filters(model, **options)


def _plain(model: nn.Module, seed: int) -> None:
    pass


@dataclass(frozen=True)
class Filters:
    """label: for tables. change: makes them of a network's convolutions, by a seed. narrow: half the channels."""

    label: str
    change: Callable[[nn.Module, int], object] = _plain
    narrow: bool = False


FILTERS = {
    "plain": Filters("plain"),
    "half": Filters("plain, half as many channels", narrow=True),
    "gc": Filters("GCConv2d, K = 4", _base()),
    "drawn": Filters("calibrate_filters, K = 4", _drawn()),
    # Other readings of the published figure.
    "gc-spread-0.3": Filters("GCConv2d, K = 4, spread 0.3", _base(spread=0.3)),
    "gc-spread-1": Filters("GCConv2d, K = 4, spread 1", _base(spread=1.0)),
    "gc-spread-4": Filters("GCConv2d, K = 4, spread 4", _base(spread=4.0)),
    "gc-2": Filters("GCConv2d, K = 2, spread 1", _base(branches=2, spread=1.0)),
    "gc-8": Filters("GCConv2d, K = 8, spread 1", _base(branches=8, spread=1.0)),
    "gc-fixed": Filters("GCConv2d, K = 4, spread 1, R not trained", _base(learned=False, spread=1.0)),
    "gc-filter": Filters("GCConv2d, K = 4, spread 1, R per filter", _base(factors_per="filter", spread=1.0)),
    "gc-channel": Filters("GCConv2d, K = 4, spread 1, R per channel", _base(factors_per="channel", spread=1.0)),
    "drawn-2": Filters("calibrate_filters, K = 2", _drawn(branches=2)),
    "drawn-8": Filters("calibrate_filters, K = 8", _drawn(branches=8)),
    "drawn-0.03": Filters("calibrate_filters, K = 4, spread 0.03", _drawn(spread=0.03)),
}


@dataclass(frozen=True)
class Filtered(Method):
    """name: "sgd" or "csgd"; calibration: c of CSGD; filters: one of FILTERS."""

    filters: str = "plain"

    @property
    def label(self) -> str:
        """For file names."""
        return f"{super().label}-{self.filters}"

    def settings(self) -> dict[str, Any]:
        """For the log."""
        return super().settings() | {"filters": self.filters}

    def network(self, name: str) -> str:
        """The network of half the width where the filters are those of one."""
        return f"{name}-half" if FILTERS[self.filters].narrow else name

    def calibrate(self, model: nn.Module, seed: int) -> None:
        """Changes the convolutions."""
        with seeded(seed):
            FILTERS[self.filters].change(model, seed)

    def optimizer(self, model: nn.Module, lr: float, seed: int, steps: int, **options: Any) -> Optimizer:
        """Of all parameters that are trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.name == "csgd":
            return CSGD(trained, lr=lr, calibration=self.calibration, seed=seed, **options)
        return torch.optim.SGD(trained, lr=lr, **options)
