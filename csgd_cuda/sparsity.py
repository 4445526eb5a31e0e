# SPDX-License-Identifier: Apache-2.0
"""Pruning by stochastic gradient hard thresholding: what goes with the step of a parameter group, and follows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .aliases import Group, SharedArguments, State
from .checks import check_dtype, check_plain
from .functional import choose_backend
from .pruned_step import BINS, check_companion
from .pruning_options import check_sparsity, scheduled_sparsity
from .shards import is_dtensor
from .thresholding import check_structure, hard_threshold_

_LEAST_COUNTED = 2**13  # elements of a selection on a CPU: for fewer, the 2^11 counters cost more than they save


def _survivors(count: int, sparsity: float) -> int:
    """k of ``count`` elements or filters: at least one."""
    return max(count - round(sparsity * count), min(count, 1))


def _is_thresholded(param: Tensor) -> bool:
    return param.dim() >= 2 and param.requires_grad


def _thresholded(group: Group) -> list[Tensor]:
    return [param for param in group["params"] if _is_thresholded(param)]


def steps_pruned(param: Tensor, group: Group) -> bool:
    """Whether the step of a parameter has a part in its pruning: it leaves dropped gradients out, or counts."""
    if not group["sparsity"] or not _is_thresholded(param):
        return False
    return group["structure"] == "element" or not group["regrow"]


def is_due(group: Group, step: int) -> bool:
    """Whether H_k follows the ``step``-th step of a group with sparsity."""
    return step % group["threshold_every"] == 0 and scheduled_sparsity(group, step) > 0


def new_histograms(params: Sequence[Tensor], group: Group) -> Tensor | None:
    """For the step that is made now, of these parameters of a group with sparsity: where it counts what H_k after it
    goes on from. None: it need not, or some of what is thresholded together with them makes no step now."""
    device = params[0].device
    if group["structure"] != "element" or not is_due(group, group["threshold_step"] + 1):
        return None
    together = [param for param in _thresholded(group) if param.device == device]
    if list(map(id, together)) != list(map(id, params)):
        return None
    rows = 1 if group["threshold_scope"] == "group" else len(params)
    if device.type == "cpu" and sum(param.numel() for param in params) < rows * _LEAST_COUNTED:
        return None
    return torch.zeros((rows, BINS), dtype=torch.int64, device=device)


def mask_shape(param: Tensor, group: Group) -> torch.Size:
    """An entry for each element, or filter."""
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
        check_plain(param, index)
        check_dtype(param, index)
        check_structure(param, index, group["structure"])
        _check_own(param, index, state.get(param) or {}, group)
    for device in {param.device for param in params if param.device.type != "meta"}:  # as in the constructor
        choose_backend(device, group["fused"])
    if group["threshold_scope"] == "group" and len({(p.device, p.dtype is torch.float64) for p in params}) > 1:
        raise ValueError(
            "threshold_scope 'group' needs all parameters of the group on one device, and all of float64 or none"
        )


def _check_own(param: Tensor, index: int, own: dict[str, Any], group: Group) -> None:
    """What is thresholded with a parameter: the step has looked at that of parameters with a gradient only."""
    expected: dict[str, tuple[torch.Size, torch.dtype, str]] = {}  # with what to do where it is otherwise
    if clears_momentum(group):
        expected["momentum_buffer"] = (param.shape, param.dtype, "")
    if not group["regrow"]:
        anew = f" for structure {group['structure']!r}; remove it from the state to begin anew"
        expected["mask"] = (mask_shape(param, group), torch.bool, anew)
    for name, (shape, dtype, remedy) in expected.items():
        if own.get(name) is not None:
            check_companion(own[name], name, index, shape, dtype, param.device, remedy=remedy)


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


def clears_momentum(group: Group) -> bool:
    return bool(group["dropped_momentum"] == "clear" and group["momentum"] != 0)


def has_masks(group: Group) -> bool:
    """Whether what is dropped stays so."""
    return bool(group["sparsity"]) and not group["regrow"]


def drop_masks(groups: list[Group], state: State) -> None:
    """Forgets the masks where what was dropped may come back: it would else be dropped again when that ends."""
    for group in groups:
        for param in () if has_masks(group) else group["params"]:
            (state.get(param) or {}).pop("mask", None)


def _momentum_buffers(params: list[Tensor], state: State, group: Group) -> list[Tensor]:
    """Those in which the dropped entries are to be cleared."""
    if not clears_momentum(group):
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


def element_mask(param: Tensor, mask: Tensor) -> Tensor:
    """A mask with an entry for each element, of one with an entry for each of these, or each filter."""
    return mask if mask.shape == param.shape else mask.view(-1, *[1] * (param.dim() - 1)).expand_as(param)


def threshold_group(
    group: Group, state: State, shared: SharedArguments, *, selects: bool,
    histograms: Mapping[torch.device, Tensor] = MappingProxyType({}),
) -> None:  # fmt: skip
    """H_k of the parameters of a checked group where it ``selects``, else what is dropped for good alone.

    Args:
        state: of the optimizer; gets masks with ``regrow=False``.
        shared: see StepPlan.run.
        histograms: those of new_histograms(), for the devices where the step has counted.
    """
    params = _thresholded(group)
    if not group["regrow"]:
        # From the first step on, where nothing is dropped yet: checkpoints are loaded into what state there is.
        for param in params:
            if state[param].get("mask") is None:
                state[param]["mask"] = new_mask(param, mask_shape(param, group))
    elif not selects:
        return
    for device in dict.fromkeys(param.device for param in params):
        here = [param for param in params if param.device == device]
        hard_threshold_(
            here,
            _keeps(here, scheduled_sparsity(group, group["threshold_step"]), group) if selects else None,
            momentum_buffers=_momentum_buffers(here, state, group),
            masks=[] if group["regrow"] else [state[param]["mask"] for param in here],
            structure=group["structure"],
            across=group["threshold_scope"] == "group" and group["structure"] != "2:4",
            found_inf=shared(device, 0)["found_inf"],
            histograms=histograms.get(device) if selects else None,
            fused=group["fused"],
        )


class Pruned:
    """The method of CSGD that prunes beside the steps."""

    param_groups: list[Group]
    state: defaultdict[Tensor, Any]
    _shared_arguments: Callable[[torch.device, int], dict[str, Tensor | None]]

    def _has_sparsity(self) -> bool:
        return any(group["sparsity"] for group in self.param_groups)

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
                selects = scheduled_sparsity(group, group["threshold_step"]) > 0
                threshold_group(group, self.state, self._shared_arguments, selects=selects)
