# SPDX-License-Identifier: Apache-2.0
"""Pruning by stochastic gradient hard thresholding: what follows the step of a parameter group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .aliases import Group, SharedArguments, State
from .pruning_options import check_sparsity, scheduled_sparsity
from .shards import is_dtensor
from .thresholding import check_structure, hard_threshold_


def _survivors(count: int, sparsity: float) -> int:
    """k of ``count`` elements or filters: at least one."""
    return max(count - round(sparsity * count), min(count, 1))


def _thresholded(group: Group) -> list[Tensor]:
    return [param for param in group["params"] if param.dim() >= 2 and param.requires_grad]


def _mask_shape(param: Tensor, group: Group) -> torch.Size:
    return param.shape[:1] if group["structure"] == "filter" else param.shape


def check_thresholding(group: Group, state: State, first: int) -> None:
    """Checks that the parameters of a group can be thresholded; ``first``: the position of its first over all groups.

    Raises:
        ValueError, TypeError: an option, or a parameter to which it does not apply.
    """
    check_sparsity(group)
    if not group["sparsity"]:
        return
    params = _thresholded(group)
    if not params and group["params"]:
        raise ValueError(
            f"sparsity {group['sparsity']} with structure {group['structure']!r}: parameters {first} ... "
            f"{first + len(group['params']) - 1} cannot be thresholded, none is trained and has two dimensions or more"
        )
    for index, param in enumerate(group["params"], start=first):
        if param.dim() < 2 or not param.requires_grad:
            continue
        if is_dtensor(param):
            raise TypeError(f"parameter {index} is a DTensor, which cannot be thresholded: set its sparsity to 0")
        check_structure(param, index, group["structure"])
        mask = (state.get(param) or {}).get("mask")
        if mask is not None and not group["regrow"] and mask.shape != _mask_shape(param, group):
            raise ValueError(
                f"parameter {index}: mask has shape {list(mask.shape)}, expected {list(_mask_shape(param, group))} for "
                f"structure {group['structure']!r}; remove it from the state to begin anew"
            )
    if group["threshold_scope"] == "group" and len({(p.device, p.dtype is torch.float64) for p in params}) > 1:
        raise ValueError(
            "threshold_scope 'group' needs all parameters of the group on one device, and all of float64 or none"
        )


def check_all_thresholding(param_groups: list[Group], state: State) -> None:
    """check_thresholding() of every group."""
    position = 0
    for group in param_groups:
        check_thresholding(group, state, position)
        position += len(group["params"])


def new_mask(param: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of a parameter in which nothing is dropped, in its memory order where it has its shape."""
    if tuple(shape) == tuple(param.shape):
        return torch.ones_like(param, dtype=torch.bool, memory_format=torch.preserve_format, requires_grad=False)
    return torch.ones(tuple(shape), dtype=torch.bool, device=param.device)


def _momentum_buffers(params: list[Tensor], state: State, group: Group) -> list[Tensor]:
    """Those in which the dropped entries are to be cleared."""
    if group["dropped_momentum"] == "keep" or group["momentum"] == 0:
        return []
    buffers = [(state.get(param) or {}).get("momentum_buffer") for param in params]
    return [torch.zeros_like(p) if b is None else b for p, b in zip(params, buffers, strict=True)]


def _keeps(params: list[Tensor], sparsity: float, group: Group) -> list[int]:
    if group["structure"] == "2:4":
        return []
    counts = [param.shape[0] if group["structure"] == "filter" else param.numel() for param in params]
    if group["threshold_scope"] == "group":
        return [_survivors(sum(counts), sparsity)]
    return [_survivors(count, sparsity) for count in counts]


def drop_gradients(group: Group, state: State, shared: SharedArguments) -> None:
    """Before the step of a checked group: sets the gradients of what is dropped for good to zero.

    Such gradients can be far larger than all others (a filter of zeros before batch normalization has them divided by
    the square root of its eps), and the bound on ``|d|`` is one for the whole parameter.
    """
    if group["regrow"]:
        return
    params = [p for p in _thresholded(group) if p.grad is not None and (state.get(p) or {}).get("mask") is not None]
    for device in dict.fromkeys(param.device for param in params):
        here = [param for param in params if param.device == device]
        hard_threshold_(
            [param.grad for param in here if param.grad is not None],
            None,
            masks=[state[param]["mask"] for param in here],
            structure=group["structure"],
            found_inf=shared(device, 0)["found_inf"],
            fused=group["fused"],
        )


def threshold_group(group: Group, state: State, shared: SharedArguments, *, due: bool) -> None:
    """H_k of the parameters of a checked group where it is due, else what is dropped for good alone.

    Args:
        state: of the optimizer; gets masks with ``regrow=False``.
        shared: see StepPlan.run.
    """
    sparsity = scheduled_sparsity(group, group["threshold_step"])
    selects = due and sparsity > 0
    params = _thresholded(group)
    if not group["regrow"]:
        # From the first step on, where nothing is dropped yet: checkpoints are loaded into what state there is.
        for param in params:
            if state[param].get("mask") is None:
                state[param]["mask"] = new_mask(param, _mask_shape(param, group))
    elif not selects:
        return
    for device in dict.fromkeys(param.device for param in params):
        here = [param for param in params if param.device == device]
        hard_threshold_(
            here,
            _keeps(here, sparsity, group) if selects else None,
            momentum_buffers=_momentum_buffers(here, state, group),
            masks=[] if group["regrow"] else [state[param]["mask"] for param in here],
            structure=group["structure"],
            across=group["threshold_scope"] == "group" and group["structure"] != "2:4",
            found_inf=shared(device, 0)["found_inf"],
            fused=group["fused"],
        )


class Pruned:
    """The method of CSGD that prunes beside the steps."""

    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    _shared_arguments: Callable[[torch.device, int], dict[str, Tensor | None]]

    @torch.no_grad()
    def threshold(self) -> None:
        """Drops what the groups' sparsity now drops, as a step that is due: before a pruned model is saved or measured.

        Between the steps that are due, and with ``regrow``, dropped weights move. Groups with sparsity 0 stay.

        Raises:
            ValueError, TypeError: an option or a parameter to which it does not apply; nothing was changed.
        """
        check_all_thresholding(self.param_groups, self.state)
        for group in self.param_groups:
            if group["sparsity"]:
                threshold_group(group, self.state, self._shared_arguments, due=True)
