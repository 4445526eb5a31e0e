# SPDX-License-Identifier: Apache-2.0
"""Operations that keep channels apart, and what they make of a channel that is constant.

``step_of`` says of a node of a torch.fx graph whether each output channel depends on the same input channel alone, and
gives the same value everywhere where that one does. Of what it does not know it says no.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ELEMENTWISE = {
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
}  # fmt: skip
_ELEMENTWISE_CALLS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid,
    F.tanh, F.hardsigmoid, F.hardswish, F.hardtanh, torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_",
}  # fmt: skip
_POOLS = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d}
_POOL_CALLS = {F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
_OFF_IN_EVAL = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity}
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_VIEWS = {"view", "reshape"}

Modules = Mapping[str, nn.Module]


class Layout(Enum):
    """Where the channels are."""

    IMAGES = "[N, channels, H, W]"
    FLAT = "[N, channels * pixels], one channel after the other"
    VECTORS = "[..., channels], as a linear layer leaves them"


@dataclass(frozen=True)
class Step:
    """What an operation does to channels.

    Attributes:
        layout: behind it.
        of_constants: takes the constants of all channels, float64 of shape (channels,); None where they stay.
        norm: the name of the module, where it has tensors with an entry for each channel.
        only_zeros: whether of all constants only 0 stays constant.
        in_place: whether it overwrites its input.
    """

    layout: Layout
    of_constants: Callable[[Tensor], Tensor] | None = None
    norm: str | None = None
    only_zeros: bool = False
    in_place: bool = False


def step_of(node: Node, layout: Layout, modules: Modules, training: bool) -> Step | None:
    """The step that a node is for the channels of its first argument; None for one that may mix them.

    Args:
        layout: of the channels before it.
        modules: by name.
        training: whether the graph is that of the training mode.
    """
    source, *others = node.args or (None,)
    if not isinstance(source, Node) or len(node.all_input_nodes) != 1:
        return _flattening_view(node, layout)
    if node.op == "call_module":
        return None if others or node.kwargs else _step_of_module(str(node.target), source, layout, modules)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _ELEMENTWISE_CALLS:
        return Step(layout, lambda constants: _call(node, constants), in_place=_overwrites(node))
    if node.target == "contiguous":
        return Step(layout)
    if node.target in _DROPOUT_CALLS:
        applies = node.kwargs.get("training", others[1] if len(others) > 1 else True)
        return Step(layout, in_place=_overwrites(node)) if applies is False or applies is training else None
    if node.target in (torch.flatten, "flatten"):
        return _flattening(layout) if _arguments(node, start_dim=0, end_dim=-1) == [1, -1] else None
    return _step_of_pooling(node, layout) if layout is Layout.IMAGES else None


def _step_of_module(name: str, source: Node, layout: Layout, modules: Modules) -> Step | None:
    module = modules[name]
    kind = type(module)
    if kind in _ELEMENTWISE:
        return Step(layout, lambda constants: module.forward(constants.clone()), in_place=_is_in_place(module))
    if kind in _OFF_IN_EVAL:
        return Step(layout, in_place=_is_in_place(module))
    if kind is nn.Flatten:
        return _flattening(layout) if module.start_dim == 1 and module.end_dim == -1 else None
    if kind in _POOLS:
        if layout is not Layout.IMAGES:
            return None
        return Step(layout, only_zeros=isinstance(module, nn.AvgPool2d) and _pads_the_average(module))
    if kind not in NORMS or not isinstance(module, NORMS) or module.running_mean is None or module.running_var is None:
        return None
    if isinstance(module, nn.BatchNorm2d) != (layout is Layout.IMAGES):
        return None
    if layout is Layout.VECTORS and not _is_matrix(source, modules):
        return None  # of [N, T, channels] BatchNorm1d normalizes T
    return Step(layout, lambda constants: _normalized(constants, module), norm=name)


def _step_of_pooling(node: Node, layout: Layout) -> Step | None:
    """Of images, by a function or a method."""
    if node.target in _POOL_CALLS:
        return Step(layout)  # a tuple with indices can only go to something unknown
    if node.target is F.avg_pool2d:
        return Step(layout, only_zeros=_pads_the_average(nn.AvgPool2d(*node.args[1:], **node.kwargs)))  # type: ignore[arg-type]
    if node.target in (torch.mean, "mean") and set(node.kwargs) <= {"dim", "keepdim"}:
        dims, keeps = _arguments(node, dim=None, keepdim=False)
        if not isinstance(dims, (tuple, list)) or set(dims) not in ({2, 3}, {-1, -2}):
            return None
        return Step(Layout.IMAGES if keeps else Layout.FLAT)
    return None


def _flattening(layout: Layout) -> Step:
    return Step(Layout.FLAT if layout is Layout.IMAGES else layout)


def _flattening_view(node: Node, layout: Layout) -> Step | None:
    """x.view(x.size(0), -1), and the same with reshape or x.shape[0]."""
    if node.op != "call_method" or node.target not in _VIEWS or len(node.args) != 3 or node.kwargs:
        return None
    source, batch, rest = node.args
    if rest != -1 or not isinstance(batch, Node):
        return None
    if batch.op == "call_method":
        counts = batch.target == "size" and batch.args == (source, 0)
    else:
        shape = batch.args[0] if batch.target is operator.getitem and batch.args[1] == 0 else None
        counts = isinstance(shape, Node) and _is_shape(shape) and shape.args[0] is source
    return _flattening(layout) if counts else None


def _is_shape(node: Node) -> bool:
    """Whether a node is the whole shape of its first argument."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is getattr and node.args[1] == "shape"


