# SPDX-License-Identifier: Apache-2.0
"""The checks of a step's tensors for the reference; csrc/ops/ says the same for the kernels.

They run before anything is changed, and say which parameter is wrong, how, and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import ShardLayout
from ..tensors import SUPPORTED_DTYPES, StepTensors, Tensors, opmath_dtype, separate_elements

# Of a row of ``tallies``: the coordinates moved in the last step, and scratch space of a GPU (csrc/core/params.h).
TALLY_WORDS = 4


def check_devices(tensors: StepTensors) -> None:
    """Raises ValueError unless all tensors of a call are on one device."""
    params = tensors.params
    named = {"gradient": tensors.grads, **tensors.buffers}
    named |= {"step": tensors.steps, "lipschitz_bound": tensors.lipschitz_bounds}
    for k, index in enumerate(tensors.indices[: len(params)]):
        if params[k].device != params[0].device:
            raise ValueError(
                f"parameter {index} is on {params[k].device}, expected {params[0].device}, "
                "the device of the call's first parameter"
            )
        for name, others in named.items():
            if k < len(others) and others[k].device != params[k].device:
                raise ValueError(
                    f"parameter {index}: {name} is on {others[k].device}, expected {params[k].device} as the parameter"
                )


def check_dtype(param: Tensor, index: int) -> None:
    """Raises TypeError for a parameter that no backend can step."""
    if param.is_complex():
        raise TypeError(
            f"parameter {index} is complex ({param.dtype}); csgd_cuda does not support complex parameters: "
            "pass torch.view_as_real(parameter) instead"
        )
    if param.dtype not in SUPPORTED_DTYPES:
        raise TypeError(
            f"parameter {index} has dtype {param.dtype}; csgd_cuda supports float32, float64, bfloat16 and float16"
        )


def _check_param(param: Tensor, index: int) -> None:
    if not 0 <= index < 2**32:
        raise ValueError(f"indices: {index} is not a parameter index (0 ... 2^32-1)")
    if param.layout is not torch.strided:
        raise ValueError(f"parameter {index} has layout {param.layout}; csgd_cuda needs dense (strided) parameters")
    check_dtype(param, index)
    if param.numel() and not separate_elements(param):
        raise ValueError(
            f"parameter {index} may overlap itself in memory (an expanded tensor?): clone() it before optimizing it"
        )
    _check_changeable(param, index, "the parameter")


def _check_changeable(tensor: Tensor, index: int, name: str) -> None:
    if torch.compiler.is_compiling():  # compiled code cannot find it out; torch refuses the change itself
        return
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"parameter {index}: {name} is an inference tensor, which can be changed inside torch.inference_mode() "
            "only: clone() it"
        )


def _check_unshared(tensors: Tensors, name: str) -> None:
    """A step or bound that two parameters share would be advanced twice, or once too early."""
    if len(set(tensors)) < len(tensors):  # by identity
        raise ValueError(f"{name} must be a tensor of its own for each parameter; one is given twice")


_HOW_TO_CONVERT_STATE = (
    " (if the parameter was converted, optimizer.load_state_dict(optimizer.state_dict()) converts the state)"
)
_HOW_TO_CONVERT_GRADIENT = " (a param.grad_dtype of another dtype is not supported)"


def _check_companion(tensor: Tensor, param: Tensor, index: int, name: str, advice: str) -> None:
    """A tensor of the parameter's own shape and dtype: its gradient or a buffer."""
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"parameter {index}: {name} is sparse ({tensor.layout}), csgd_cuda needs a dense one: "
            f"use sparse=False in the layer, or {name}.to_dense()"
        )
    for what, got, expected in (
        ("has shape", list(tensor.shape), list(param.shape)),
        ("has dtype", tensor.dtype, param.dtype),
    ):
        if got != expected:
            message = f"parameter {index}: {name} {what} {got}, expected {expected} as the parameter"
            raise TypeError(message + advice) if what == "has dtype" else ValueError(message)


def _check_scalar(tensor: Tensor, index: int, name: str, dtype: torch.dtype) -> None:
    if tensor.numel() != 1 or tensor.dtype != dtype:
        raise ValueError(
            f"parameter {index}: {name} must be one {dtype}, got {tensor.numel()} x {tensor.dtype}"
            + _HOW_TO_CONVERT_STATE
        )
    _check_changeable(tensor, index, name)


