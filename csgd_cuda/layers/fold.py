# SPDX-License-Identifier: Apache-2.0
"""``fold`` makes plain layers of ``GCConv2d``, ``GCLinear`` and convolutions with branches, for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..kinds import MODULE
from ..tensors import lasting_tensors
from .convert import BRANCHES, has_layer, remove_layers, uncalibrate
from .filters import GCConv2d, GCLinear

# The plain layer, and the one of ours that computes its weight; with what the latter has in addition.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {GCConv2d: nn.Conv2d, GCLinear: nn.Linear}
_OPTIONS = ("branches", "normalize", "spread")
_METHODS = ("forward", "filters", "_used_factors", "_conv_forward")  # that decide what a layer computes


def fold(model: nn.Module) -> nn.Module:
    """A copy in which GCConv2d, GCLinear and convolutions with branches are plain layers; the model is left as it is.

    In eval mode it gives the same outputs, bit for bit, and its state dict is that of the plain model. Hooks stay, and
    so do weights that layers share. What ``calibrate`` has added is taken off, too.

    Raises:
        TypeError: a GCConv2d or GCLinear has a forward of its own, by a subclass or another package, or its weight is
            made by hooks: no plain layer computes the same. The message names it.
    """
    MODULE.check("model", model)
    with lasting_tensors(), torch.no_grad():
        folded: nn.Module = uncalibrate(copy.deepcopy(model))
        made: dict[Any, nn.Parameter] = {}  # for layers that share their base filters and factors
        found: list[tuple[str, nn.Module]] = list(folded.named_modules())
        for name, module in found:
            if has_layer(module, "branches"):
                remove_layers(module, [BRANCHES])
            if isinstance(module, tuple(_PLAIN)):
                _check_foldable(name, module)
                _make_plain(module, made)
    return folded


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _PLAIN if isinstance(module, kind))


def _check_foldable(name: str, module: nn.Module) -> None:
    what = f"module {name!r} ({type(module).__name__})"
    ours, kind = _kind(module), type(module)
    changed = [m for m in _METHODS if m in module.__dict__ or getattr(kind, m, None) is not getattr(ours, m, None)]
    if changed:
        raise TypeError(
            f"{what} has a {changed[0]} of its own, so that no plain layer computes the same; take that off, or make "
            "the plain layer by hand, with filters() as its weight"
        )
    if "weight" not in module._parameters and not parametrize.is_parametrized(module, "weight"):
        raise TypeError(
            f"{what} has a weight that hooks make of other parameters; call torch.nn.utils.remove_weight_norm or "
            "remove_spectral_norm first, or take torch.nn.utils.parametrizations in their place"
        )


def _make_plain(layer: Any, made: dict[Any, nn.Parameter]) -> None:
    """Turns a layer into the plain one that computes the same, in place."""
    shared = tuple(id(layer._parameters.get(name, layer)) for name in ("weight", "factors"))
    key = (*shared, layer.branches, layer.normalize)
    if key not in made:
        made[key] = nn.Parameter(layer.filters(), requires_grad=layer.weight.requires_grad)
    bias = layer.bias if layer.bias is None or isinstance(layer.bias, nn.Parameter) else nn.Parameter(layer.bias)
    layer.__class__ = _PLAIN[_kind(layer)]
    layer._modules.pop("parametrizations", None)
    layer._parameters.clear()
    for name in _OPTIONS:
        del layer.__dict__[name]
    layer.weight, layer.bias = made[key], bias
