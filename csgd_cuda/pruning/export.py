# SPDX-License-Identifier: Apache-2.0
"""Smaller models from pruned ones: dead filters cut out of plain chains, 2:4 weights for sparse tensor cores.

A filter whose weights are all zero gives its bias everywhere, and so a constant after normalization, ReLU and pooling.
The constant is added to the bias of the layer that follows, and the filter is not needed any more. Where that layer
pads with zeros, which interrupt the constant at the borders, one dead filter stays in place of all of them: the weights
of the others are added to its own, in proportion to their constants.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_KEEP_CONSTANT = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class _Channels:
    """The output channels of a layer: which are dead, and the constant that each of those gives."""

    producer: nn.Conv2d | nn.Linear
    dead: Tensor  # bool
    value: Tensor  # float64
    norms: list[nn.BatchNorm1d | nn.BatchNorm2d] = field(default_factory=list)


def export_pruned(model: nn.Sequential) -> nn.Sequential:
    """A smaller dense copy of a plain chain without its dead filters; in eval mode it gives the same outputs.

    Args:
        model: nn.Sequential, also nested, of Conv2d (groups=1), Linear, BatchNorm1d, BatchNorm2d (with running
            statistics), ReLU, pooling, Dropout, Identity and Flatten. Left as it is. The channels of the last layer,
            its outputs, all stay, as does one channel at least of each layer.

    Returns:
        A flat nn.Sequential; the same outputs to 1e-5 of their size in float32, since sums are made in another order.

    Raises:
        TypeError, ValueError: the model holds something else, or in a way that cannot be cut; the message names it.
    """
    # A module that occurs twice gets two copies: what is cut out of them may differ.
    layers = [(name, copy.deepcopy(layer)) for name, layer in _flatten(model, "")]
    channels: _Channels | None = None
    for name, layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            if isinstance(layer, nn.Conv2d) and layer.groups != 1:
                raise ValueError(f"{name}: export_pruned needs groups=1, got {layer.groups}")
            if channels is not None:
                _cut(channels, layer, name)
            channels = _channels_of(layer)
        elif channels is not None:
            _pass(channels, layer, name)
        else:
            _check_known(layer, name)
    return nn.Sequential(*(layer for _, layer in layers)).train(model.training)


def _flatten(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        if prefix == "":
            raise TypeError(f"export_pruned needs an nn.Sequential, got {type(model).__name__}")
        return [(prefix, model)]
    found = []
    for name, child in model._modules.items():  # named_children() leaves out a module that occurs again
        if child is not None:
            found += _flatten(child, f"{prefix}.{name}" if prefix else name)
    return found


def _check_known(layer: nn.Module, name: str) -> None:
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
        raise ValueError(f"{name}: export_pruned needs Flatten(1, -1), got {layer}")
    if not isinstance(layer, (nn.ReLU, nn.Flatten, nn.AvgPool2d, *_KEEP_CONSTANT, *_NORMS)):
        raise TypeError(
            f"{name} is a {type(layer).__name__}; export_pruned supports nn.Sequential of Conv2d, Linear, BatchNorm, "
            "ReLU, pooling, Dropout, Identity and Flatten"
        )


def _channels_of(layer: nn.Conv2d | nn.Linear) -> _Channels:
    weight = layer.weight.detach()
    value = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if layer.bias is not None:
        value += layer.bias.detach()
    return _Channels(layer, ~weight.flatten(1).bool().any(dim=1), value)


def _pass(channels: _Channels, layer: nn.Module, name: str) -> None:
    """The value of dead channels behind a layer without weights."""
    _check_known(layer, name)
    if isinstance(layer, nn.ReLU):
        channels.value = channels.value.relu()
    elif isinstance(layer, _NORMS):
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"{name}: export_pruned needs running statistics (track_running_stats=True)")
        if layer.num_features != len(channels.dead):
            raise ValueError(f"{name}: export_pruned needs the normalization before Flatten, got {layer}")
        deviation = (layer.running_var.double() + layer.eps).sqrt()
        channels.value = (channels.value - layer.running_mean.double()) / deviation
        if layer.affine:
            channels.value = channels.value * layer.weight.detach().double() + layer.bias.detach().double()
        channels.norms.append(layer)
    elif isinstance(layer, nn.AvgPool2d):
        padded = layer.padding not in (0, (0, 0)) and layer.count_include_pad
        changed = channels.dead & (channels.value != 0)
        if (padded or layer.divisor_override is not None) and bool(changed.any()):
            raise ValueError(
                f"{name}: {layer} does not keep the constants of the {int(changed.sum())} dead filters before it; "
                "export_pruned needs it without padding and divisor_override, or with count_include_pad=False"
            )


def _pads_with_zeros(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and layer.kernel_size != (1, 1)
    return any(layer.padding)


def _cut(channels: _Channels, consumer: nn.Conv2d | nn.Linear, name: str) -> None:
    """Cuts the dead channels out of the layers that make them, and out of the layer that reads them."""
    inputs = consumer.weight.shape[1]
    if inputs % len(channels.dead) != 0:
        raise ValueError(f"{name} takes {inputs} inputs, which are no multiple of the {len(channels.dead)} before it")
    goes = channels.dead.clone()
    weight = consumer.weight.detach().double()
    weight = weight.reshape(len(weight), len(goes), inputs // len(goes), *weight.shape[2:])
    constants = torch.where(channels.dead, channels.value, 0.0)
    if _pads_with_zeros(consumer) and bool(constants.any()):
        carrier = int(constants.abs().argmax())
        share = torch.where(goes, constants / constants[carrier], 0.0)
        weight[:, carrier] = torch.einsum("oc...,c->o...", weight, share)
        goes[carrier] = False
    else:
        change = torch.einsum("oc...,c->o...", weight, constants).flatten(1).sum(dim=1)
        if bool(change.any()):
            bias = change if consumer.bias is None else consumer.bias.detach() + change
            consumer.bias = nn.Parameter(bias.to(consumer.weight.dtype))
    if bool(goes.all()):
        goes[0] = False  # its constant is in the bias already
        weight[:, 0] = 0
    _slice(channels, consumer, weight[:, ~goes].flatten(1, 2), ~goes)


def _slice(channels: _Channels, consumer: nn.Conv2d | nn.Linear, weight: Tensor, stays: Tensor) -> None:
    consumer.weight = nn.Parameter(weight.to(consumer.weight.dtype).contiguous())
    producer = channels.producer
    producer.weight = nn.Parameter(producer.weight.detach()[stays])
    if producer.bias is not None:
        producer.bias = nn.Parameter(producer.bias.detach()[stays])
    for norm in channels.norms:
        norm.num_features = int(stays.sum())
        for kind in (norm._parameters, norm._buffers):
            for key, tensor in kind.items():
                if tensor is not None and tensor.dim() == 1:
                    kept = tensor.detach()[stays]
                    kind[key] = nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept  # type: ignore[assignment]
    for layer in (producer, consumer):
        names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
        for attribute, size in zip(names, layer.weight.shape, strict=False):
            setattr(layer, attribute, size)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of each four consecutive entries of dimension 1 are not zero."""
    if weight.dim() < 2 or weight.shape[1] % 4 != 0:
        return False
    return not bool((weight.detach().bool().reshape(len(weight), weight.shape[1] // 4, 4, -1).sum(dim=2) > 2).any())


def to_semi_structured(model: nn.Module) -> list[str]:
    """Gives the 2:4 weights of a model's Linear layers to the sparse tensor cores, in place, for inference.

    The weights become torch.sparse.SparseSemiStructuredTensor, which cannot be trained.

    Returns:
        The names of the layers changed.

    Raises:
        RuntimeError: a weight is not on a CUDA GPU of compute capability 8.0 or more, or torch refuses its shape.
        TypeError: a weight is neither float16 nor bfloat16.
        ValueError: no Linear layer has 2:4 weights.
        Nothing was changed.
    """
    new = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not is_two_of_four(layer.weight):
            continue
        weight = layer.weight.detach()
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise RuntimeError(
                f"{name}: semi-structured weights need a CUDA GPU of compute capability 8.0 or more, got one on "
                f"{weight.device}"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name}: semi-structured weights must be float16 or bfloat16, got {weight.dtype}: use model.half()"
            )
        new[name] = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    if not new:
        raise ValueError("the model has no Linear layer of 2:4 weights; train it with structure='2:4', sparsity=0.5")
    for name, parameter in new.items():
        model.get_submodule(name).weight = parameter
    return list(new)
