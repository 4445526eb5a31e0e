# SPDX-License-Identifier: Apache-2.0
"""What a step does beside the step itself for parameters that are pruned: the checks, and the counts in pure PyTorch.

csrc/core/magnitude_key.h has the keys and their digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .aliases import Tensors
from .rule import LAYOUTS

DIGIT_BITS = 11
BINS = 2**DIGIT_BITS


def ordered_magnitudes(values: Tensor) -> Tensor:
    """Integers >= 0 in the order of the magnitudes, as wide as opmath; NaN above Inf, all NaN equal."""
    values = values if values.dtype is torch.float64 else values.float()
    layout = LAYOUTS[values.dtype]
    quiet_nan = 2**layout.sign_place - layout.above_infinity // 2
    magnitudes = values.view(layout.integer) & (2**layout.sign_place - 1)
    return torch.where(values.isnan(), quiet_nan, magnitudes)


def count_first_digits(params: Tensors, masks: Tensors, histograms: Tensor, apply: Tensor | None) -> None:
    """Adds to the histograms the first digits of the keys of all elements, where ``apply`` (None: it does) holds."""
    for k, param in enumerate(params):
        if param.numel() == 0:
            continue
        magnitudes = ordered_magnitudes(param.detach())
        shift = LAYOUTS[torch.float64 if param.dtype is torch.float64 else torch.float32].sign_place + 1 - DIGIT_BITS
        digits = (magnitudes >> shift).to(torch.int64) + BINS // 2
        if masks:
            digits = torch.where(masks[k], digits, 0)
        ones = torch.ones((), dtype=torch.int64, device=param.device) if apply is None else apply.to(torch.int64)
        row = histograms[0 if len(histograms) == 1 else k]
        row.index_add_(0, digits.reshape(-1), ones.expand(param.numel()))


def check_pruning(
    params: Tensors, indices: Sequence[int], shards: Sequence[int], masks: Tensors, histograms: Tensor | None
) -> None:
    """Raises ValueError or TypeError for masks and histograms that do not fit the parameters of a step."""
    if not masks and histograms is None:
        return
    if shards:
        raise ValueError("shards must be empty where masks or histograms are given")
    if masks and len(masks) != len(params):
        raise ValueError(f"masks must be empty or have {len(params)} entries, one for each parameter, got {len(masks)}")
    for param, index, mask in zip(params, indices, masks, strict=False):
        check_companion(mask, "mask", index, param.shape, torch.bool, param.device, strided=True)
    if histograms is None:
        return
    check_histograms(histograms, len(params), params[0].device, "each parameter", or_one=True)
    for param, index in zip(params, indices, strict=True):
        alike = (param.dtype is torch.float64) == (params[0].dtype is torch.float64)
        if len(histograms) != len(params) and not alike:
            raise TypeError(
                f"parameter {index} has dtype {param.dtype} and parameter {indices[0]} {params[0].dtype}: with one row "
                "of histograms for all parameters all must be float64 or none"
            )


def check_companion(
    tensor: Tensor, name: str, index: int, shape: torch.Size, dtype: torch.dtype, device: torch.device, *,
    strided: bool = False, remedy: str = "",
) -> None:  # fmt: skip
    """Raises ValueError, which ends in ``remedy``, for what does not go with parameter ``index`` as it should."""
    if (strided and tensor.layout is not torch.strided) or (tensor.shape, tensor.dtype, tensor.device) != (
        shape, dtype, device,
    ):  # fmt: skip
        raise ValueError(
            f"parameter {index}: {name} has shape {list(tensor.shape)}, dtype {tensor.dtype} on {tensor.device}; "
            f"expected shape {list(shape)}, dtype {dtype} on {device}{remedy}"
        )


def check_histograms(
    histograms: Tensor, rows: int, device: torch.device, of_what: str, *, or_one: bool = False
) -> None:
    """Raises ValueError for what is no table of counts, a row of BINS ``of_what``; ``or_one``: or one row for all."""
    if (
        histograms.layout is not torch.strided
        or histograms.dim() != 2
        or histograms.shape[1] != BINS
        or not histograms.is_contiguous()
        or histograms.dtype != torch.int64
        or histograms.device != device
        or (histograms.shape[0] != rows and not (or_one and histograms.shape[0] == 1))
    ):
        one = f", or (1, {BINS}), one for all" if or_one else ""
        raise ValueError(
            f"histograms must be a contiguous Long tensor on {device} of shape ({rows}, {BINS}), a row for {of_what}"
            + one
        )
