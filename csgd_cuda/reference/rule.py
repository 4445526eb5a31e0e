# SPDX-License-Identifier: Apache-2.0
"""The rule on tensors of opmath: calibration, bound, rounding, roots; mirrors csrc/core/update_rule.h, storage.h.

On a CPU torch.where and comparisons that give bool are not vectorised, and with masks as random as these a branch is
mispredicted at every tenth element: twenty times the time of a vectorised operation. So what is chosen element by
element is chosen by the bits of the floats, taken as integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import DRAW_RANGE


@dataclass(frozen=True)
class Layout:
    """Floats as integers: their dtype, the place of the sign, and what lies between Inf and the sign bit."""

    integer: torch.dtype
    sign_place: int
    above_infinity: int


LAYOUTS = {torch.float32: Layout(torch.int32, 31, 2**23), torch.float64: Layout(torch.int64, 63, 2**52)}

_SIGN = -(2**31)
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}  # as float32 bits
_FLOAT16_SMALLEST_NORMAL = 0x38800000
_FLOAT16_BIAS_DIFFERENCE = 112 << 23


def calibration_scale(calibration: float | Tensor, lipschitz: Tensor) -> Tensor:
    """2^16 / T for T = c * l; Inf where T = 0, which makes every coordinate move."""
    bound = calibration * lipschitz
    return torch.where(bound > 0, torch.full_like(bound, DRAW_RANGE) / bound, torch.inf)


def moving_draws(size: Tensor, scale: Tensor) -> Tensor:
    """n for |d| = size: how many of the 2^16 draws move the coordinate, as opmath."""
    # Where d is not 0 the product must not be, either: it would be rounded up to no draw at all.
    not_zero = size.clamp(max=torch.finfo(size.dtype).tiny)
    n = torch.clamp(size * scale, min=not_zero, max=_draw_range(size))
    return n.nan_to_num_(nan=float(DRAW_RANGE)).ceil_()


def _draw_range(like: Tensor) -> Tensor:
    return torch.full((), DRAW_RANGE, dtype=like.dtype, device=like.device)


def moves(draw: Tensor, n: Tensor) -> Tensor:
    """-1 where the draw is below n, else 0, in the integers as wide as opmath: the sign of draw - n in every bit."""
    layout = LAYOUTS[n.dtype]
    return (draw.to(n.dtype) - n).view(layout.integer).bitwise_right_shift_(layout.sign_place)


def calibrated(d: Tensor, n: Tensor) -> Tensor:
    """The estimate of d where the coordinate moves."""
    return (_draw_range(n) / n).mul_(d)


def ordered_bits(size: Tensor) -> Tensor:
    """Magnitudes as integers in the same order, but for Inf and NaN, which are below all others."""
    layout = LAYOUTS[size.dtype]
    return size.view(layout.integer) + layout.above_infinity


def largest_size(ordered: Tensor, opmath: torch.dtype) -> Tensor:
    """The magnitude of a maximum of ``ordered_bits``; 0 where there was no finite one."""
    above_infinity = LAYOUTS[opmath].above_infinity
    return (ordered.clamp(min=above_infinity) - above_infinity).view(opmath)


def next_bound(bound: Tensor, bound_decay: float, largest: Tensor) -> Tensor:
    """The estimate of the Lipschitz bound for the next step."""
    return torch.maximum(bound * bound_decay, largest)


def round_stochastic(value: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """``value`` (float32) as ``dtype`` (bfloat16, float16), rounded by ``draw`` (integers, 0 ... 2^16 - 1).

    The magnitude is truncated to the storage grid and goes one step up when the draw is below the discarded fraction
    times 2^16, so that the mean of the stored value is the value itself. Beyond the largest finite value, and for Inf
    and NaN: round to nearest even.
    """
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    draw = draw.to(torch.int32)
    rounded = (_bfloat16_bits if dtype is torch.bfloat16 else _float16_bits)(magnitude, draw)
    # Through int32: the sign bit of int16 has no positive name.
    rounded = rounded | ((bits & _SIGN) >> 16)
    return torch.where(magnitude > _LARGEST[dtype], value.to(dtype), rounded.to(torch.int16).view(dtype))


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


def square_root(values: Tensor) -> Tensor:
    """The correctly rounded square root of float32 or float64.

    On a CPU torch.sqrt is not: it calls MKL, whose results may be one unit in the last place off (for float32 one in
    five was, on a processor with AVX-512). It must not be off by more.
    """
    if values.dtype is torch.float64:
        return _square_root_of_double(values)
    # The root of a float32 is at least 2^-51 of itself away from the middle between two float32: the square of such a
    # middle has a bit that no float32 has. The error of a float64, 2^-52 of the root, does not reach so far.
    return values.double().sqrt_().to(values.dtype)


def _square_root_of_double(values: Tensor) -> Tensor:
    """By integers: q is the root of N, rounded to nearest, where q^2 - q < N <= q^2 + q. Both sides of this wrap around
    modulo 2^64, but not their difference, for a q that is off by one at most."""
    mantissa, exponent = torch.frexp(values)
    is_odd = exponent & 1
    fraction = mantissa * (1.0 - is_odd * 0.5)  # in [1/4, 1); values = fraction * 2^half_exponent * 2^half_exponent
    half_exponent = (exponent + is_odd) >> 1
    is_usual = (values > 0) & (values < torch.inf)
    fraction = torch.where(is_usual, fraction, fraction.new_full((), 0.25))
    q = (fraction.sqrt() * 2.0**53).to(torch.int64)
    excess = (fraction * 2.0**54).to(torch.int64) * 2**52 - q * q  # N - q^2
    q += (excess > q).to(torch.int64) - (excess <= -q).to(torch.int64)
    # 2^(half_exponent - 53), from its bits.
    unit = ((half_exponent.to(torch.int64) + (1023 - 53)) << 52).view(torch.float64)
    return torch.where(is_usual, q.to(torch.float64) * unit, values.sqrt())
