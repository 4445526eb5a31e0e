# SPDX-License-Identifier: Apache-2.0
"""Types and facts about tensors that all parts of the package share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

_P = ParamSpec("_P")
_T = TypeVar("_T")

Tensors: TypeAlias = Sequence[Tensor]
Group: TypeAlias = dict[str, Any]  # a parameter group: its options and, under "params", its parameters
State: TypeAlias = dict[Tensor, dict[str, Any]]  # of an optimizer: for each parameter what it keeps between steps


class StepTensors(NamedTuple):
    """The tensors of one operator call that makes a step. Each list has one entry per parameter, or is empty.

    Attributes:
        params, grads: of one shape and dtype each.
        buffers: by their name in the state, tensors of the parameters' shapes and dtypes; empty lists where the options
            need none.
        steps: int64 tensors with one element.
        lipschitz_bounds: tensors of opmath with one element; empty with a fixed Lipschitz constant.
        indices: a number for each parameter, so that their random draws differ.
        shards: the five numbers of each parameter's ShardLayout, one after another; empty: all are whole.
    """

    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    steps: list[Tensor]
    lipschitz_bounds: list[Tensor]
    indices: list[int]
    shards: list[int]


SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for tensors of a storage dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def outside_gpu_code(function: Callable[_P, _T]) -> Callable[[torch.device], Callable[_P, _T]]:
    """For a part of the reference: what to call in its place for tensors on a device.

    That is the function itself, but where torch.compile makes code for another device than a CPU, one that stays
    outside of it: such code rounds a product and a sum once, and divides by estimates.
    """
    uncompiled = _disable_dynamo(function)
    return lambda device: uncompiled if torch.compiler.is_compiling() and device.type != "cpu" else function


def lasting_tensors() -> AbstractContextManager[Any]:
    """A context for what is kept between steps: made inside torch.inference_mode() it could be changed there only."""
    # torch.compile cannot trace whether that mode is on.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


_BRANCH_FACTORS = "_csgd_cuda_branch_factors"


def branch_factors(values: Tensor) -> torch.nn.Parameter:
    """Values as a parameter, or a parameter itself, marked as branch factors (layers/filters.py)."""
    parameter = values if isinstance(values, torch.nn.Parameter) else torch.nn.Parameter(values)
    setattr(parameter, _BRANCH_FACTORS, True)
    return parameter


def are_branch_factors(param: Tensor) -> bool:
    """Whether a parameter is marked so."""
    return getattr(param, _BRANCH_FACTORS, False)


def divided(values: Tensor, divisor: float) -> Tensor:
    """``values / divisor``, rounded once on every device: by a number CUDA divides as a product with its reciprocal."""
    return values / values.new_full((), divisor)


def separate_elements(tensor: Tensor) -> bool:
    """True where no two elements can share memory: each dimension steps over all smaller ones."""
    extent = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= extent:
            return False
        extent += stride * (size - 1)
    return True
