# SPDX-License-Identifier: Apache-2.0
"""Cuts dead filters out of a layer and of the layers that read it.

A filter whose weights are all zero gives its bias everywhere, and so a constant after normalization, activations and
pooling. The constant is added to the bias of the layer that follows, and the filter is not needed any more. Where that
layer pads with zeros, which interrupt the constant at the borders, one dead filter stays in place of all of them: the
weights of the others are added to its own, in proportion to their constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .regions import Branch


def cut(model: nn.Module, producer: str, branches: list[Branch]) -> None:
    """Cuts the dead filters of a layer out of ``model``, in place.

    Args:
        producer: name of the layer.
        branches: the ways of its output to all layers that read it.
    """
    layer: Any = model.get_submodule(producer)
    dead = ~layer.weight.detach().flatten(1).bool().any(dim=1)
    constants = []
    for branch in branches:
        value = torch.zeros(len(dead), dtype=torch.float64, device=dead.device)
        if layer.bias is not None:
            value += layer.bias.detach()
        for step in branch.steps:
            if step.only_zeros:
                dead &= value == 0
            if step.of_constants is not None:
                value = step.of_constants(value)
        dead &= value.isfinite()
        constants.append(value)
    constants = [torch.where(dead, value, 0.0) for value in constants]
    consumers: list[Any] = [model.get_submodule(branch.consumer) for branch in branches]
    carriers = [
        int(value.abs().argmax()) if _pads_with_zeros(consumer) and bool(value.any()) else None
        for consumer, value in zip(consumers, constants, strict=True)
    ]
    goes = dead.clone()
    goes[[carrier for carrier in carriers if carrier is not None]] = False
    if bool(goes.all()):
        goes[0] = False
    if not bool(goes.any()):
        return
    for branch, consumer, value, carrier in zip(branches, consumers, constants, carriers, strict=True):
        _cut_inputs(model, branch, consumer, goes, value, carrier)
    norms = dict.fromkeys(step.norm for branch in branches for step in branch.steps if step.norm is not None)
    for module in (layer, *map(model.get_submodule, norms)):
        _keep_outputs(module, ~goes)


def _pads_with_zeros(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and layer.kernel_size != (1, 1)
    return any(layer.padding)


def _cut_inputs(
    model: nn.Module, branch: Branch, layer: Any, goes: Tensor, constants: Tensor, carrier: int | None
) -> None:
    """Cuts channels out of a layer that reads them; ``carrier`` is the one that stands for them, if one has to."""
    weight = layer.weight.detach().double()
    weight = weight.reshape(len(weight), len(goes), -1, *weight.shape[2:])
    gone = torch.where(goes, constants, 0.0)
    if carrier is not None:
        weight[:, carrier] += torch.einsum("oc...,c->o...", weight, gone / constants[carrier])
    else:
        change = torch.einsum("oc...,c->o...", weight, gone).flatten(1).sum(dim=1)
        if bool(change.any()):
            _add_to_outputs(model, branch, layer, change)
    weight = weight[:, ~goes].flatten(1, 2)
    _assign(layer._parameters, "weight", weight.to(layer.weight.dtype).contiguous())
    _note_sizes(layer)


def _add_to_outputs(model: nn.Module, branch: Branch, layer: Any, change: Tensor) -> None:
    if branch.norm is not None:
        norm: Any = model.get_submodule(branch.norm)
        mean = norm.running_mean.double() - change
        _assign(norm._buffers, "running_mean", mean.to(norm.running_mean.dtype))
    elif layer.bias is not None:
        _assign(layer._parameters, "bias", (layer.bias.detach() + change).to(layer.bias.dtype))
    else:
        layer.bias = nn.Parameter(change.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _keep_outputs(module: Any, stays: Tensor) -> None:
    """Of a layer with weights or a normalization."""
    for tensors in (module._parameters, module._buffers):
        for key, tensor in tensors.items():
            if tensor is not None and tensor.dim() > 0:
                _assign(tensors, key, tensor[stays])
    _note_sizes(module)


def _note_sizes(module: Any) -> None:
    """The attributes of a module that say how large its tensors are."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.num_features = len(module.running_mean)


def _assign(tensors: dict[str, Any], key: str, new: Tensor) -> None:
    """Puts a tensor in place of a parameter, frozen where that was, or of a buffer."""
    old, new = tensors[key], new.detach()
    if old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    tensors[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
