# SPDX-License-Identifier: Apache-2.0
"""Rows of sums that are mostly 0, or close to it, in fewer bits: as planes of bits, each of what the last one leaves.

A sum s of W codes, -W ... W (for W = 1 a code), takes the bits

- whether any of the 4 sums beside it is not 0 (one bit for the four); where one is,
- whether it is not 0; where it is not,
- its sign, whether |s| > 1, where it is, whether |s| > 2, and so on up to |s| > W - 1.

All bits of one kind are a plane, in the order of the sums, eight to a byte, the first one lowest. How long a plane is
follows from the ones before it, so a row needs no header. Every plane is a selection from one before it, which a GPU
makes by a prefix sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4  # sums
_BYTE = 8  # bits


def to_planes(sums: Tensor, most: int) -> Tensor:
    """A row of sums as bytes.

    Args:
        sums: integers in [0, 2 most], shape (count,): sums of W codes plus W, with W = ``most``.

    Returns:
        uint8 of shape (bytes,).
    """
    values = sums.to(torch.int64) - most
    groups = torch.nn.functional.pad(values != 0, (0, -len(values) % GROUP)).view(-1, GROUP)
    occupied = groups.any(1)
    values = values[values != 0]
    planes = [occupied, groups[occupied].flatten(), values > 0]
    values = values.abs()
    for size in range(1, most):
        if not len(values):
            break
        larger = values > size
        planes.append(larger)
        values = values[larger]
    return torch.cat([_bytes_of(plane) for plane in planes])


def from_planes(message: Tensor, count: int, most: int) -> Tensor:
    """The ``count`` sums that were made to planes: uint8 of shape (count,), int64 where 2 ``most`` exceeds 255.

    Raises:
        ValueError: the message is longer or shorter than its planes.
    """
    at = 0

    def plane(bits: int) -> Tensor:
        nonlocal at
        begin, at = at, at - -bits // _BYTE
        return _bits_of(message[begin:at], bits)

    occupied = plane(-(-count // GROUP))
    groups = torch.zeros(len(occupied), GROUP, dtype=torch.bool, device=message.device)
    groups[occupied] = plane(int(occupied.sum()) * GROUP).view(-1, GROUP)
    places = groups.flatten()[:count].nonzero().squeeze(1)
    positive = plane(len(places))
    sizes = torch.ones(len(places), dtype=torch.int64, device=message.device)
    left = torch.arange(len(places), device=message.device)
    for _ in range(1, most):
        left = left[plane(len(left))]
        sizes[left] += 1
    if at != len(message):
        raise ValueError(f"a row of {count} sums has {len(message)} bytes, its planes have {at}")
    out = torch.full((count,), most, dtype=torch.uint8 if 2 * most < 256 else torch.int64, device=message.device)
    out[places] = (most + torch.where(positive, sizes, -sizes)).to(out.dtype)
    return out


def _bytes_of(bits: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(bits, (0, -len(bits) % _BYTE)).view(-1, _BYTE)
    powers = 2 ** torch.arange(_BYTE, device=bits.device)
    return (rows * powers).sum(1).to(torch.uint8)


def _bits_of(packed: Tensor, count: int) -> Tensor:
    if len(packed) != -(-count // _BYTE):
        raise ValueError(f"a plane of {count} bits has {len(packed)} bytes; the row is cut off")
    bits = packed[:, None] >> torch.arange(_BYTE, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[:count].to(torch.bool)
