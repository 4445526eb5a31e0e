# SPDX-License-Identifier: Apache-2.0
"""Pruning by stochastic gradient hard thresholding of an optimizer's parameter groups, around its step.

The step itself has no part in it. Before it, with ``regrow=False``, the parameters get copies of their gradients in
which the entries of dropped weights are 0; after it, H_k sets what is to be dropped to 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..distributed.shards import check_plain, is_dtensor
from ..reference.checks import check_dtype
from ..tensors import Group, State, are_branch_factors, lasting_tensors
from .hard_threshold import check_companion, check_structure, hard_threshold_
from .options import check_pruning, scheduled_sparsity

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes


class Pruning:
    """The pruning of one optimizer. Its state is in the groups (threshold_step) and the optimizer's state (mask)."""

    def __init__(self, buffers_for: Callable[[Group], Sequence[str]]) -> None:
        """``buffers_for``: the names of the state tensors of a parameter's shape that a group needs."""
        self._buffers_for = buffers_for
        self._had_masks: list[bool] | None = None  # of the groups, when masks were forgotten last

    @staticmethod
    def is_on(param_groups: list[Group]) -> bool:
        """Whether a group is pruned."""
        return any(group["sparsity"] for group in param_groups)

    @contextmanager
    def around_step(
        self, param_groups: list[Group], state: State, found_inf: Callable[[torch.device], Tensor | None],
        idle: set[Tensor],
    ) -> Iterator[None]:  # fmt: skip
        """Prunes around the step that is made inside.

        Args:
            state: the optimizer's; gets masks with ``regrow=False``.
            found_inf: of a device: None, or a float32 tensor with one element; where it is not 0 no step was made, and
                nothing is dropped.
            idle: parameters that only get their state. A group in which all parameters with gradients are idle makes
                no step.

        Raises:
            ValueError, TypeError: an option, or a parameter to which it does not apply; nothing was changed.
        """
        self._check_groups(param_groups, state)
        with _masked_gradients(param_groups, state):
            yield
        for group in param_groups:
            if not group["sparsity"]:
                continue
            if idle and _is_idle(group, idle):
                if not group["regrow"]:
                    _make_masks(group, state)
            else:
                group["threshold_step"] += 1
                self._threshold_group(group, state, found_inf, selects=_is_due(group))
        self.forget_masks(param_groups, state)

    def forget_masks(self, param_groups: list[Group], state: State) -> None:
        """Deletes masks where dropped weights may come back. A mask that stayed would drop them again later."""
        have_masks = [_has_masks(group) for group in param_groups]
        if have_masks == self._had_masks:
            return
        for group in param_groups:
            for param in () if _has_masks(group) else group["params"]:
                (state.get(param) or {}).pop("mask", None)
        self._had_masks = have_masks

    def threshold(
        self, param_groups: list[Group], state: State, found_inf: Callable[[torch.device], Tensor | None]
    ) -> None:
        """Drops what the groups' sparsity now drops, as a step that is due; raises as ``around_step``."""
        self._check_groups(param_groups, state)
        self._had_masks = None  # masks may be made here, between the steps
        for group in param_groups:
            if group["sparsity"]:
                selects = scheduled_sparsity(group, group["threshold_step"]) > 0
                self._threshold_group(group, state, found_inf, selects=selects)

    def _cleared(self, group: Group) -> Sequence[str]:
        """The names of the state tensors in which dropped entries become 0."""
        return self._buffers_for(group) if group["dropped_momentum"] == "clear" else ()

    def _check_groups(self, param_groups: list[Group], state: State) -> None:
        position = 0
        for group in param_groups:
            check_group(group, state, position, self._cleared(group))
            position += len(group["params"])

    def _threshold_group(
        self, group: Group, state: State, found_inf: Callable[[torch.device], Tensor | None], *, selects: bool
    ) -> None:
        """H_k of the parameters of a checked group where it ``selects``; otherwise it only applies the masks again."""
        params = _thresholded(group)
        if not group["regrow"]:
            _make_masks(group, state)
        elif not selects:
            return
        for device in dict.fromkeys(param.device for param in params):
            here = [param for param in params if param.device == device]
            _threshold(here, state, group, self._cleared(group), found_inf(device), selects=selects)


