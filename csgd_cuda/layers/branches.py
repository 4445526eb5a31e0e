# SPDX-License-Identifier: Apache-2.0
"""``calibrate_filters`` lets the convolutions of a model train with random estimates of their filters."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from ..distributed.shards import is_dtensor
from ..kinds import FLAG, INTEGER, MODULE
from ..optim.options import check_seed
from ..reference.philox import BRANCH_STREAM, draws
from ..tensors import branch_factors, lasting_tensors
from .convert import BRANCHES, check_own_forward, class_with_layers, has_layer, modules_of, number_layers
from .filters import GCConv2d, HasFactors, centred, check_branches, check_spread
from .numbered import NumberedLayer, rank

_STEPS_AT_ONCE = 64  # whose draws are made together on a CPU: the calls of one step take longer than all else here
_PLACES_OF_RANK = 16  # bits of the word of Philox's counter that the layer's index leaves to the rank
_REMEMBERED = 256  # changes of the step, for forward passes that are made anew


class FilterBranches(HasFactors, NumberedLayer):
    """Passes a weight on; while training, each of its filters w as R_i * w, with a branch i drawn for it.

    The mean over the branches of the factors R is 1, so that R_i * w is an unbiased estimate of w. In eval mode the
    weight itself is passed on. ``calibrate_filters`` puts it into convolutions.

    The draws depend on ``step``, which a backward pass through the layer advances: all forward passes between two
    backward passes have the same filters. Where neither weight nor factors are trained, each forward pass advances it.
    A forward pass that is made anew for its backward pass (torch.utils.checkpoint) has the step that it had. Under
    torch.func (grad, vmap) the step stays as it is.

    Parameter: ``factors`` of shape (branches, 1, *kernel). Buffers: ``index``, which is not saved, since it is the
    layer's place in this very model, and ``step`` (int64).
    """

    def __init__(self, weight: Tensor, branches: int, spread: float, seed: int, same_on_all_ranks: bool) -> None:
        super().__init__()
        self.branches, self.spread, self.seed, self.same_on_all_ranks = branches, spread, seed, same_on_all_ranks
        self._make_counters(saves_index=False)
        # (number of the next node of autograd, step), whenever the step has changed before a forward pass.
        self._passes: deque[tuple[int, Tensor]] = deque(maxlen=_REMEMBERED)
        with lasting_tensors():
            shape = (branches, 1, *weight.shape[2:])
            self.factors = branch_factors(torch.empty(shape, dtype=weight.dtype, device=weight.device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New factors, 1 + spread * normal."""
        nn.init.normal_(self.factors, 1.0, self.spread)

    def forward(self, weight: Tensor) -> Tensor:
        """Filters of the shape of ``weight``, (filters, inputs, *kernel)."""
        if not self.training:
            return weight
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export would keep the branches drawn now for ever; export model.eval(), or fold(model)"
            )
        anew, step = self._pass()
        filters = weight * centred(self.factors)[self.branch(len(weight), step)]
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return filters  # torch.func lets nothing be changed
        if filters.requires_grad:
            noted: Tensor = _AdvanceStep.apply(filters, self.step, step + 1)  # type: ignore[no-untyped-call]
            return noted
        # What is trained has no gradients here in torch.no_grad() only, and so in a reentrant checkpoint.
        if not (weight.requires_grad or self.factors.requires_grad or anew):
            self.step.add_(1)
        return filters

    def _pass(self) -> tuple[bool, Tensor]:
        """Whether a forward pass is made anew for its backward pass, and the step that this pass has.

        It is found by the node of autograd for which the pass is made anew: nodes are numbered as they are made.
        """
        if torch.compiler.is_compiling():  # the compiler keeps what a backward pass needs, or makes it by itself
            return False, self.step
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            steps = (step for first, step in reversed(self._passes) if first <= number)
            return True, next(steps, self.step)
        # On a GPU always: to compare would make the host wait.
        if self.step.device.type != "cpu" or not self._passes or not torch.equal(self._passes[-1][1], self.step):
            following: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            # In a reentrant checkpoint, which makes no nodes inside, the node of the checkpoint itself is the last one.
            first = following if torch.is_grad_enabled() else following - 1
            with lasting_tensors():
                self._passes.append((first, self.step.clone()))
        return False, self._passes[-1][1]

    def branch(self, filters: int, step: Tensor | None = None) -> Tensor:
        """The branches that are drawn for ``filters`` filters, int64 of shape (filters,).

        Args:
            step: the step that the filters are used in; without one, that of the next forward pass.
        """
        step = self.step if step is None else step
        index = self.index if self.same_on_all_ranks else self.index + (rank() << _PLACES_OF_RANK)
        if step.device.type != "cpu" or torch.compiler.is_compiling():  # to read the step would make the host wait
            return _branches(filters, self.branches, self.seed, index, step)
        block, within = divmod(int(step), _STEPS_AT_ONCE)
        return _branches_of_block(filters, self.branches, self.seed, int(index), block)[within]

    def extra_repr(self) -> str:
        """The options, for ``print(module)``."""
        return f"branches={self.branches}, seed={self.seed}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": deque(maxlen=_REMEMBERED)}  # they are those of this process


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