def _check_shards(indices: Sequence[int], shards: Sequence[int]) -> None:
    """Raises ValueError for runs that overlap, which would draw the same numbers twice."""
    size = len(ShardLayout._fields)
    if shards and len(shards) != size * len(indices):
        raise ValueError(
            f"shards must be empty or have {size} numbers for each parameter, got {len(shards)} for "
            f"{len(indices)} parameters"
        )
    for k, index in enumerate(indices if shards else ()):
        offset, length, stride, runs, group_stride = shards[k * size : (k + 1) * size]
        apart = runs > 0 and (runs == 1 or stride >= length) and group_stride >= (runs - 1) * stride + length
        if length != 0 and not (offset >= 0 and length > 0 and apart):
            raise ValueError(
                f"parameter {index}: shards has offset {offset}, run length {length}, run stride {stride}, "
                f"runs {runs}, group stride {group_stride}; expected runs that do not overlap, and a run length of 0 "
                "for a whole parameter"
            )


def check_shared_tensors(
    device: torch.device, indices: Sequence[int], *, lr_tensor: Tensor | None, grad_scale: Tensor | None,
    found_inf: Tensor | None, tallies: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError or TypeError for a tensor of the whole call that does not fit its parameters."""
    for name, tensor in (("lr", lr_tensor), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None and tensor.layout is not torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if lr_tensor is not None:
        if lr_tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lr as a tensor must be float32 or float64, got {lr_tensor.dtype}")
        if lr_tensor.device != device and lr_tensor.device.type != "cpu":
            raise ValueError(f"lr is a tensor on {lr_tensor.device}, expected {device} as the parameters, or the CPU")
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None and (tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != device):
            raise ValueError(f"{name} must be one Float on {device}, the device of the parameters")
    if tallies is not None and min(indices) != indices[0]:
        raise ValueError(f"indices: with tallies the first must be the smallest, got {indices[0]} and {min(indices)}")
    if tallies is not None and len(set(indices)) < len(indices):
        twice = min(index for index in indices if indices.count(index) > 1)
        raise ValueError(f"indices: with tallies all must be different, got {twice} twice")
    if tallies is not None and (
        tallies.dim() != 2
        or tallies.shape[1] != TALLY_WORDS
        or not tallies.is_contiguous()
        or tallies.dtype != torch.int64
        or tallies.device != device
        or tallies.shape[0] <= max(indices) - indices[0]
    ):
        raise ValueError(
            f"tallies must be a contiguous Long tensor on {device} of shape (K, {TALLY_WORDS}) "
            f"with K >= {max(indices) - indices[0] + 1}, a row for each parameter index from that of the first "
            "parameter on"
        )


def check_step(tensors: StepTensors, options: dict[str, Any], *, uses_buffers: bool) -> None:
    """Checks the tensors of a step; changes nothing. The options have been checked by their table."""
    params, indices = tensors.params, tensors.indices
    lists: list[tuple[str, Sequence[object], bool]] = [("grads", tensors.grads, True)]
    lists += [(f"{name}s", buffers, uses_buffers) for name, buffers in tensors.buffers.items()]
    lists += [
        ("steps", tensors.steps, True),
        ("lipschitz_bounds", tensors.lipschitz_bounds, options["lipschitz"] is None),
        ("indices", indices, True),
    ]
    for name, got, used in lists:
        expected = len(params) if used else 0
        if len(got) != expected:
            raise ValueError(f"{name} must have {expected} entries, got {len(got)}")
    if not params:
        return
    check_devices(tensors)
    for k, (param, index) in enumerate(zip(params, indices, strict=True)):
        _check_param(param, index)
        _check_companion(tensors.grads[k], param, index, "gradient", _HOW_TO_CONVERT_GRADIENT)
        for name, buffers in tensors.buffers.items():
            if buffers:
                _check_companion(buffers[k], param, index, name, _HOW_TO_CONVERT_STATE)
                if param.numel() and not separate_elements(buffers[k]):
                    raise ValueError(f"parameter {index}: {name} may overlap itself in memory")
                _check_changeable(buffers[k], index, name)
        _check_scalar(tensors.steps[k], index, "step", torch.int64)
        if tensors.lipschitz_bounds:
            _check_scalar(tensors.lipschitz_bounds[k], index, "lipschitz_bound", opmath_dtype(param.dtype))
    _check_shards(indices, tensors.shards)
    _check_unshared(tensors.steps, "steps")
    _check_unshared(tensors.lipschitz_bounds, "lipschitz_bounds")
    of_call = {name: options[name] for name in ("lr_tensor", "grad_scale", "found_inf", "tallies")}
    check_shared_tensors(params[0].device, indices, **of_call)
