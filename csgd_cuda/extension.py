# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded where it was built, and the reason where it is not to be had."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .aliases import Tensors
from .checks import check_devices, check_shared_tensors
from .pruned_step import check_pruning
from .rows import memory_order

_C: ModuleType | None
load_error: str | None
try:
    _C = importlib.import_module("csgd_cuda._C")
except ImportError as error:
    _C, _with_cuda = None, False
    load_error = str(error)
else:
    load_error = None
    _with_cuda = _C.build_info()["cuda"] is not None  # once: torch.compile cannot trace the call

    # Both operators return nothing, and what they change is in the schema: torch.compile needs no more. But a
    # call with a single meta tensor among real ones comes here as well, and must not pass silently.
    def _fake(
        params: Tensors, grads: Tensors, momentum_buffers: Tensors, steps: Tensors, lipschitz_bounds: Tensors,
        indices: Sequence[int], shards: Sequence[int], *, lr_tensor: Tensor | None, grad_scale: Tensor | None,
        found_inf: Tensor | None, tallies: Tensor | None, masks: Tensors, histograms: Tensor | None, **options: Any,
    ) -> None:  # fmt: skip
        check_devices(params, grads, momentum_buffers, steps, lipschitz_bounds, indices)
        if params:
            check_shared_tensors(params[0].device, indices, lr_tensor, grad_scale, found_inf, tallies)
            check_pruning(params, indices, shards, masks, histograms)

    for _name in ("csgd_", "check_csgd"):
        torch.library.register_fake(f"csgd_cuda::{_name}", _fake)

    def _fake_calibrate_grad(grad: Tensor, *state: Tensor | None, **options: Any) -> Tensor:
        if any(tensor is not None and tensor.device != grad.device for tensor in state):
            raise ValueError(f"calibrate_grad needs all tensors on {grad.device}, the device of the gradient")
        order = memory_order(grad)
        if order is None:
            return torch.empty_like(grad, memory_format=torch.contiguous_format)
        return torch.empty_strided(grad.shape, order, dtype=grad.dtype, device=grad.device)

    torch.library.register_fake("csgd_cuda::calibrate_grad", _fake_calibrate_grad)

    def _fake_hard_threshold(
        params: Tensors, momentum_buffers: Tensors, masks: Tensors, keeps: Sequence[int] | None, *, structure: str,
        across: bool, found_inf: Tensor | None, histograms: Tensor | None,
    ) -> None:  # fmt: skip
        others = [*params, *momentum_buffers, *masks, *(t for t in (found_inf, histograms) if t is not None)]
        if any(tensor.device != params[0].device for tensor in others):
            raise ValueError(f"hard_threshold_ needs all tensors on {params[0].device}, the device of the first")

    torch.library.register_fake("csgd_cuda::hard_threshold_", _fake_hard_threshold)


def build_info() -> dict[str, Any] | None:
    """What the extension was built with (torch, cuda, cuda_architectures, compiler, cpu_isa), or None."""
    return None if _C is None else _C.build_info()


def why_no_kernel(device: torch.device) -> str | None:
    """Why tensors on this device cannot be stepped by a kernel; None where they can."""
    if _C is None:
        return f"the extension is not built or does not load ({load_error})"
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for device type {device.type!r}, only for cpu and cuda"
    if device.type == "cuda" and not _with_cuda:
        return "the extension was built without CUDA"
    return None
