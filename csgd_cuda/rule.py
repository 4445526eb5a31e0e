# SPDX-License-Identifier: Apache-2.0
"""The rule of the calibration on tensors of opmath, which the references share; mirrors csrc/core/update_rule.h.

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
    """-1 where the draw is below n, else 0, in the integers as wide as opmath: the sign of draw - n, spread out."""
    layout = LAYOUTS[n.dtype]
    return (draw.to(n.dtype) - n).view(layout.integer).bitwise_right_shift_(layout.sign_place)


def calibrated(d: Tensor, n: Tensor) -> Tensor:
    """What stands for d where it moves."""
    return (_draw_range(n) / n).mul_(d)


def ordered_bits(size: Tensor) -> Tensor:
    """Magnitudes as integers that order as they do; Inf and NaN come before all others."""
    layout = LAYOUTS[size.dtype]
    return size.view(layout.integer) + layout.above_infinity


def largest_size(ordered: Tensor, opmath: torch.dtype) -> Tensor:
    """The magnitude of a maximum of ``ordered_bits``; 0 where there was no finite one."""
    above_infinity = LAYOUTS[opmath].above_infinity
    return (ordered.clamp(min=above_infinity) - above_infinity).view(opmath)


def next_bound(bound: Tensor, bound_decay: float, largest: Tensor) -> Tensor:
    """The estimate of the Lipschitz bound for next time."""
    return torch.maximum(bound * bound_decay, largest)
