# SPDX-License-Identifier: Apache-2.0
"""What makes codes less noisy: blocks of coordinates with bounds of their own, and outliers, which are not coded.

- Blocks: a coordinate's code has the variance |g| (T - |g|), and most of a gradient is far below T, its largest
  magnitude. A block of consecutive coordinates whose own largest magnitude is below T / 2^k is multiplied by 2^k before
  it is coded and divided by it after, both exactly: its bound is then T / 2^k, for half a byte a block on the wire.
- Outliers: coordinates beyond a clipped bound travel as they are, in a byte for the position, mostly, and the value.
  A rank's message is their number, the distances between them, in bytes, and then the values. A byte below 255 says how
  many coordinates lie between the last one and the next, 255 that at least so many do, and that another byte goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..reference.rule import square_root
from ..tensors import divided
from .codes import SIGNIFICANT_BITS

_IN_CACHE = 2**17  # coordinates
_MOST_EXPONENT = 15  # four bits; and 2^15 is a number of every dtype, and so is 2^-15
_MORE = 255  # in a byte of distances
_HEAD = 8  # bytes: the number of outliers
_NORM_LANES = 2**17  # partial sums of a norm


def block_sizes(grad: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block of a contiguous gradient of shape (n,), as float32 of shape (blocks,)."""
    full = grad.numel() // block * block
    rows = grad[:full].view(-1, block)
    at_once = max(1, 2 * _IN_CACHE // block) if grad.device.type == "cpu" else max(1, len(rows))
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
        size: float32, one element: the bound on which the ranks agreed, before it was rounded up; may be Inf.
        unit: float64, one element: T / W, which has so few significant bits that sums of codes are exact.
        world_size: W.

    Returns:
        uint8 of shape (blocks,), 0 ... 15.
    """
    of_block, of_size = torch.frexp(block_sizes(grad, block)), torch.frexp(size)
    fits = of_size.exponent - of_block.exponent - (of_block.mantissa > of_size.mantissa).to(torch.int32)
    fits = torch.where(of_block.mantissa == 0, _MOST_EXPONENT, fits)  # nothing but zeros
    # The last bit of unit / 2^k must not be worth less than the smallest number of the dtype, or sums would be rounded.
    info = torch.finfo(grad.dtype)
    smallest = torch.frexp(torch.tensor(info.tiny * info.eps, dtype=torch.float64)).exponent - 1
    bits = SIGNIFICANT_BITS[grad.dtype] - (world_size - 1).bit_length()
    exact = (torch.frexp(unit).exponent - bits - smallest).clamp(0, _MOST_EXPONENT)
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
    """The exponents that were packed, and the padding behind them: uint8 of any shape to uint8 of shape (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def smallest_exponents(packed: Tensor) -> Tensor:
    """The smallest over the rows, packed again: uint8 of shape (rows, bytes) to (bytes,)."""
    return (packed >> 4).amin(0) << 4 | (packed & 15).amin(0)


@dataclass
class Outliers:
    """Coordinates of one rank in its gradients, counted through them all.

    Attributes:
        positions: int64 of shape (n,), ascending.
        values: shape (n,), of the gradients' dtype.
    """

    positions: Tensor
    values: Tensor


def norm_of(grad: Tensor) -> Tensor:
    """In float64, of a contiguous gradient of shape (n,).

    torch's own sums come in an order of their own on each device. Here the squares of every ``_NORM_LANES``-th element
    are added up one after another, and these sums by halves.
    """
    shape = (2, min(_NORM_LANES, grad.numel()))
    sums, squares = torch.zeros(shape, dtype=torch.float64, device=grad.device).unbind()
    for part in grad.split(_NORM_LANES):  # type: ignore[no-untyped-call]
        own = squares[: part.numel()].copy_(part)
        sums[: part.numel()] += own.mul_(own)
    while (count := sums.numel()) > 1:
        half = count // 2
        halves = sums[:half] + sums[half : 2 * half]
        sums = halves if count % 2 == 0 else torch.cat([halves, sums[-1:]])
    return square_root(sums[0])


def take_outliers(grads: list[Tensor], bounds: Tensor) -> Outliers:
    """Sets the coordinates with ``|g| > bound`` to 0, and returns them. Waits for the device to count them.

    Args:
        grads: contiguous, of one dtype and device.
        bounds: of each, float64 of shape (len(grads),), numbers of the gradients' dtype or Inf.
    """
    beyond = torch.empty(sum(grad.numel() for grad in grads), dtype=torch.bool, device=bounds.device)
    begins = _begins(grads)
    for grad, bound, begin in zip(grads, bounds, begins, strict=False):
        at_once = _IN_CACHE if grad.device.type == "cpu" else max(1, grad.numel())
        for k in range(0, grad.numel(), at_once):
            part = grad[k : k + at_once]
            torch.gt(part.abs(), bound, out=beyond[begin + k : begin + k + part.numel()])
    positions = beyond.nonzero().squeeze(1)
    values = []
    for grad, begin, own in zip(grads, begins, _split(positions, begins), strict=False):
        values.append(grad[own - begin])
        grad[own - begin] = 0
    return Outliers(positions, torch.cat(values))


def _begins(grads: list[Tensor]) -> list[int]:
    """Where each gradient begins, counted through them all, and where the last one ends."""
    begins = [0]
    for grad in grads:
        begins.append(begins[-1] + grad.numel())
    return begins


def _split(positions: Tensor, begins: list[int]) -> list[Tensor]:
    """The ascending positions between each of ``begins`` and the next."""
    cuts = torch.searchsorted(positions, torch.tensor(begins, device=positions.device)).tolist()
    return [positions[begin:end] for begin, end in pairwise(cuts)]


def pack_outliers(outliers: Outliers) -> Tensor:
    """A message, uint8 of shape (bytes,); empty where there are none."""
    count = len(outliers.positions)
    if count == 0:
        return outliers.values.view(torch.uint8)
    start = outliers.positions.new_tensor([-1])
    between = torch.diff(outliers.positions, prepend=start) - 1
    more = between // _MORE
    ends = (more + 1).cumsum(0)
    distances = torch.full((int(ends[-1]),), _MORE, dtype=torch.uint8, device=ends.device)
    distances[ends - 1] = (between - _MORE * more).to(torch.uint8)
    head = torch.tensor([count], device=ends.device).view(torch.uint8)
    return torch.cat([head, distances, outliers.values.view(torch.uint8)])


def unpack_outliers(message: Tensor, dtype: torch.dtype) -> Outliers:
    """The outliers that were packed, given the dtype of the gradients."""
    if len(message) == 0:
        return Outliers(message.to(torch.int64), message.to(dtype))
    count = int(message[:_HEAD].clone().view(torch.int64))  # a view would have to be aligned
    steps, values = message[_HEAD:].tensor_split([len(message) - _HEAD - count * dtype.itemsize])
    ends = steps != _MORE
    positions = (steps.to(torch.int64) + ends).cumsum(0)[ends] - 1
    return Outliers(positions, values.clone().view(dtype))


def put_outliers(grads: list[Tensor], outliers: Outliers) -> None:
    """Sets the coordinates of the gradients that are outliers to their values."""
    for grad, own in zip(grads, _of_grads(outliers, _begins(grads)), strict=True):
        grad[own.positions] = own.values


def add_mean(grads: list[Tensor], of_ranks: list[Outliers]) -> None:
    """Adds the mean over the ranks of the outliers: in float64, in the order of the ranks; rounded to nearest."""
    begins = _begins(grads)
    of_grads = zip(*(_of_grads(outliers, begins) for outliers in of_ranks), strict=True)
    for grad, of_grad in zip(grads, of_grads, strict=True):
        at_once = _IN_CACHE if grad.device.type == "cpu" else max(1, grad.numel())
        parts = [*range(0, grad.numel(), at_once), grad.numel()]
        scratch = torch.zeros(min(at_once, grad.numel()), dtype=torch.float64, device=grad.device)
        of_parts = zip(*(_of_grads(outliers, parts) for outliers in of_grad), strict=True)
        for begin, of_part in zip(parts, of_parts, strict=False):
            _add_mean_to(grad[begin : begin + at_once], scratch, of_part)


def _of_grads(outliers: Outliers, begins: list[int]) -> list[Outliers]:
    """The outliers between each of ``begins`` and the next, with positions counted from there."""
    positions = _split(outliers.positions, begins)
    values = torch.split_with_sizes(outliers.values, [len(own) for own in positions])
    return [Outliers(own - begin, value) for own, begin, value in zip(positions, begins, values, strict=False)]


def _add_mean_to(grad: Tensor, scratch: Tensor, of_ranks: tuple[Outliers, ...]) -> None:
    """``add_mean`` for a gradient that is no longer than ``scratch``, which is zero before and after."""
    for outliers in of_ranks:
        scratch[outliers.positions] += outliers.values.to(torch.float64)  # no position occurs twice
    means = [divided(scratch[of.positions], len(of_ranks)).add_(grad[of.positions]) for of in of_ranks]
    for outliers, mean in zip(of_ranks, means, strict=True):
        grad[outliers.positions] = mean.to(grad.dtype)  # a coordinate of several ranks is set to one number
        scratch[outliers.positions] = 0
