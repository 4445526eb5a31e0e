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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kinds import MODULE
from ..layers.convert import plain_class, uncalibrate

_WEIGHTED = (nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_OFF_IN_EVAL = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
_AT_THE_END = (nn.LogSoftmax, nn.Softmax)
_LAYERS: tuple[type[nn.Module], ...] = (
    *_WEIGHTED, *_NORMS, *_ELEMENTWISE, *_POOLS, *_OFF_IN_EVAL, nn.Flatten, *_AT_THE_END,
)  # fmt: skip
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass
class _Channels:
    """The output channels of a layer: which are dead, and the constant that each of those gives."""

    producer: nn.Conv2d | nn.Linear
    dead: Tensor  # bool
    value: Tensor  # float64
    images: bool  # [N, channels, H, W]; else [N, channels * pixels], one channel after the other
    norms: list[nn.BatchNorm1d | nn.BatchNorm2d] = field(default_factory=list)
    mixed_by: str | None = None  # a softmax, behind which a constant channel is none any more


def export_pruned(model: nn.Sequential) -> nn.Sequential:
    """A smaller dense copy of a plain chain without its dead filters; in eval mode it gives the same outputs.

    Args:
        model: nn.Sequential, also nested, of Conv2d (groups=1), Linear, BatchNorm1d, BatchNorm2d (with running
            statistics), ReLU, ReLU6, GELU, SiLU, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, AdaptiveMaxPool2d, Dropout,
            Dropout1d, Dropout2d, Dropout3d, Identity and Flatten; behind the last layer with weights also LogSoftmax
            and Softmax. These very classes and no subclasses, without forward or backward hooks, parametrizations or a
            forward of their own: what a module computes must be known. The inputs are batches, [N, C, H, W] or [N, C].
            Left as it is. The channels of the last layer with weights all stay, as does one at least of each layer.

    Returns:
        A flat nn.Sequential; the same outputs to 1e-5 of their size in float32, since sums are made in another order.
        What ``calibrate`` has put into the model is not in it: its bounds are those of the larger model.
        ``calibrate(pruned)`` puts new layers in.

    Raises:
        TypeError, ValueError: the model holds something else, or in a way that cannot be cut; the message names the
            module by its path.
    """
    modules = _flatten(model, "")
    # A module that occurs twice gets two copies: what is cut out of them may differ.
    layers = [(name, uncalibrate(copy.deepcopy(layer))) for name, layer in modules]
    channels: _Channels | None = None
    for name, layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            if channels is not None:
                _cut(channels, layer, name)
            channels = _channels_of(layer)
        elif channels is not None:
            _pass(channels, layer, name)
    pruned = nn.Sequential(*(layer for _, layer in layers))
    pruned.training = model.training  # each layer has its own mode already
    return pruned


def _flatten(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The layers of a chain with their paths; raises for a module that computes something unknown."""
    kind = plain_class(model)
    if name == "" and kind is not nn.Sequential:
        what = " (a subclass, which may compute something else)" if isinstance(model, nn.Sequential) else ""
        raise TypeError(f"export_pruned needs an nn.Sequential, got {type(model).__name__}{what}")
    _check_unchanged(model, name or "the model")
    if kind is not nn.Sequential:
        _check_layer(model, name)
        return [(name, model)]
    found = []
    for key, child in model._modules.items():  # named_children() leaves out a module that occurs again
        if child is not None:
            found += _flatten(child, f"{name}.{key}" if name else key)
    return found


def _check_unchanged(module: nn.Module, name: str) -> None:
    """Raises TypeError for a module that may compute something else than its class in torch.nn."""
    if parametrize.is_parametrized(module):
        tensors = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise TypeError(
            f"{name} has a parametrization of {tensors}, which export_pruned does not support; take it off with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    kind = plain_class(module)
    if kind not in (nn.Sequential, *_LAYERS):
        bases = [base.__name__ for base in (nn.Sequential, *_LAYERS) if issubclass(kind, base)]
        what = f"{kind.__name__}, a subclass of {bases[0]} that may compute something else" if bases else kind.__name__
        raise TypeError(
            f"{name} is a {what}; export_pruned supports nn.Sequential of "
            f"{', '.join(layer.__name__ for layer in _LAYERS)}"
        )
    for hooks in _HOOKS:
        if getattr(module, hooks):
            raise TypeError(
                f"{name} has hooks in {hooks}, which may change what it computes; remove them first (those of "
                "torch.nn.utils.prune with prune.remove, of an older weight_norm with remove_weight_norm)"
            )
    for key, value in vars(module).items():
        if callable(value) and callable(getattr(type(module), key, None)):
            raise TypeError(
                f"{name} has a {key} of its own in place of that of {kind.__name__}, which may compute something else; "
                f"delete it (del module.{key})"
            )


def _check_layer(layer: nn.Module, name: str) -> None:
    """Raises TypeError or ValueError for tensors or options of a layer that cannot be cut."""
    weighted = isinstance(layer, _WEIGHTED)
    for key in ("weight", "bias") if isinstance(layer, (*_WEIGHTED, *_NORMS)) else ():
        tensor = getattr(layer, key, None)
        if tensor is None and not (weighted and key == "weight"):
            continue
        if type(tensor) is not nn.Parameter:
            raise TypeError(f"{name}: export_pruned needs a {key} that is a Parameter, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.is_meta or tensor.layout is not torch.strided:
            raise TypeError(
                f"{name}: export_pruned needs a {key} of floating point, dense and with values, got {tensor.dtype}, "
                f"{tensor.layout} on {tensor.device}"
            )
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise ValueError(f"{name}: export_pruned needs groups=1, got {layer.groups}")
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
        raise ValueError(f"{name}: export_pruned needs Flatten(1, -1), got {layer}")


def _channels_of(layer: nn.Conv2d | nn.Linear) -> _Channels:
    weight = layer.weight.detach()
    value = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if layer.bias is not None:
        value += layer.bias.detach()
    return _Channels(layer, ~weight.flatten(1).bool().any(dim=1), value, images=isinstance(layer, nn.Conv2d))


def _pass(channels: _Channels, layer: nn.Module, name: str) -> None:
    """The value of dead channels behind a layer without weights."""
    if isinstance(layer, (nn.BatchNorm2d, *_POOLS)) and not channels.images:
        raise ValueError(f"{name}: export_pruned needs images for {layer}, and there are none behind Flatten or Linear")
    if isinstance(layer, nn.BatchNorm1d) and channels.images:
        raise ValueError(f"{name}: export_pruned needs BatchNorm2d for images, got {layer}")
    if isinstance(layer, nn.Flatten):
        channels.images = False
    elif isinstance(layer, _AT_THE_END):
        channels.mixed_by = name
    elif isinstance(layer, _ELEMENTWISE):
        channels.value = layer.forward(channels.value.clone())
    elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
        _normalize(channels, layer, name)
    elif isinstance(layer, nn.AvgPool2d):
        padded = layer.padding not in (0, (0, 0)) and layer.count_include_pad
        changed = channels.dead & (channels.value != 0)
        if (padded or layer.divisor_override is not None) and bool(changed.any()):
            raise ValueError(
                f"{name}: {layer} does not keep the constants of the {int(changed.sum())} dead filters before it; "
                "export_pruned needs it without padding and divisor_override, or with count_include_pad=False"
            )


def _normalize(channels: _Channels, layer: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> None:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{name}: export_pruned needs running statistics (track_running_stats=True)")
    if layer.num_features != len(channels.dead):
        raise ValueError(
            f"{name}: export_pruned needs the normalization before Flatten, for the {len(channels.dead)} channels "
            f"there are, got {layer}"
        )
    deviation = (layer.running_var.double() + layer.eps).sqrt()
    value = (channels.value - layer.running_mean.double()) / deviation
    value = value if layer.weight is None else value * layer.weight.detach().double()
    channels.value = value if layer.bias is None else value + layer.bias.detach().double()
    channels.norms.append(layer)


def _check_consumer(channels: _Channels, consumer: nn.Conv2d | nn.Linear, name: str) -> None:
    """Raises ValueError where it is not clear which inputs of a layer come from which channel before it."""
    if channels.mixed_by is not None:
        raise ValueError(f"{channels.mixed_by}: export_pruned needs a softmax behind all layers with weights")
    if isinstance(consumer, nn.Conv2d) != channels.images:
        remedy = "Flatten before it" if channels.images else "no Flatten and no Linear before it"
        raise ValueError(f"{name}: export_pruned needs {remedy}, got {consumer}")
    inputs, several = consumer.weight.shape[1], isinstance(channels.producer, nn.Conv2d) and not channels.images
    if inputs % len(channels.dead) != 0 or (inputs != len(channels.dead) and not several):
        multiple = "no multiple of" if several else "not"
        raise ValueError(f"{name} takes {inputs} inputs, which are {multiple} the {len(channels.dead)} before it")


def _pads_with_zeros(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and layer.kernel_size != (1, 1)
    return any(layer.padding)


def _cut(channels: _Channels, consumer: nn.Conv2d | nn.Linear, name: str) -> None:
    """Cuts the dead channels out of the layers that make them, and out of the layer that reads them."""
    _check_consumer(channels, consumer, name)
    inputs = consumer.weight.shape[1]
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
            trained = consumer.weight if consumer.bias is None else consumer.bias
            consumer.bias = nn.Parameter(bias.to(consumer.weight.dtype), requires_grad=trained.requires_grad)
    if bool(goes.all()):
        goes[0] = False  # its constant is in the bias already
        weight[:, 0] = 0
    _slice(channels, consumer, weight[:, ~goes].flatten(1, 2), ~goes)


def _slice(channels: _Channels, consumer: nn.Conv2d | nn.Linear, weight: Tensor, stays: Tensor) -> None:
    _assign(consumer._parameters, "weight", weight.to(consumer.weight.dtype).contiguous())
    producer = channels.producer
    for key in ("weight", "bias"):
        if producer._parameters[key] is not None:
            _assign(producer._parameters, key, getattr(producer, key)[stays])
    for norm in channels.norms:
        norm.num_features = int(stays.sum())
        for tensors in (norm._parameters, norm._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.dim() == 1:
                    _assign(tensors, key, tensor[stays])
    for layer in (producer, consumer):
        names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
        for attribute, size in zip(names, layer.weight.shape, strict=False):
            setattr(layer, attribute, size)


def _assign(tensors: dict[str, Any], key: str, new: Tensor) -> None:
    """Puts a tensor in place of a parameter, frozen where that was, or of a buffer."""
    old, new = tensors[key], new.detach()
    tensors[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


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
        TypeError: a weight is neither float16 nor bfloat16, or parametrized.
        ValueError: no Linear layer has 2:4 weights. With any error, nothing was changed.
    """
    MODULE.check("model", model)
    new = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not is_two_of_four(layer.weight):
            continue
        if parametrize.is_parametrized(layer, "weight"):
            raise TypeError(
                f"{name} has a parametrization of weight, which would not see the new one; take it off with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
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
