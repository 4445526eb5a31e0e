# SPDX-License-Identifier: Apache-2.0
"""``calibrate_filters`` lets the convolutions of a model train with random estimates of their filters; ``fold`` makes
plain layers of these and of ``GCConv2d``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..kinds import FLAG, INTEGER, MODULE
from ..optim.options import check_seed
from ..reference.philox import BRANCH_STREAM, draws
from ..tensors import lasting_tensors
from .convert import BRANCHES, class_with_layers, has_layer, modules_of, remove_layers
from .filters import GCConv2d, GCLinear, centred, check_branches, check_spread
from .numbered import NumberedLayer, rank

_STEPS_AT_ONCE = 64  # whose draws are made together on a CPU: the calls of one step take longer than all else here
_PLACES_OF_RANK = 16  # bits of the word of Philox's counter that the layer's index leaves to the rank


class FilterBranches(NumberedLayer):
    """Passes a weight on; while training, each of its filters w as R_i * w, with a branch i drawn for it.

    The mean over the branches of the factors R is 1, so that R_i * w is an unbiased estimate of w. In eval mode the
    weight itself is passed on. ``calibrate_filters`` puts it into convolutions.

    The draws change with the first training forward pass after a backward pass: so they are the same wherever a
    forward pass is made anew for its backward pass (torch.utils.checkpoint).

    Parameter: ``factors`` of shape (branches, 1, *kernel). Buffers: ``index`` and ``step`` (int64).
    """

    factors: nn.Parameter
    used: Tensor

    def __init__(self, weight: Tensor, branches: int, spread: float, seed: int, same_on_all_ranks: bool) -> None:
        super().__init__()
        self.branches, self.seed, self.same_on_all_ranks = branches, seed, same_on_all_ranks
        self._make_counters()
        with lasting_tensors():  # whether there was a backward pass since the draws changed
            self.register_buffer("used", torch.zeros((), dtype=torch.int64, device="cpu"), persistent=False)
        factors = torch.empty((branches, 1, *weight.shape[2:]), dtype=weight.dtype, device=weight.device)
        self.factors = nn.Parameter(nn.init.normal_(factors, 1.0, spread))

    def forward(self, weight: Tensor) -> Tensor:
        """Filters of the shape of ``weight``, (filters, inputs, *kernel)."""
        if not self.training:
            return weight
        if not _in_backward():
            self.step.add_(self.used)
            self.used.zero_()
        filters = weight * centred(self.factors, 0)[self.branch(len(weight))]
        noted: Tensor = _NoteBackward.apply(filters, self.used)  # type: ignore[no-untyped-call]
        return noted

    def branch(self, filters: int) -> Tensor:
        """The branches that so many filters have now, int64 of shape (filters,)."""
        index = self.index if self.same_on_all_ranks else self.index + (rank() << _PLACES_OF_RANK)
        if self.step.device.type != "cpu" or torch.compiler.is_compiling():  # to read the step would make the host wait
            return _branches(filters, self.branches, self.seed, index, self.step)
        block, within = divmod(int(self.step), _STEPS_AT_ONCE)
        return _branches_of_block(filters, self.branches, self.seed, int(index), block)[within]

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        return f"branches={self.branches}, seed={self.seed}"


def _branches(filters: int, branches: int, seed: int, index: Tensor | int, step: Tensor) -> Tensor:
    """int64 of shape (filters,), for steps of shape (N, 1) of shape (N, filters)."""
    drawn = draws(0, filters, seed=seed, stream=BRANCH_STREAM, index=index, step=step, device=step.device)
    # With 2, 4 or 8 branches each has exactly the same share of the 2^16 draws; else they differ by one draw.
    return drawn.to(torch.int64) * branches >> 16


@functools.lru_cache(maxsize=1024)  # layers
def _branches_of_block(filters: int, branches: int, seed: int, index: int, block: int) -> Tensor:
    """Those of _STEPS_AT_ONCE steps, on the CPU."""
    with lasting_tensors():
        first = block * _STEPS_AT_ONCE
        steps = torch.arange(first, first + _STEPS_AT_ONCE, device="cpu").view(-1, 1)
        return _branches(filters, branches, seed, index, steps)


class _NoteBackward(torch.autograd.Function):
    """Identity; backward notes that the draws were used."""

    @staticmethod
    def forward(filters: Tensor, used: Tensor) -> Tensor:
        return filters.view_as(filters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.used = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.used.fill_(1)
        return grad, None


def _in_backward() -> bool:
    """Whether autograd is at work, as it is where a checkpointed forward pass is made anew."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def calibrate_filters(
    model: nn.Module,
    branches: int = 4,
    *,
    types: type[nn.Module] | Iterable[type[nn.Module]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    spread: float = 0.1,
    seed: int = 0,
    same_on_all_ranks: bool = False,
) -> nn.Module:
    """Lets every convolution train with random, unbiased estimates of its filters, in place; returns the model.

    The architecture stays: each training forward pass uses R_i * w in place of a filter w, with one of ``branches``
    learned factors R_i drawn for it; their mean is 1, so that the mean over the draws is w. In eval mode the filters
    are w: inference is that of the plain model, bit for bit. The parameters stay the same objects; each convolution
    gets the factors in addition (``filter_branches.factors``), so make the optimizer afterwards. ``fold(model)`` gives
    a plain copy.

    Args:
        model: any module with convolutions of these types.
        branches: how many factors there are. With 2, 4 or 8 each is drawn with exactly the same probability.
        types: the convolutions to take.
        spread: the standard deviation of new factors around 1: that of the noise in the weights, relative to them.
        seed: 0 ... 2^64 - 1. Equal seeds give equal branches on any device.
        same_on_all_ranks: whether all processes (torch.distributed) draw the same branches; else each has its own.

    Raises:
        ValueError: an option is out of range, no module is of these types, or a module has branches already.
        TypeError: a module of these types is no convolution, is transposed, is lazy, or has no parameter ``weight``.

    Source: the paper's layer (filters.py) read as an estimator; docs/algorithm.md derives its variance.
    """
    MODULE.check("model", model)
    check_branches("calibrate_filters", branches, branches)
    check_spread("calibrate_filters", spread)
    INTEGER.check("seed", seed)
    check_seed("seed", seed)
    FLAG.check("same_on_all_ranks", same_on_all_ranks)
    found = modules_of(model, types)
    for name, module in found:
        _check_convolution(name, module)
    # On an error above nothing has been changed.
    numbered = sum(isinstance(module, FilterBranches) for module in model.modules())
    for k, (_, module) in enumerate(found):
        weight: Any = module.weight
        layer = FilterBranches(weight, branches, spread, seed, same_on_all_ranks)
        layer.number(numbered + k)
        layer.train(module.training)
        module.add_module(BRANCHES, layer.to(weight.device))
        module.__class__ = class_with_layers(module)
    return model


