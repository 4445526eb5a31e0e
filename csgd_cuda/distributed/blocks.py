# SPDX-License-Identifier: Apache-2.0
"""Blocks of a gradient brought up to the bound by powers of two: less variance, for half a byte a block on the wire.

A coordinate's code has the variance |g| (T - |g|), and most of a gradient is far below T, its largest magnitude. A
block of consecutive coordinates whose own largest magnitude is below T / 2^k is multiplied by 2^k before it is coded
and divided by it after, both exactly: its bound is then T / 2^k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import SIGNIFICANT_BITS

_IN_CACHE = 2**18  # elements
_MOST = 15  # four bits; and 2^15 is a number of every dtype, and so is 2^-15


def block_sizes(grad: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block of a contiguous gradient of shape (n,), as float32 of shape (blocks,)."""
    full = grad.numel() // block * block
    rows = grad[:full].view(-1, block)
    at_once = max(1, _IN_CACHE // block) if grad.device.type == "cpu" else max(1, len(rows))
    parts = [_largest_of_rows(part) for part in rows.split(at_once)]  # type: ignore[no-untyped-call]
    if full < grad.numel():
        parts.append(_largest_of_rows(grad[full:].view(1, -1)))
    return torch.cat(parts).to(torch.float32)


def _largest_of_rows(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, by halves: torch reduces short rows several times more slowly."""
    rows = rows.abs()
    while (width := rows.shape[1]) > 1:
        half = (width + 1) // 2
        rows = torch.maximum(rows[:, :half], rows[:, width - half :])
    return rows[:, 0]


def block_exponents(grad: Tensor, block: int, size: Tensor, unit: Tensor, world_size: int) -> Tensor:
    """k of each block: the largest with which its magnitudes times 2^k are at most ``size``, and sums remain exact.

    Args:
        grad: contiguous, shape (n,).
        size: float32, one element: what the ranks have agreed on as the bound before it was rounded up; may be Inf.
        unit: float64, one element: T / W, which has so few significant bits that sums of codes are exact.
        world_size: W.

    Returns:
        uint8 of shape (blocks,), 0 ... 15.
    """
    of_block, of_size = torch.frexp(block_sizes(grad, block)), torch.frexp(size)
    fits = of_size.exponent - of_block.exponent - (of_block.mantissa > of_size.mantissa).to(torch.int32)
    fits = torch.where(of_block.mantissa == 0, _MOST, fits)  # nothing but zeros
    # The last place of unit / 2^k must not lie below that of the smallest number of the dtype.
    info = torch.finfo(grad.dtype)
    smallest = torch.frexp(torch.tensor(info.tiny * info.eps, dtype=torch.float64)).exponent - 1
    bits = SIGNIFICANT_BITS[grad.dtype] - (world_size - 1).bit_length()
    exact = (torch.frexp(unit).exponent - bits - smallest).clamp(0, _MOST)
    most = torch.where(size.isfinite() & (size > 0), exact, 0)
    return torch.minimum(fits, most).clamp_(min=0).to(torch.uint8)


def scale_blocks(grad: Tensor, block: int, exponents: Tensor, sign: int) -> None:
    """Multiplies each block by 2^(sign k), in place."""
    # From its bits: torch.ldexp takes powers, which need not be exact.
    factors = ((sign * exponents.to(torch.int32) + 127) << 23).view(torch.float32).to(grad.dtype)
    full = grad.numel() // block * block
    grad[:full].view(-1, block).mul_(factors[: full // block, None])
    if full < grad.numel():
        grad[full:].mul_(factors[-1])


def pack_exponents(exponents: Tensor, rows: int) -> Tensor:
    """Two exponents a byte: uint8 of shape (n,) to uint8 of shape (rows, bytes); absent ones are 0."""
    row = -(-len(exponents) // (2 * rows))
    pairs = torch.nn.functional.pad(exponents, (0, 2 * rows * row - len(exponents))).view(rows, row, 2)
    return pairs[..., 0] << 4 | pairs[..., 1]


def unpack_exponents(packed: Tensor) -> Tensor:
    """What was packed, and what it was padded with: uint8 of any shape to uint8 of shape (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def smallest_exponents(packed: Tensor) -> Tensor:
    """The smallest over the rows, packed again: uint8 of shape (rows, bytes) to (bytes,)."""
    return (packed >> 4).amin(0) << 4 | (packed & 15).amin(0)
