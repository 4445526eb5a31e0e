# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in pure PyTorch, and the random draws made from it; mirrors csrc/core/philox.h.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

CALIBRATION_STREAM = 0  # does this coordinate move?
PARAM_STREAM = 1  # stochastic rounding of the parameter
MOMENTUM_STREAM = 2  # stochastic rounding of momentum_buffer or exp_avg
GRAD_STREAM = 3  # a layer's calibration of a gradient: is this coordinate passed on?
GRAD_ROUNDING_STREAM = 4  # stochastic rounding of a calibrated gradient
EXCHANGE_STREAM = 5  # the code of a gradient that goes to other processes
SECOND_MOMENT_STREAM = 6  # stochastic rounding of exp_avg_sq
BRANCH_STREAM = 7  # which branch of a filter a training forward pass uses

DRAW_RANGE = 2**16  # a draw is an integer in [0, DRAW_RANGE)
DRAWS_PER_CALL = 8

_LOW32 = 0xFFFFFFFF
_EVEN_LANES = 0x0000FFFF0000FFFF  # the first and third of the four 16-bit lanes of an int64

Counter: TypeAlias = tuple[Tensor, Tensor | int, Tensor | int, Tensor | int]


def philox4x32_10(counter: Counter, key: tuple[int, int]) -> list[Tensor]:
    """Four output words for a counter of four words and a key of two.

    Args:
        counter: four words that broadcast together, int64 tensors or ints, the first a tensor; in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        A list of four int64 tensors, elements in [0, 2^32).
    """
    shapes = [word.shape for word in counter if isinstance(word, Tensor)]
    shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    # All memory is allocated at once: malloc would return the memory freed in each round to the system and get it again
    # as pages filled with zeros, which takes a quarter of the time.
    memory = torch.empty((6, *shape), dtype=torch.int64, device=counter[0].device).unbind()
    c0, c1, c2, c3 = (
        place.copy_(word) if isinstance(word, torch.Tensor) else place.fill_(word)
        for place, word in zip(memory[:4], counter, strict=True)
    )
    free0, free1 = memory[4:]
    k0, k1 = key
    for _ in range(10):
        # The products wrap around as signed numbers; their bits are those of the unsigned ones. Their upper halves,
        # and the bits above the words c1 and c3, are masked once, before the next product.
        product0, product1 = torch.mul(c0, 0xD2511F53, out=free0), torch.mul(c2, 0xCD9E8D57, out=free1)
        c0 = torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW32)
        c2 = torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW32)
        c1, c3, free0, free1 = product1, product0, c1, c3
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return [c0, c1.bitwise_and_(_LOW32), c2, c3.bitwise_and_(_LOW32)]


def _draws_of_words(words: Sequence[Tensor]) -> Tensor:
    """The eight draws of each four words, along the last dimension: the words' low halves, then their high halves.

    Overwrites the words.
    """
    w0, w1, w2, w3 = words
    even = w2.bitwise_left_shift_(32).bitwise_or_(w0)  # lanes: low and high half of w0, low and high half of w2
    odd = w3.bitwise_left_shift_(32).bitwise_or_(w1)
    even_low, odd_low = torch.bitwise_and(even, _EVEN_LANES, out=w0), torch.bitwise_and(odd, _EVEN_LANES, out=w1)
    even_high, odd_high = even.bitwise_right_shift_(16).bitwise_and_(_EVEN_LANES), odd.bitwise_xor_(odd_low)
    low, high = odd_low.bitwise_left_shift_(16).bitwise_or_(even_low), even_high.bitwise_or_(odd_high)
    # On a little-endian machine, as all are that torch has packages for, the lanes now lie in order.
    return torch.stack((low, high), dim=-1).view(torch.uint16).flatten(-2)


def draws(
    begin: int, end: int, *, seed: int, stream: int | Tensor, index: Tensor | int, step: Tensor, device: torch.device
) -> Tensor:
    """The 16-bit draws of the elements begin ... end - 1, as uint16 of shape (..., end - begin).

    Args:
        begin, end: positions in the parameter's memory order; begin is a multiple of 8.
        seed: 0 ... 2^64 - 1.
        stream: what the draws are for, one of the constants above; for several int64 of shape (streams, 1, 1).
        index: position of the parameter over all param groups; for several an int64 tensor of shape (parameters, 1).
        step: int64 tensor of one element or of that shape, the steps applied before this one.
    """
    first, last = begin // DRAWS_PER_CALL, -(-end // DRAWS_PER_CALL)
    call = torch.arange(first, last, device=device)
    # The upper half is one number, but for the calls on both sides of a multiple of 2^32.
    upper = first >> 32 if first >> 32 == (last - 1) >> 32 else call >> 32
    words = philox4x32_10((call & _LOW32, upper | (stream << 28), index, step & _LOW32), (seed & _LOW32, seed >> 32))
    return _draws_of_words(words)[..., : end - begin]


def draws_at(positions: Tensor, *, seed: int, stream: int | Tensor, index: Tensor | int, step: Tensor) -> Tensor:
    """The 16-bit draws of single elements: as ``draws``, for an int64 tensor of positions in any order; int32."""
    call = positions >> 3
    words = philox4x32_10(
        (call & _LOW32, (call >> 32) | (stream << 28), index, step & _LOW32), (seed & _LOW32, seed >> 32)
    )
    shape = words[0].shape
    draws_of_call = _draws_of_words(words).view(*shape, DRAWS_PER_CALL)
    return draws_of_call.to(torch.int32).gather(-1, (positions & 7).expand(shape).unsqueeze(-1)).squeeze(-1)
