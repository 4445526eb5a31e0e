# SPDX-License-Identifier: Apache-2.0
"""Small whole numbers packed into 32-bit words, in pure PyTorch.

A word holds as many digits of base ``radix`` as fit: 20 codes of three values (1.6 bits each, where two bits would
hold four values), 13 sums of two ranks (2.5 bits) or 10 sums of four (3.2 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTES_PER_WORD = 4
_WORD_RANGE = 2**32


def digits_per_word(radix: int) -> int:
    """The largest k with radix^k <= 2^32.

    Raises:
        ValueError: ``radix`` is not in 2 ... 2^32.
    """
    if not 2 <= radix <= _WORD_RANGE:
        raise ValueError(f"radix must be in 2 ... 2^32, got {radix}")
    count, power = 0, radix
    while power <= _WORD_RANGE:
        count, power = count + 1, power * radix
    return count


def words_for(count: int, radix: int) -> int:
    """How many words hold ``count`` digits."""
    return -(-count // digits_per_word(radix))


def pack(digits: Tensor, radix: int) -> Tensor:
    """Each row of digits as words: digit j of word w is the row's digit j * words + w, absent ones are 0.

    With that order neighbours in memory belong to neighbouring words, for vector units and GPUs.

    Args:
        digits: integers in [0, radix), shape (rows, count).

    Returns:
        int32 of shape (rows, words_for(count, radix)), the bits of unsigned words.
    """
    rows, count = digits.shape
    places, words = digits_per_word(radix), words_for(count, radix)
    padded = torch.nn.functional.pad(digits, (0, places * words - count)).view(rows, places, words)
    value = torch.zeros(rows, words, dtype=torch.int64, device=digits.device)
    for place in range(places - 1, -1, -1):
        value.mul_(radix).add_(padded[:, place])
    return value.to(torch.int32)


def unpack(words: Tensor, radix: int, count: int) -> Tensor:
    """What was packed.

    Args:
        words: int32 of shape (rows, words_for(count, radix)).

    Returns:
        Digits of shape (rows, count): uint8 where the radix allows it, else int64.
    """
    places = digits_per_word(radix)
    dtype = torch.uint8 if radix <= 256 else torch.int64
    out = torch.empty(words.shape[0], places, words.shape[1], dtype=dtype, device=words.device)
    # float64 divides vectors, int64 does not; the floor of a quotient of integers below 2^53 is exact.
    value = words.to(torch.int64).bitwise_and_(_WORD_RANGE - 1).to(torch.float64)
    for place in range(places):
        quotient = (value / radix).floor_()
        out[:, place] = value.sub_(quotient, alpha=radix)
        value = quotient
    return out.flatten(1)[:, :count]