def reads_no_channel(node: Node, layout: Layout) -> bool:
    """Whether a node reads nothing of its argument that depends on the channels: the batch size, say."""
    elsewhere = (0, 2, 3, -1, -2) if layout is Layout.IMAGES else (0,)
    if _is_shape(node):
        return all(
            user.target is operator.getitem and (user.args[1] in elsewhere or not user.users) for user in node.users
        )
    if node.op == "call_method":
        return (node.target == "size" and node.args[1:] in [(d,) for d in elsewhere]) or node.target == "dim"
    return node.target is getattr and node.args[1] in ("dtype", "device", "ndim")


def _is_matrix(node: Node, modules: Modules) -> bool:
    """Whether a node gives [N, channels], where the model's inputs are batches of vectors or images."""
    if node.op == "placeholder":
        return True
    if node.op == "call_module" and type(modules[str(node.target)]) is nn.Linear:
        step: Step | None = Step(Layout.VECTORS)
    else:
        step = step_of(node, Layout.IMAGES, modules, training=False) or step_of(node, Layout.FLAT, modules, False)
    if step is not None and step.layout is Layout.FLAT:
        return True
    return step is not None and _is_matrix(node.all_input_nodes[0], modules)


def _arguments(node: Node, **defaults: Any) -> list[Any]:
    """What a call gives for the arguments after the first, by their names and in their order."""
    given = dict(zip(defaults, node.args[1:], strict=False)) | node.kwargs
    return [given.get(name, default) for name, default in defaults.items()]


def _call(node: Node, constants: Tensor) -> Tensor:
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    result: Tensor = function(constants.clone(), *node.args[1:], **node.kwargs)
    return result


def _overwrites(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or any(a is True for a in (*node.args[1:], node.kwargs.get("inplace")))


def _is_in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _pads_the_average(layer: nn.AvgPool2d) -> bool:
    padded = layer.padding not in (0, (0, 0)) and layer.count_include_pad
    return padded or layer.divisor_override is not None


def _normalized(constants: Tensor, layer: Any) -> Tensor:
    deviation = (layer.running_var.double() + layer.eps).sqrt()
    value: Tensor = (constants - layer.running_mean.double()) / deviation
    value = value if layer.weight is None else value * layer.weight.detach().double()
    return value if layer.bias is None else value + layer.bias.detach().double()
