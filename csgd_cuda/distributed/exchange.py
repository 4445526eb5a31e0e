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
    put_outliers,
    scale_blocks,
    smallest_exponents,
    take_outliers,
    unpack_exponents,
    unpack_outliers,
)
from .codes import nearest, unit_of
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

    def messages_from_all(self, message: Tensor) -> list[Tensor]:
        """The message of every rank, uint8 of any length, in the order of the ranks."""
        return self.messages_between([message] * self.world_size)

    def messages_between(self, messages: list[Tensor]) -> list[Tensor]:
        """Sends message r, uint8 of any length, to rank r; the messages of all ranks to this one. Waits for a count."""
        own, others = messages[self.rank], [len(message) for message in messages]
        lengths = torch.tensor(others, device=own.device)
        from_ranks = torch.empty_like(lengths)
        dist.all_to_all_single(from_ranks, lengths, group=self.group)
        self.bytes_sent += (self.world_size - 1) * lengths.element_size()
        from_others = from_ranks.tolist()
        others[self.rank] = from_others[self.rank] = 0
        sent = torch.cat([message for rank, message in enumerate(messages) if rank != self.rank] or [own[:0]])
        received = own.new_empty(sum(from_others))
        dist.all_to_all_single(received, sent, from_others, others, group=self.group)
        self.bytes_sent += sum(others)
        parts = list(torch.split_with_sizes(received, from_others))
        parts[self.rank] = own
        return parts

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
    block: int | None, compact: bool = False, residuals: list[Tensor] | None = None,
) -> None:  # fmt: skip
    """Replaces gradients by estimates of their mean over the ranks.

    They are unbiased, but with residuals, which are added to the gradients first: codes are then the nearest ones, and
    the residuals become what codes and clipped coordinates of this rank do not stand for.

    Args:
        grads: contiguous, not empty, of one dtype and device; the same shapes on all ranks.
        indices: 0 ... 2^16 - 1, which parameter each belongs to.
        clip: None, or the bound in units of the RMS of a gradient (on the rank where that is largest).
        block: None, or how many consecutive coordinates are scaled together.
        compact: codes and sums travel as planes of bits where these take fewer bytes. Waits for the device.
        residuals: None, or float32 of the shapes of the gradients. Where a sum is not finite they stay as they are.
    """
    totals = [] if residuals is None else [grad + residual for grad, residual in zip(grads, residuals, strict=True)]
    for grad, total in zip(grads, totals, strict=bool(totals)):
        grad.copy_(total)
    sizes = wire.largest(torch.stack([_size(grad, clip) for grad in grads]))
    units = unit_of(sizes, wire.world_size, grads[0].dtype)
    bounds = units * wire.world_size
    outliers = _outliers_of_all(wire, grads, bounds) if clip is not None else []
    exponents: list[Tensor] = []
    if block is not None:
        exponents = _shared_exponents(wire, grads, sizes, units, block)
        for grad, of_grad in zip(grads, exponents, strict=True):
            scale_blocks(grad, block, of_grad, 1)
    if residuals is None:
        pair, second = divmod(wire.rank, 2)
        own = [index + (pair << 16) for index in indices]
        codes = coding.encode(grads, bounds, own, seed=seed, step=step, antithetic=bool(second))
    else:
        codes = torch.cat([nearest(grad, bound) for grad, bound in zip(grads, bounds, strict=True)])
        coding.decode(coding.pack(codes, 1), bounds, grads)  # what this rank's codes stand for
        _unscale(grads, exponents, block)
        if outliers:
            put_outliers(grads, outliers[wire.rank])
        for residual, total, sent in zip(residuals, totals, grads, strict=True):
            rest = total.sub_(sent)
            residual.copy_(torch.where(rest.isfinite(), rest, residual))
    rows = coding.pack(codes, wire.world_size)
    sums = _sums_of_written(wire, coding, rows) if compact else wire.reduce_shards(rows, coding.add)
    coding.decode(sums, units, grads)
    _unscale(grads, exponents, block)
    if any(len(of_rank.positions) for of_rank in outliers):
        add_mean(grads, outliers)


def _unscale(grads: list[Tensor], exponents: list[Tensor], block: int | None) -> None:
    """Divides blocks by the powers of two with which they were multiplied."""
    if block is not None:
        for grad, of_grad in zip(grads, exponents, strict=True):
            scale_blocks(grad, block, of_grad, -1)


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
    message = pack_outliers(take_outliers(grads, bounds))
    return [unpack_outliers(message, grads[0].dtype) for message in wire.messages_from_all(message)]


def _sums_of_written(wire: Wire, coding: Coding, rows: Tensor) -> Tensor:
    """What ``wire.reduce_shards(rows, coding.add)`` returns, in fewer bytes where most codes and sums are 0."""
    own = coding.add(coding.read_rows(wire.messages_between(coding.write_rows(rows, 1)), rows.shape[1], 1))
    (message,) = coding.write_rows(own.unsqueeze(0), wire.world_size)
    return coding.read_rows(wire.messages_from_all(message), len(own), wire.world_size)


def _shared_exponents(wire: Wire, grads: list[Tensor], sizes: Tensor, units: Tensor, block: int) -> list[Tensor]:
    """The exponents of each gradient's blocks, the smallest over the ranks."""
    each = zip(grads, sizes, units, strict=True)
    own = [block_exponents(grad, block, size, unit, wire.world_size) for grad, size, unit in each]
    lengths = [len(exponents) for exponents in own]
    packed = wire.reduce_shards(pack_exponents(torch.cat(own), wire.world_size), smallest_exponents)
    return list(torch.split_with_sizes(unpack_exponents(packed)[: sum(lengths)], lengths))
