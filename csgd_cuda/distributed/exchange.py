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
        """The maximum over the ranks, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        self.bytes_sent += ring_bytes(values.numel(), values.element_size(), self.world_size)
        return values

    def from_all(self, tensor: Tensor) -> Tensor:
        """What every rank has, stacked in the order of the ranks."""
        out = tensor.new_empty((self.world_size, *tensor.shape))
        dist.all_gather(list(out.unbind()), tensor.contiguous(), group=self.group)
        self.bytes_sent += (self.world_size - 1) * tensor.nbytes
        return out

    def reduce_shards(self, shards: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Row r of ``shards`` goes to rank r, which reduces the rows it gets to one; all get all of these, as rows."""
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards, group=self.group)
        self.bytes_sent += (self.world_size - 1) * shards[0].nbytes
        return self.from_all(reduce(received))


def ring_bytes(numel: int, element_size: int, world_size: int) -> int:
    """What a rank sends in a ring all-reduce: twice all shards but one."""
    return 2 * (world_size - 1) * -(-numel // world_size) * element_size


@dataclass
class Coordinates:
    """Coordinates beyond the bound, of one rank: positions int32 and values in the gradients' dtype, shape (count,)."""

    positions: Tensor
    values: Tensor


def average_as_codes(
    wire: Wire, coding: Coding, grads: list[Tensor], indices: list[int], *, seed: int, step: int, clip: float | None
) -> None:
    """Replaces gradients by unbiased estimates of their mean over the ranks.

    Args:
        grads: contiguous, not empty, of one dtype and device; the same shapes on all ranks.
        indices: 0 ... 2^16 - 1, which parameter each belongs to.
        clip: None, or the bound in units of the RMS of a gradient (of the rank where that is largest).
    """
    sizes = wire.largest(torch.stack([_size(grad, clip) for grad in grads]))
    units = unit_of(sizes, wire.world_size, grads[0].dtype)
    bounds = units * wire.world_size
    clipped: list[Coordinates] = []
    if clip is not None:
        beyond = [grad.abs() > bound for grad, bound in zip(grads, bounds, strict=True)]
        clipped = _from_all(wire, torch.cat(grads), torch.cat(beyond))
        for grad, mask in zip(grads, beyond, strict=True):
            grad.masked_fill_(mask, 0)
    codes = coding.encode(grads, bounds, [index + (wire.rank << 16) for index in indices], seed=seed, step=step)
    coding.decode(wire.reduce_shards(coding.pack(codes, wire.world_size), coding.add), units, grads)
    if clipped:
        _add_mean(grads, clipped)


def average_plainly(wire: Wire, grads: list[Tensor]) -> None:
    """Replaces gradients by their mean over the ranks, added up in float64 and rounded once."""
    flat = torch.cat(grads)
    shard = -(-flat.numel() // wire.world_size)
    shards = torch.nn.functional.pad(flat, (0, wire.world_size * shard - flat.numel())).view(wire.world_size, shard)
    means = wire.reduce_shards(shards, lambda rows: rows.mean(0, dtype=torch.float64).to(flat.dtype))
    parts = torch.split_with_sizes(means.flatten()[: flat.numel()], [grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part)


def _size(grad: Tensor, clip: float | None) -> Tensor:
    """What this rank wants as T, float32; Inf where the gradient is not finite. MAX may drop a NaN, but not an Inf."""
    low, high = torch.aminmax(grad)  # one pass, where abs() and amax() take three
    size = torch.maximum(-low, high).abs().to(torch.float32)
    if clip is not None:
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        size = torch.minimum(size, (norm * (clip / grad.numel() ** 0.5)).to(torch.float32))
    return size.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _from_all(wire: Wire, flat: Tensor, chosen: Tensor) -> list[Coordinates]:
    """The chosen coordinates of each rank; empty where no rank has one. Waits for the device to count them."""
    positions = chosen.nonzero().squeeze(1)
    counts = wire.from_all(torch.tensor([positions.numel()], device=flat.device)).flatten().tolist()
    most = max(counts)
    if most == 0:
        return []
    padding = (0, most - positions.numel())
    all_positions = wire.from_all(torch.nn.functional.pad(positions.to(torch.int32), padding))
    all_values = wire.from_all(torch.nn.functional.pad(flat[positions], padding))
    return [Coordinates(all_positions[r, :count], all_values[r, :count]) for r, count in enumerate(counts)]


def _add_mean(grads: list[Tensor], clipped: list[Coordinates]) -> None:
    """Adds the mean of what was not coded, in float64 and in the order of the ranks."""
    sizes = [grad.numel() for grad in grads]
    extra = torch.zeros(sum(sizes), dtype=torch.float64, device=grads[0].device)
    for of_rank in clipped:
        extra[of_rank.positions.to(torch.int64)] += of_rank.values.to(torch.float64)  # no position occurs twice
    extra /= len(clipped)
    for grad, part in zip(grads, torch.split_with_sizes(extra, sizes), strict=True):
        grad.copy_(part.add_(grad))
