# SPDX-License-Identifier: Apache-2.0
"""The optimizer state of a parameter: how it is made, and how it comes back from a checkpoint bit for bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import is_dtensor
from ..pruning.groups import new_mask
from ..tensors import Group, State, opmath_dtype
from .direction import Direction


def new_buffer(param: Tensor) -> Tensor:
    """Zeros in the memory order in which ``param`` is stepped: its own if it is dense, else row-major."""
    like = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
    return like if like.stride() == param.stride() else torch.zeros_like(like, memory_format=torch.contiguous_format)


def _one(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a tensor with one element, as a new tensor without dimensions."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    # Copied last: a view of the copy would keep both tensors.
    return value.detach().reshape(()).to(dtype=dtype, device=device, copy=True)


def _copy_of(value: Any) -> Any:
    """A copy of what others keep in a parameter's state, e.g. the slow weights of Lookahead."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_of(entry) for entry in value)
    return value


def _restore_one(
    param: Tensor, index: int, saved: dict[str, Any], as_torch_casts: dict[str, Any], direction: Direction
) -> dict[str, Any]:
    """The state of one parameter from a checkpoint's dict of it; entries of others (a subclass's) as torch loads them.

    torch.optim.Optimizer.load_state_dict casts ``lipschitz_bound`` to the parameter's dtype and ``step`` to
    float32 (when fused), and shares tensors with the checkpoint; this takes the saved bits.
    """
    direction.check_state(saved, index)
    buffers = direction.buffers
    own = ("step", *buffers, "lipschitz_bound", "mask")
    state = {key: _copy_of(value) for key, value in as_torch_casts.items() if key not in own}
    for name in buffers:
        if saved.get(name) is not None:
            state[name] = _restored_buffer(param, index, name, saved[name])
    if saved.get("step") is not None:
        state["step"] = _one(saved["step"], torch.int64, param.device)
    elif any(name in state for name in buffers):
        # From torch.optim.SGD, which does not count: at least one step made this buffer, so it must not be
        # taken for a fresh one.
        state["step"] = _one(1, torch.int64, param.device)
    if saved.get("lipschitz_bound") is not None:
        state["lipschitz_bound"] = _one(saved["lipschitz_bound"], opmath_dtype(param.dtype), param.device)
    mask = saved.get("mask")
    if mask is not None:
        if mask.shape not in (param.shape, param.shape[:1], param.shape[1:2]):  # of filters, as filter_dim counts them
            raise ValueError(f"parameter {index}: the loaded mask has shape {list(mask.shape)}, which does not fit it")
        state["mask"] = new_mask(param, mask.shape).copy_(mask)
    # In the checkpoint's order: saved again, it is the same file.
    return {key: state[key] for key in [*saved, *state] if key in state}


def _restored_buffer(param: Tensor, index: int, name: str, saved: Tensor) -> Tensor:
    if is_dtensor(saved) != is_dtensor(param):
        expected = "a DTensor" if is_dtensor(param) else "a plain tensor"
        raise ValueError(
            f"parameter {index}: the loaded {name} is a {type(saved).__name__}, expected {expected} as the parameter; "
            "set_optimizer_state_dict of torch.distributed.checkpoint converts it"
        )
    if saved.shape != param.shape:
        raise ValueError(
            f"parameter {index}: the loaded {name} has shape {list(saved.shape)}, expected {list(param.shape)}"
        )
    return new_buffer(param).copy_(saved)


def restore_state(
    checkpoint: dict[str, Any], param_groups: list[Group], as_torch_casts: State, direction: Direction
) -> State:
    """The ``state`` of an optimizer with these groups, from the state_dict ``checkpoint``.

    Args:
        as_torch_casts: the ``state`` that torch.optim.Optimizer.load_state_dict has made of the same checkpoint.
        direction: the optimizer's.

    Raises:
        ValueError: a buffer or a mask does not fit its parameter's shape, or is missing.
    """
    params = [param for group in param_groups for param in group["params"]]
    saved_ids = [saved_id for group in checkpoint["param_groups"] for saved_id in group["params"]]
    index_of = {saved_id: index for index, saved_id in enumerate(saved_ids)}
    state: State = defaultdict(dict)
    with torch.no_grad():
        for key, saved in checkpoint["state"].items():
            index = index_of.get(key)
            if index is None:
                state[key] = saved  # not of a parameter: kept as it is, as torch does
                continue
            restored = _restore_one(params[index], index, saved, as_torch_casts[params[index]], direction)
            if restored:
                state[params[index]] = restored
    return state
