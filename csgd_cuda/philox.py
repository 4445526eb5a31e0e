# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 in pure PyTorch, and the random draws of CSGD made from it; mirrors csrc/core/philox.h.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch

CALIBRATION_STREAM = 0  # does this coordinate move?
PARAM_STREAM = 1  # stochastic rounding of the parameter
MOMENTUM_STREAM = 2  # stochastic rounding of the momentum buffer

DRAW_RANGE = 2**16  # a draw is an integer in [0, DRAW_RANGE)
DRAWS_PER_CALL = 8

_LOW32 = 0xFFFFFFFF


def _multiply(factor, word):
    """High and low 32 bits of factor * word, for 32-bit words held in int64 tensors."""
    # The product wraps around as a signed number; masked, its bits are those of the unsigned one.
    product = word * factor
    return (product >> 32).bitwise_and_(_LOW32), product.bitwise_and_(_LOW32)


def philox4x32_10(counter, key):
    """Four output words for a counter of four words and a key of two.

    Args:
        counter: four int64 tensors that broadcast together, each element in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        A list of four int64 tensors, elements in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return [c0, c1, c2, c3]


def draws(begin, end, *, seed, stream, index, step, device):
    """The 16-bit draws of the elements begin ... end - 1 of a parameter, as int64 of shape (end - begin,).

    Args:
        begin, end: positions in the parameter's memory order; begin is a multiple of 8.
        seed: 0 ... 2^64 - 1.
        stream: CALIBRATION_STREAM, PARAM_STREAM or MOMENTUM_STREAM.
        index: position of the parameter over all param groups.
        step: int64 tensor with one element on ``device``, the steps applied before this one.
    """
    block = torch.arange(begin // DRAWS_PER_CALL, -(-end // DRAWS_PER_CALL), device=device)
    counter = (
        block & _LOW32,
        (block >> 32) | (stream << 28),
        torch.full((), index, dtype=torch.int64, device=device),
        step.reshape(()) & _LOW32,
    )
    words = torch.stack(philox4x32_10(counter, (seed & _LOW32, seed >> 32)), dim=1)
    # Eight lanes to a block: the low halves of the four words, then their high halves.
    return torch.cat((words & 0xFFFF, words >> 16), dim=1).view(-1)[: end - begin]
