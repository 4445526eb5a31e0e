# SPDX-License-Identifier: Apache-2.0
"""Gradients as codes -1, 0, +1 of one magnitude T: the bound, and an estimate that is unbiased without any rounding.

The proof is in docs/exchange.md. Its two steps: a code is sign(g) exactly where U T < |g|, for a uniform real number U
whose digits in base 2^16 are drawn until the comparison is decided; and T is W times a number of so few bits that
every sum of W codes times T / W is a floating-point number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.philox import DRAW_RANGE, EXCHANGE_STREAM, draws, draws_at
from ..tensors import divided

CODES = 3  # -1, 0, +1, stored as 0, 1, 2
ZERO_CODE = 1
SIGNIFICANT_BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

_FLOAT64_BITS = 53
_CODED_AT_ONCE = 2**20  # coordinates: they take some 100 bytes each on the way
_DIGIT_SHIFT = 40  # the digit k of U for coordinate i is the draw at position i + k * 2^40


def most_ranks(dtype: torch.dtype) -> int:
    """The largest number of processes whose sums of codes are exact in this dtype."""
    return int(2 ** (SIGNIFICANT_BITS[dtype] - 1))


def unit_of(size: Tensor, world_size: int, dtype: torch.dtype) -> Tensor:
    """T / W: the smallest number t of few enough bits with W t >= size.

    t has ceil(log2 W) significant bits less than dtype, so that k t is a number of dtype for all k = 0 ... W.

    Args:
        size: float32, >= 0, of any shape; may be Inf.
        world_size: W, at most ``most_ranks(dtype)``.
        dtype: float32, bfloat16 or float16, that of the gradients.

    Returns:
        float64 of that shape. W t is a float32 (of dtype, where it does not overflow); Inf where size is, or where
        no such t is finite.
    """
    keep = SIGNIFICANT_BITS[dtype] - (world_size - 1).bit_length()
    below = (1 << (_FLOAT64_BITS - keep)) - 1  # the bits to drop, by rounding up
    quotient = divided(size.to(torch.float64), world_size)
    t = ((quotient.view(torch.int64) + below) & ~below).view(torch.float64)
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps  # subnormal numbers are its multiples
    return (t * (1 / smallest)).ceil_().mul_(smallest)  # a power of two


def encode(
    grad: Tensor, bound: Tensor, *, seed: int, index: int, step: Tensor, antithetic: bool = False
) -> Tensor:  # fmt: skip
    """The codes of a gradient, plus 1: sign(g) with probability ``|g| / bound``, exactly, else 0.

    The result is defined by exact arithmetic; how it is computed cannot change it.

    Args:
        grad: float32, bfloat16 or float16, contiguous, shape (n,), n <= 2^40, ``|g| <= bound``.
        bound: T, float64 with one element, of at most 24 significant bits.
        seed: 0 ... 2^64 - 1.
        index: 0 ... 2^32 - 1, different for each gradient and pair of processes, so that their draws differ.
        step: int64 tensor with one element.
        antithetic: takes 1 - U for U, as one process of each pair does; a negative coordinate takes the other one of
            the two. The codes of the one process then fall as U grows and those of the other rise, so that their sum
            varies less than that of two codes with draws of their own.

    Returns:
        uint8 of shape (n,): 0, 1 or 2 for -1, 0, +1. All 1 where bound is 0; arbitrary where bound is not finite.
    """
    out = torch.empty(grad.numel(), dtype=torch.uint8, device=grad.device)
    which = {"seed": seed, "stream": EXCHANGE_STREAM, "index": index, "step": step}
    for begin in range(0, grad.numel(), _CODED_AT_ONCE):
        part = grad[begin : begin + _CODED_AT_ONCE]
        end = begin + part.numel()
        digit, rest = _next_digit(part.abs().to(torch.float64), bound)
        complement = part.signbit() != antithetic
        drawn = draws(begin, end, device=grad.device, **which)  # type: ignore[arg-type]
        difference = digit - _complemented(drawn, complement)
        tied = ((difference == 0) & (rest > 0)).nonzero().squeeze(1)
        moves = difference.clamp_(0, 1)
        moves[tied] = _decided(rest[tied], bound, begin + tied, complement[tied], which)
        out[begin:end] = torch.copysign(moves, part.to(torch.float64)).add_(ZERO_CODE)
    return out


def nearest(grad: Tensor, bound: Tensor) -> Tensor:
    """The codes of a gradient, plus 1, without draws: sign(g) where ``|g| >= bound / 2``, else 0.

    Args and result are those of ``encode``. What is left of a coordinate is no larger than the coordinate.
    """
    half = (bound / 2).to(grad.dtype)
    return (grad >= half).to(torch.uint8).add_(ZERO_CODE).sub_((grad <= -half).to(torch.uint8))


def _next_digit(size: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """A step of the long division of size by bound: size * 2^16 = digit * bound + rest, all exact in float64.

    The numbers have 24 significant bits, and size <= bound. A quotient that is not an integer is further from one than
    2^-25, far more than its rounding error, so its floor is right; and the rest is again a number of 24 bits.
    """
    scaled = size * DRAW_RANGE
    digit = (scaled / bound).floor_().nan_to_num_(nan=0.0)
    return digit, scaled - digit * bound


def _complemented(digits: Tensor, where: Tensor) -> Tensor:
    """Digits of U, or of 1 - U ``where`` it holds, as float64."""
    digits = digits.to(torch.float64)
    return torch.where(where, DRAW_RANGE - 1 - digits, digits)


def _decided(
    rest: Tensor, bound: Tensor, positions: Tensor, complement: Tensor, which: dict[str, object]
) -> Tensor:  # fmt: skip
    """1.0 or 0.0 for the few coordinates (1 in 2^16) whose first digit was a tie: further digits decide."""
    moves = torch.zeros_like(rest)
    waiting = torch.arange(rest.numel(), device=rest.device)
    level = 0
    while waiting.numel():
        level += 1
        digit, rest = _next_digit(rest, bound)
        drawn = draws_at(positions[waiting] + (level << _DIGIT_SHIFT), **which)  # type: ignore[arg-type]
        difference = digit - _complemented(drawn, complement[waiting])
        moves[waiting] = difference.clamp(0, 1)
        tied = (difference == 0) & (rest > 0)
        waiting, rest = waiting[tied], rest[tied]
    return moves
