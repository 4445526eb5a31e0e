# SPDX-License-Identifier: Apache-2.0
"""Hard thresholding as a function: the kernel's operator where there is one, else pure PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import extension
from ..kinds import FLAG, FUSED, OPTIONAL_TENSOR, TEXT, integer_list, tensor_list
from ..tensors import SUPPORTED_DTYPES, Tensors, outside_gpu_code, separate_elements
from .options import STRUCTURES
from .reference import reference

_STRUCTURE = TEXT.described("'element', 'filter' or '2:4'")


@torch.no_grad()
def hard_threshold_(
    params: Iterable[Tensor],
    keeps: Sequence[int] | None,
    *,
    momentum_buffers: Iterable[Tensor] = (),
    masks: Iterable[Tensor] = (),
    structure: Literal["element", "filter", "2:4"] = "element",
    across: bool = False,
    found_inf: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """H_k in place: exactly k elements or filters stay as they are, those of largest magnitude; the others become +0.

    Of equal magnitudes the one of lower index stays: the position in memory order, as for the random draws (row-major
    for a parameter that is not dense), with ``across`` counted on from tensor to tensor. NaN counts as larger than Inf,
    -0 and +0 as equal. The same bits on every backend.

    Args:
        params: dense tensors of one device, of any shape, float32, float64, bfloat16 or float16. Changed.
        keeps: k for each tensor, or one k for all with ``across``; a k above the number of elements keeps them all.
            Empty for "2:4". None: only ``masks`` are applied.
        momentum_buffers: tensors of the parameters' shapes and dtypes, which become +0 where entries are dropped;
            empty: they are left alone.
        masks: bool tensors of the parameters' shapes, with "filter" of shape (filters,). What is False there is dropped
            and cannot survive, even where fewer than k are left; what is dropped becomes False. Empty: none.
        structure: "element"; "filter": k filters, index of dimension 0, of the largest sums of squares (of the stored
            values in float64: element j, counted in memory order, in partial sum j mod 32, these added in halves). The
            weight of a transposed convolution has its output channels along dimension 1: give weight.transpose(0, 1);
            "2:4": two of each four consecutive indices of dimension 1.
        across: one selection over all tensors, of the largest elements or filters of all. All float64, or none.
        found_inf: float32 tensor with one element: where it is not 0, nothing at all is changed.
        fused: None takes the kernel where there is one, else pure PyTorch; True demands it; False takes the latter.

    Raises:
        ValueError, TypeError: something is wrong with an argument; the message names it, and nothing was changed.
        RuntimeError: ``fused=True`` cannot be had; the message says why.
    """
    params = tensor_list("params", params)
    momentum_buffers, masks = tensor_list("momentum_buffers", momentum_buffers), tensor_list("masks", masks)
    keeps = None if keeps is None else integer_list("keeps", keeps)
    _STRUCTURE.check("structure", structure)
    FLAG.check("across", across)
    OPTIONAL_TENSOR.check("found_inf", found_inf)
    FUSED.check("fused", fused)
    if not params:
        return
    if extension.takes_kernel(params[0].device, fused):
        torch.ops.csgd_cuda.hard_threshold_(
            params, momentum_buffers, masks, keeps, structure=structure, across=bool(across), found_inf=found_inf
        )
    else:
        _check(params, momentum_buffers, masks, keeps, structure, across, found_inf)
        _reference_on(params[0].device)(params, momentum_buffers, masks, keeps, structure, across, found_inf)


_reference_on = outside_gpu_code(reference)


def check_companion(
    tensor: Tensor, name: str, index: int, shape: torch.Size, dtype: torch.dtype, device: torch.device, *,
    remedy: str = "",
) -> None:  # fmt: skip
    """Raises ValueError, which ends in ``remedy``, for a tensor that does not fit parameter ``index`` as it should."""
    if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
        raise ValueError(
            f"parameter {index}: {name} has shape {list(tensor.shape)}, dtype {tensor.dtype} on {tensor.device}; "
            f"expected shape {list(shape)}, dtype {dtype} on {device}{remedy}"
        )


def check_structure(param: Tensor, index: int, structure: str) -> None:
    """Raises ValueError for a parameter whose shape the structure does not fit."""
    if structure == "filter" and param.dim() < 2:
        raise ValueError(
            f"parameter {index} has shape {list(param.shape)}: structure 'filter' needs two dimensions or more, of "
            "which the first counts the filters"
        )
    if structure == "2:4" and (param.dim() < 2 or param.shape[1] % 4 != 0):
        raise ValueError(
            f"parameter {index} has shape {list(param.shape)}: structure '2:4' needs a dimension 1 that is divisible "
            "by 4"
        )


def _check_tensors(params: Tensors, momentum_buffers: Tensors, masks: Tensors, structure: str, across: bool) -> None:
    for k, param in enumerate(params):
        if param.layout is not torch.strided:
            raise ValueError(
                f"parameter {k} has layout {param.layout}; hard_threshold_ needs dense (strided) parameters"
            )
        if param.dtype not in SUPPORTED_DTYPES:
            raise TypeError(
                f"parameter {k} has dtype {param.dtype}; hard_threshold_ supports float32, float64, bfloat16 and "
                "float16"
            )
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {k} is on {param.device}, expected {params[0].device}, the device of the call's first "
                "parameter"
            )
        check_structure(param, k, structure)
        mask_shape = param.shape[:1] if structure == "filter" else param.shape
        for name, tensors, shape, dtype in (
            ("the parameter", params, param.shape, param.dtype),
            ("momentum_buffer", momentum_buffers, param.shape, param.dtype),
            ("mask", masks, mask_shape, torch.bool),
        ):
            if not tensors:
                continue
            tensor = tensors[k]
            check_companion(tensor, name, k, shape, dtype, param.device)
            if tensor.numel() and not separate_elements(tensor):
                raise ValueError(
                    f"parameter {k}: {name} may overlap itself in memory (an expanded tensor?): clone() it"
                )
        if across and structure == "element" and (param.dtype is torch.float64) != (params[0].dtype is torch.float64):
            raise TypeError(
                f"parameter {k} has dtype {param.dtype} and parameter 0 {params[0].dtype}: across tensors all must be "
                "float64 or none"
            )


def _check(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: list[int] | None, structure: str, across: bool,
    found_inf: Tensor | None,
) -> None:  # fmt: skip
    """What csrc/ops/hard_threshold.cpp checks, for the reference."""
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be 'element', 'filter' or '2:4', got {structure!r}")
    for name, tensors in (("momentum_buffers", momentum_buffers), ("masks", masks)):
        if tensors and len(tensors) != len(params):
            raise ValueError(
                f"{name} must be empty or have {len(params)} entries, one for each parameter, got {len(tensors)}"
            )
    if keeps is None and not masks:
        raise ValueError("keeps must be given where there are no masks to apply")
    if keeps is not None:
        expected = 0 if structure == "2:4" else 1 if across else len(params)
        if len(keeps) != expected:
            raise ValueError(f"keeps must have {expected} entries, got {len(keeps)}")
        if min(keeps, default=0) < 0:
            raise ValueError(f"keeps must be >= 0, got {min(keeps)}")
    _check_tensors(params, momentum_buffers, masks, structure, across)
    device = params[0].device
    if found_inf is not None and (
        found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != device
    ):
        raise ValueError(f"found_inf must be one Float on {device}, the device of the parameters")


def _fake(
    params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: Sequence[int] | None, *, structure: str,
    across: bool, found_inf: Tensor | None,
) -> None:  # fmt: skip
    others = [*params, *momentum_buffers, *masks, *([] if found_inf is None else [found_inf])]
    if any(tensor.device != params[0].device for tensor in others):
        raise ValueError(f"hard_threshold_ needs all tensors on {params[0].device}, the device of the first")


if extension.build_info() is not None:
    torch.library.register_fake("csgd_cuda::hard_threshold_", _fake)
