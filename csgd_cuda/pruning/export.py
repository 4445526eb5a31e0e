# SPDX-License-Identifier: Apache-2.0
"""Smaller models from pruned ones: dead filters are cut out wherever what they give goes to known layers alone."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import TypeVar

from torch import nn

from ..kinds import MODULE
from ..layers.convert import uncalibrate
from .cut import cut
from .regions import Branch, find_regions
from .trace import Traces, check_modules

_Model = TypeVar("_Model", bound=nn.Module)


def export_pruned(model: _Model) -> _Model:
    """A smaller dense copy of a model without its dead filters; in eval mode it gives the same outputs.

    A filter is dead when its weights are all zero. It is cut out of a Conv2d (groups=1) or Linear whose output goes,
    through operations that keep channels apart, to such layers alone: in a residual block between its convolutions,
    in a chain everywhere. These operations are BatchNorm1d and BatchNorm2d (with running statistics), activations,
    pooling of images and their mean, dropout, Identity and flattening, as modules and as functions. Channels that go
    elsewhere all stay: into a sum or a concatenation, to the model's outputs, to an operation or class that is not
    known, a subclass among them. So do those of modules that are called twice or share tensors with others. At least
    one filter of each layer stays.

    Args:
        model: any module whose forward torch.fx can follow, without forward or backward hooks and parametrizations. Its
            inputs are batches, [N, C, H, W] or [N, C]. Left as it is. Submodules that torch.fx cannot follow are left
            as they are in the copy, too.

    Returns:
        A copy of the same class, with the same modules and parameters, of which some are smaller. (A layer without a
        bias gets one where it has to carry the constants of dead filters and no normalization follows.) The same
        outputs to 1e-5 of their size in float32, since sums are made in another order. What ``calibrate`` has put into
        the model is not in it: its bounds are those of the larger model. ``calibrate(pruned)`` puts new layers in.

    Raises:
        TypeError: a module has a hook, a parametrization, a forward of its own or a weight that is no dense parameter,
            or the model's forward cannot be followed. The message names the module by its path.
        ValueError: the model computes something else when a layer has fewer channels.
    """
    MODULE.check("model", model)
    check_modules(model)
    pruned: _Model = uncalibrate(copy.deepcopy(model))  # type: ignore[assignment]
    traces = Traces(pruned)
    for producer, branches in _regions(pruned, traces).items():
        cut(pruned, producer, branches)
    for old, new in zip_longest(traces.signature(), Traces(pruned).signature(), fillvalue=("",) * 3):
        if old != new:
            raise ValueError(
                f"the forward of {type(model).__name__} computes with the number of channels of a layer: "
                f"{' '.join(old[1:])} becomes {' '.join(new[1:])} where dead filters are cut out"
            )
    return pruned


def cuttable_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the layers whose dead filters ``export_pruned`` cuts out: those to prune for a smaller model.

    Where a filter cannot be cut (in a ResNet: where a sum ties it to the filters of other layers), setting it to zero
    costs accuracy and saves nothing. So it is in front of average pooling that counts its padding, where only filters
    that give 0 can go. ::

        weights = cuttable_weights(model)
        others = [p for p in model.parameters() if all(p is not w for w in weights)]
        pruned = {"params": weights, "sparsity": 0.5, "structure": "filter", "regrow": False}
        optimizer = CSGD([pruned, {"params": others}], lr=0.1)

    Args:
        model: as for ``export_pruned``. Left as it is.

    Returns:
        The model's own parameters, [out, in, height, width] of Conv2d and [out, in] of Linear, in the order in which
        the forward calls the layers.

    Raises:
        TypeError: as ``export_pruned``.
    """
    MODULE.check("model", model)
    check_modules(model)
    copied = uncalibrate(copy.deepcopy(model))
    regions = _regions(copied, Traces(copied))
    return [
        model.get_parameter(f"{producer}.weight")
        for producer, branches in regions.items()
        if not any(step.only_zeros for branch in branches for step in branch.steps)
    ]


def _regions(model: nn.Module, traces: Traces) -> dict[str, list[Branch]]:
    """The layers that can lose channels, with the ways to their readers: those that evaluation and training agree on.

    A forward that is another in training must not miss channels there.
    """
    uses = traces.uses(model)
    in_training = find_regions(traces.training, model, uses, training=True)
    return {
        producer: branches
        for producer, branches in find_regions(traces.evaluation, model, uses, training=False).items()
        if {branch.path for branch in branches} == {branch.path for branch in in_training.get(producer, [])}
    }