def new_mask(param: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask of a parameter in which nothing is dropped, in its memory order where it has its shape."""
    with lasting_tensors():
        if tuple(shape) == tuple(param.shape):
            return torch.ones_like(param, dtype=torch.bool, memory_format=torch.preserve_format, requires_grad=False)
        return torch.ones(tuple(shape), dtype=torch.bool, device=param.device)


def _has_masks(group: Group) -> bool:
    """Whether dropped weights stay 0."""
    return bool(group["sparsity"]) and not group["regrow"]


def _is_idle(group: Group, idle: set[Tensor]) -> bool:
    """Whether the step only makes state of this group."""
    with_grad = [param for param in group["params"] if param.grad is not None]
    return bool(with_grad) and all(param in idle for param in with_grad)


def _make_masks(group: Group, state: State) -> None:
    """Masks exist from the first step on, because a distributed checkpoint loads only into existing state."""
    for param in _thresholded(group):
        if state[param].get("mask") is None:
            state[param]["mask"] = new_mask(param, _mask_shape(param, group))


def _is_due(group: Group) -> bool:
    """Whether H_k follows the step that has just been counted."""
    step = group["threshold_step"]
    return step % group["threshold_every"] == 0 and scheduled_sparsity(group, step) > 0


def _thresholded(group: Group) -> list[Tensor]:
    return [param for param in group["params"] if param.dim() >= 2 and param.requires_grad]


def _mask_shape(param: Tensor, group: Group) -> torch.Size:
    """An entry for each element, or filter."""
    return _filters_first(param, group).shape[:1] if group["structure"] == "filter" else param.shape


def _filters_first(tensor: Tensor, group: Group) -> Tensor:
    """The same memory with the filters along dimension 0, where ``hard_threshold_`` takes them."""
    swapped = group["structure"] == "filter" and group["filter_dim"] == 1
    return tensor.detach().transpose(0, 1) if swapped else tensor


@contextmanager
def _masked_gradients(param_groups: list[Group], state: State) -> Iterator[None]:
    """Inside, the gradients of dropped weights are 0, whatever they were; after it, ``.grad`` is what it was."""
    given: list[tuple[Tensor, Tensor]] = []
    try:
        for group in filter(_has_masks, param_groups):
            for param in _thresholded(group):
                grad, mask = param.grad, (state.get(param) or {}).get("mask")
                # A gradient that does not fit its parameter is left to the checks of the step.
                if mask is not None and grad is not None and _fits(grad, param):
                    if group["structure"] == "filter":
                        mask = _filters_first(mask.view(-1, *[1] * (param.dim() - 1)), group)
                    given.append((param, grad))
                    param.grad = _masked(grad, mask)
        yield
    finally:
        for param, grad in given:
            param.grad = grad


def _fits(grad: Tensor, param: Tensor) -> bool:
    return grad.layout is torch.strided and (grad.shape, grad.dtype, grad.device) == (
        param.shape, param.dtype, param.device,
    )  # fmt: skip


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """A copy of the values with +0 where the mask is False, whatever was there, NaN too.

    By their bits: torch.where is not vectorised on a CPU, and takes five times as long for a million elements.
    """
    integer = _INTEGERS[values.element_size()]
    # In place, since fresh memory of this size costs more than the arithmetic.
    bits = mask.expand_as(values).to(integer).neg_()
    return bits.bitwise_and_(values.view(integer)).view(values.dtype)


def check_group(group: Group, state: State, first: int, cleared: Sequence[str] = ()) -> None:
    """Checks that the parameters of a group can be thresholded.

    Args:
        first: the position of its first parameter over all groups.
        cleared: the names of the state tensors in which dropped entries are cleared.

    Raises:
        ValueError, TypeError: an option, or a parameter to which it does not apply.
    """
    check_pruning(group)
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
        if are_branch_factors(param):
            raise ValueError(
                f"parameter {index} has the branch factors of a GCConv2d, a GCLinear or calibrate_filters, which are "
                "not pruned: give it a group of its own, with sparsity 0 (docs/pruning.md has a recipe)"
            )
        if is_dtensor(param):
            raise TypeError(f"parameter {index} is a DTensor, which cannot be thresholded: set its sparsity to 0")
        check_plain(param, index)
        check_dtype(param, index)
        check_structure(param, index, group["structure"])
        _check_own(param, index, state.get(param) or {}, group, cleared)
    if group["structure"] == "filter":
        _check_no_weight_norm(group, first)
    for device in {param.device for param in params if param.device.type != "meta"}:  # as in the constructor
        extension.takes_kernel(device, group["fused"])
    if group["threshold_scope"] == "group" and len({(p.device, p.dtype is torch.float64) for p in params}) > 1:
        raise ValueError(
            "threshold_scope 'group' needs all parameters of the group on one device, and all of float64 or none"
        )


_WEIGHT_NORM = re.compile(r"(^|\.)(parametrizations\.\w+\.original1|\w+_v)$")


def _check_no_weight_norm(group: Group, first: int) -> None:
    """Raises ValueError for the direction v of a weight g * v / |v|: dropped filters of it would make the weight NaN.

    It follows its magnitude g, one number for each filter: known by the name where the group has names, else by the
    shapes (n, 1, 1, ...) and (n, ...) one after another. Of two dimensions these are as well those of linear layers.
    """
    names = group.get("param_names") or [None] * len(group["params"])
    for k, (g, v) in enumerate(pairwise(group["params"])):
        fits = g.dim() == v.dim() >= 2 and g.shape[0] == g.numel() == v.shape[0] and v.numel() > g.numel()
        if fits and (v.dim() > 2 if names[k + 1] is None else _WEIGHT_NORM.search(names[k + 1])):
            raise ValueError(
                f"parameters {first + k} and {first + k + 1}, of shapes {list(g.shape)} and {list(v.shape)}, are "
                "magnitude and direction of weight_norm: with structure 'filter' dropped filters would make the weight "
                "NaN. Remove weight_norm, or prune the weights of other layers (docs/pruning.md has a recipe); give "
                "the two groups of their own if they are not"
            )


def _check_own(param: Tensor, index: int, own: dict[str, Any], group: Group, cleared: Sequence[str]) -> None:
    """The state that is thresholded with a parameter: the step checks that of parameters with a gradient only."""
    # With what to do where it is otherwise.
    expected: dict[str, tuple[torch.Size, torch.dtype, str]] = dict.fromkeys(cleared, (param.shape, param.dtype, ""))
    if not group["regrow"]:
        anew = f" for structure {group['structure']!r}; remove it from the state to begin anew"
        expected["mask"] = (_mask_shape(param, group), torch.bool, anew)
    for name, (shape, dtype, remedy) in expected.items():
        if own.get(name) is not None:
            check_companion(own[name], name, index, shape, dtype, param.device, remedy=remedy)


def _threshold(
    params: list[Tensor], state: State, group: Group, cleared: Sequence[str], found_inf: Tensor | None, *, selects: bool
) -> None:
    """H_k of parameters on one device, and +0 in the entries of their buffers ``cleared`` that it drops."""
    first, *others = [_buffers(params, state, name) for name in cleared] or [[]]
    if group["regrow"]:  # the masks hold what was dropped, for the other buffers
        masks = [new_mask(param, _mask_shape(param, group)) for param in params] if others else []
    else:
        masks = [state[param]["mask"] for param in params]
    shared: dict[str, Any] = {
        "masks": masks, "structure": group["structure"], "found_inf": found_inf, "fused": group["fused"]
    }  # fmt: skip
    hard_threshold_(
        [_filters_first(param, group) for param in params],
        _keeps(params, scheduled_sparsity(group, group["threshold_step"]), group) if selects else None,
        momentum_buffers=[_filters_first(buffer, group) for buffer in first],
        across=group["threshold_scope"] == "group" and group["structure"] != "2:4",
        **shared,
    )
    for buffers in others:
        hard_threshold_([_filters_first(buffer, group) for buffer in buffers], None, **shared)


def _buffers(params: list[Tensor], state: State, name: str) -> list[Tensor]:
    buffers = [(state.get(param) or {}).get(name) for param in params]
    return [torch.zeros_like(p) if b is None else b for p, b in zip(params, buffers, strict=True)]


def _keeps(params: list[Tensor], sparsity: float, group: Group) -> list[int]:
    """k of each selection; at least one element or filter survives."""
    if group["structure"] == "2:4":
        return []
    counts = [_mask_shape(param, group).numel() for param in params]
    counts = [sum(counts)] if group["threshold_scope"] == "group" else counts
    return [max(count - round(sparsity * count), min(count, 1)) for count in counts]
