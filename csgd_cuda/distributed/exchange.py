# SPDX-License-Identifier: Apache-2.0
"""The mean over all ranks of gradients that travel as codes, or as they are; the same bits on every rank.

Each rank adds up one shard, in the order of the ranks: what comes out depends on neither the sharding nor the buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import divided
from .clip_and_block import (
    Outliers,
    add_mean,
    block_exponents,
    norm_of,
    pack_exponents,
    pack_outliers,
    scale_blocks,
    smallest_exponents,
    take_outliers,
    unpack_exponents,
    unpack_outliers,
)
from .codes import unit_of
from .coding import Coding


@dataclass
class Wire:
    """A process group, and the bytes that this rank has sent to the others of it."""

    group: dist.ProcessGroup | None = None
    bytes_sent: int = 0
    world_size: int = field(init=False)
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        self.world_size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)

    def largest(self, values: Tensor) -> Tensor:
        """Replaces values by their maximum over the ranks."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        self.bytes_sent += ring_bytes(values.numel(), values.element_size(), self.world_size)
        return values

    def from_all(self, tensor: Tensor) -> Tensor:
        """The tensor of every rank, stacked in the order of the ranks."""
        out = tensor.new_empty((self.world_size, *tensor.shape))
        dist.all_gather(list(out.unbind()), tensor.contiguous(), group=self.group)
        self.bytes_sent += (self.world_size - 1) * tensor.nbytes
        return out

    def messages_from_all(self, message: Tensor, lengths: list[int]) -> list[Tensor]:
        """The message of every rank, uint8 of shape (lengths[rank],), in the order of the ranks."""
        own = self.rank
        to_others = [0 if rank == own else len(message) for rank in range(self.world_size)]
        from_others = [0 if rank == own else length for rank, length in enumerate(lengths)]
        received = message.new_empty(sum(from_others))
        dist.all_to_all_single(received, message.repeat(self.world_size - 1), from_others, to_others, group=self.group)
        self.bytes_sent += sum(to_others)
        messages = list(torch.split_with_sizes(received, from_others))
        messages[own] = message
        return messages

    def reduce_shards(self, shards: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Sends row r of ``shards`` to rank r, which reduces its rows to one; returns the reduced rows of all ranks."""
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards, group=self.group)
        self.bytes_sent += (self.world_size - 1) * shards[0].nbytes
        return self.from_all(reduce(received))


def ring_bytes(numel: int, element_size: int, world_size: int) -> int:
    """The bytes that a rank sends in a ring all-reduce: twice all shards but one."""
    return 2 * (world_size - 1) * -(-numel // world_size) * element_size


def average_as_codes(
    wire: Wire, coding: Coding, grads: list[Tensor], indices: list[int], *, seed: int, step: int, clip: float | None,
    block: int | None,
) -> None:  # fmt: skip
    """Replaces gradients by unbiased estimates of their mean over the ranks.

    Args:
        grads: contiguous, not empty, of one dtype and device; the same shapes on all ranks.
        indices: 0 ... 2^16 - 1, which parameter each belongs to.
        clip: None, or the bound in units of the RMS of a gradient (on the rank where that is largest).
        block: None, or how many consecutive coordinates are scaled together.
    """
    sizes = wire.largest(torch.stack([_size(grad, clip) for grad in grads]))
    units = unit_of(sizes, wire.world_size, grads[0].dtype)
    bounds = units * wire.world_size
    outliers = _outliers_of_all(wire, grads, bounds) if clip is not None else []
    exponents: list[Tensor] = []
    if block is not None:
        exponents = _shared_exponents(wire, grads, sizes, units, block)
        for grad, of_grad in zip(grads, exponents, strict=True):
            scale_blocks(grad, block, of_grad, 1)
    pair, second = divmod(wire.rank, 2)
    own = [index + (pair << 16) for index in indices]
    codes = coding.encode(grads, bounds, own, seed=seed, step=step, antithetic=bool(second))
    coding.decode(wire.reduce_shards(coding.pack(codes, wire.world_size), coding.add), units, grads)
    if block is not None:
        for grad, of_grad in zip(grads, exponents, strict=True):
            scale_blocks(grad, block, of_grad, -1)
    if outliers:
        add_mean(grads, outliers)


def average_plainly(wire: Wire, grads: list[Tensor]) -> None:
    """Replaces gradients by their mean over the ranks, added up in float64 and rounded once."""
    flat = torch.cat(grads)
    shard = -(-flat.numel() // wire.world_size)
    shards = torch.nn.functional.pad(flat, (0, wire.world_size * shard - flat.numel())).view(wire.world_size, shard)
    means = wire.reduce_shards(shards, _mean)
    parts = torch.split_with_sizes(means.flatten()[: flat.numel()], [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part)


def _mean(rows: Tensor) -> Tensor:
    """The mean of the ranks' rows, in their order: that of torch's own mean() differs between devices."""
    total = rows[0].to(torch.float64, copy=True)
    for row in rows[1:]:
        total += row
    return divided(total, len(rows)).to(rows.dtype)


def _size(grad: Tensor, clip: float | None) -> Tensor:
    """This rank's proposal for T, float32; Inf where the gradient is not finite: MAX may drop a NaN, but not an Inf."""
    low, high = torch.aminmax(grad)  # one pass, where abs() and amax() take three
    size = torch.maximum(-low, high).abs().to(torch.float32)
    if clip is not None:
        size = torch.minimum(size, (norm_of(grad) * (clip / grad.numel() ** 0.5)).to(torch.float32))
    return size.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _outliers_of_all(wire: Wire, grads: list[Tensor], bounds: Tensor) -> list[Outliers]:
    """Takes the coordinates beyond the bounds out of the gradients; those of each rank, or [] where no rank has any."""
    message, distances = pack_outliers(take_outliers(grads, bounds))
    sizes = wire.from_all(torch.tensor([len(message), distances], device=message.device)).tolist()
    lengths = [length for length, _ in sizes]
    if not any(lengths):
        return []
    messages = zip(wire.messages_from_all(message, lengths), sizes, strict=True)
    return [unpack_outliers(message, distances, grads[0].dtype) for message, (_, distances) in messages]


def _shared_exponents(wire: Wire, grads: list[Tensor], sizes: Tensor, units: Tensor, block: int) -> list[Tensor]:
    """The exponents of each gradient's blocks, the smallest over the ranks."""
    each = zip(grads, sizes, units, strict=True)
    own = [block_exponents(grad, block, size, unit, wire.world_size) for grad, size, unit in each]
    lengths = [len(exponents) for exponents in own]
    packed = wire.reduce_shards(pack_exponents(torch.cat(own), wire.world_size), smallest_exponents)
    return list(torch.split_with_sizes(unpack_exponents(packed)[: sum(lengths)], lengths))