class _AdvanceStep(torch.autograd.Function):
    """Identity; backward sets the layer's step to the following one, unless it has advanced further already."""

    @staticmethod
    def forward(filters: Tensor, step: Tensor, following: Tensor) -> Tensor:
        return filters.view_as(filters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.step, ctx.following = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.step.clamp_(min=ctx.following)
        return grad, None, None


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
        spread: the standard deviation of new factors around 1. That of the noise in the weights, relative to them, is
            sqrt(1 - 1 / branches) times that, since the mean of the factors is made 1.
        seed: 0 ... 2^64 - 1. Equal seeds give equal branches on any device.
        same_on_all_ranks: whether all processes (torch.distributed) draw the same branches; else each has its own.

    All layers of the model, also those that were there before, are numbered by ``number_layers``.

    Raises:
        ValueError: an option is out of range, no module is of these types, or a module has branches already.
        TypeError: a module of these types is no convolution, is transposed, is lazy, has no parameter ``weight`` of a
            floating dtype, has a forward of its own, or is sharded or wrapped already.

    Source: the paper's layer (filters.py) read as an estimator; docs/algorithm.md derives its variance.
    """
    MODULE.check("model", model)
    check_branches("calibrate_filters", branches, branches)
    check_spread("calibrate_filters", spread)
    INTEGER.check("seed", seed)
    check_seed("seed", seed)
    FLAG.check("same_on_all_ranks", same_on_all_ranks)
    found = modules_of(model, types)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError("the model is in DistributedDataParallel already; calibrate its filters first, then wrap it")
    for name, module in found:
        _check_convolution(name, module)
    # All layers and classes are made before the first is put in: on an error nothing has been changed.
    layers = [FilterBranches(m.weight, branches, spread, seed, same_on_all_ranks) for _, m in found]  # type: ignore[arg-type]
    classes = [class_with_layers(module, "branches") for _, module in found]
    for (_, module), layer, kind in zip(found, layers, classes, strict=True):
        layer.train(module.training)
        module.add_module(BRANCHES, layer if layer.factors.is_meta else layer.to(layer.factors.device))
        module.__class__ = kind
    return number_layers(model)


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
    weight = module._parameters.get("weight")
    if weight is None:
        raise TypeError(f"{what} has no parameter 'weight', or it is parametrized; calibrate first, parametrize then")
    if not (weight.is_floating_point() or weight.is_complex()) or weight.element_size() < 2:
        raise TypeError(f"{what} has filters of dtype {weight.dtype}, which have no estimates; leave it out of types")
    if is_dtensor(weight):
        raise TypeError(f"{what} is sharded already; calibrate its filters first, then call fully_shard")
    if hasattr(module, BRANCHES):
        raise TypeError(f"{what} has an attribute {BRANCHES!r} of its own; rename it")
    check_own_forward(what, module)
