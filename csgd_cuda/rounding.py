# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding from float32 to bfloat16 and float16 in pure PyTorch; mirrors csrc/core/storage.h.

The magnitude is truncated to the storage grid and goes one step up when the 16-bit draw is below the discarded
fraction times 2^16, so that the mean of the stored value is the value itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN = -(2**31)
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # as float32 bits
_FLOAT16_SMALLEST_NORMAL = 0x38800000
_FLOAT16_BIAS_DIFFERENCE = 112 << 23


def _bfloat16_bits(magnitude: Tensor, draw: Tensor) -> Tensor:
    # bfloat16 is the upper half of float32, subnormals included: the lower half is the fraction times 2^16.
    return (magnitude >> 16) + (draw < (magnitude & 0xFFFF))


def _float16_bits(magnitude: Tensor, draw: Tensor) -> Tensor:
    normal = ((magnitude - _FLOAT16_BIAS_DIFFERENCE) >> 13) + (draw < ((magnitude & 0x1FFF) << 3))
    # Below 2^-14 the grid is 2^-24: in units of it, truncation and fraction are exact in float32.
    is_normal = magnitude >= _FLOAT16_SMALLEST_NORMAL
    units = torch.where(is_normal, 0, magnitude).view(torch.float32) * 2.0**24
    truncated = units.to(torch.int32)
    subnormal = truncated + (draw < (units - truncated) * 65536.0)
    return torch.where(is_normal, normal, subnormal)


def round_stochastic(value: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """``value`` (float32) as ``dtype`` (bfloat16, float16), rounded by ``draw`` (int64, 0 ... 2^16 - 1).

    Beyond the largest finite value, and for Inf and NaN: round to nearest even.
    """
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    draw = draw.to(torch.int32)
    rounded = (_bfloat16_bits if dtype is torch.bfloat16 else _float16_bits)(magnitude, draw)
    # Through int32: the sign bit of int16 has no positive name.
    rounded = rounded | ((bits & _SIGN) >> 16)
    return torch.where(magnitude > _LARGEST[dtype], value.to(dtype), rounded.to(torch.int16).view(dtype))
