# SPDX-License-Identifier: Apache-2.0
"""A warning, once per process, where several optimizers draw the same random numbers.

A draw depends on the seed and on the parameter's index, which each optimizer counts from 0. So with one optimizer for
each parameter (torch's _apply_optimizer_in_backward makes such) equal layers would move in the same coordinates.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..extension import stacklevel_of_user
from .options import index_ranges

# For (seed, index) an optimizer that has drawn its numbers, as long as it lives.
_drawing: WeakValueDictionary[tuple[int, int], torch.optim.Optimizer] = WeakValueDictionary()
_warned = False


def note_draws(optimizer: torch.optim.Optimizer, drawn: Iterable[tuple[int, int, Tensor]]) -> None:
    """Notes what a step will draw; warns where an optimizer that is still there has drawn it for another parameter.

    Args:
        drawn: (seed, index, parameter)
    """
    if _warned:
        return
    for seed, index, param in drawn:
        if _is_drawn_for_another(optimizer, seed, index, param):
            # The other one may be left over from an earlier training, in a cycle of references.
            gc.collect()
            if _is_drawn_for_another(optimizer, seed, index, param):
                _warn(type(optimizer).__name__, seed, index)
                return
        _drawing[seed, index] = optimizer


def _is_drawn_for_another(optimizer: torch.optim.Optimizer, seed: int, index: int, param: Tensor) -> bool:
    other = _drawing.get((seed, index))
    if other is None or other is optimizer:
        return False
    for group, indices in zip(other.param_groups, index_ranges(other.param_groups), strict=True):
        if index in indices and group["seed"] == seed:
            return group["params"][index - indices.start] is not param
    return False  # the other one has been changed since


def _warn(name: str, seed: int, index: int) -> None:
    global _warned
    _warned = True
    warnings.warn(
        f"several optimizers of this process draw the same random numbers, those of seed {seed} and parameter index "
        f"{index}: equal tensors move in the same coordinates, and noise adds up that should average out. Give each "
        f"optimizer a first_index of its own, {name}([p], first_index=k) for parameter k, or a seed of its own. This "
        "is said once per process.",
        stacklevel=stacklevel_of_user(),
    )