def _check_convolution(name: str, module: nn.Module) -> None:
    what = f"module {name!r} ({type(module).__name__})"
    if has_layer(module, "branches"):
        raise ValueError(f"{what} has branches already; fold(model) gives a plain copy, which can get new ones")
    if isinstance(module, GCConv2d):
        raise ValueError(f"{what} has branches of its own; fold(model) makes a plain nn.Conv2d of it")
    if isinstance(module, LazyModuleMixin):
        raise TypeError(f"{what} has not seen its input yet; call the model once, then calibrate its filters")
    if getattr(module, "transposed", False):
        raise TypeError(
            f"{what} is transposed: its filters do not lie along the first dimension; leave it out of types"
        )
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise TypeError(f"{what} is no nn.Conv1d, nn.Conv2d or nn.Conv3d; leave it out of types")
    if module._parameters.get("weight") is None:
        raise TypeError(f"{what} has no parameter 'weight', or it is parametrized; calibrate first, parametrize then")


def fold(model: nn.Module) -> nn.Module:
    """A copy in which GCConv2d, GCLinear and convolutions with branches are plain layers; the model is left as it is.

    In eval mode it gives the same outputs, bit for bit, and its state dict is that of the plain model.
    """
    MODULE.check("model", model)
    folded: nn.Module = copy.deepcopy(model)
    layers = [module for module in folded.modules() if isinstance(module, (GCConv2d, GCLinear))]
    plain: dict[nn.Module | None, nn.Module] = {layer: _plain(layer) for layer in layers}  # one for all its places
    for module in list(folded.modules()):
        if has_layer(module, "branches"):
            remove_layers(module, [BRANCHES])
        for name, child in module._modules.items():
            if child in plain:
                setattr(module, name, plain[child])
    return plain.get(folded, folded)


def _plain(layer: GCConv2d | GCLinear) -> nn.Module:
    """The plain layer that computes the same."""
    weight = layer.filters().detach()
    like: dict[str, Any] = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, GCLinear):
        plain: Any = nn.Linear(layer.in_features, layer.out_features, **like)
    else:
        arguments: Any = {name: getattr(layer, name) for name in _ARGUMENTS}
        plain = nn.Conv2d(**arguments, **like)
    plain.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=layer.bias.requires_grad)
    plain.train(layer.training)
    made: nn.Module = plain
    return made


_ARGUMENTS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)  # fmt: skip
