# SPDX-License-Identifier: Apache-2.0
"""Bytes and time of a step against the number of hosts and the bandwidth of their links.

    seconds = step without exchange + computing of the exchange + bytes / bandwidth + messages in turn * latency

Nothing overlaps, links carry both directions at once, and every host has its own processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from csgd_cuda.distributed.codes import CODES
from csgd_cuda.distributed.coding import BYTES_PER_WORD, digits_per_word, words_for
from csgd_cuda.distributed.exchange import ring_bytes

from . import stream
from .exchanges import Exchange

_FLOAT = 4  # bytes
_HALF = {"fp16", "bf16"}
_MIN_COMPRESSION = 2  # PowerSGD's default: what shrinks less is sent as it is


@dataclass(frozen=True)
class Workload:
    """shapes of the parameters, and which of them each bucket of DistributedDataParallel holds."""

    shapes: list[list[int]]
    buckets: list[list[int]]

    @cached_property
    def numel(self) -> int:
        """Coordinates in all."""
        return sum(map(math.prod, self.shapes))


@dataclass(frozen=True)
class Costs:
    """Seconds, measured: a step without exchange; what an exchange computes; a message of a ring."""

    step: float
    exchange: float
    latency: float


def payload(exchange: Exchange, workload: Workload, hosts: int) -> int | None:
    """Bytes that a host sends in a step, without headers; None where it depends on the gradients."""
    if exchange.clip is not None or exchange.compact:
        return None
    total = 0
    for bucket in workload.buckets:
        shapes = [workload.shapes[k] for k in bucket]
        if exchange.kind == "powersgd":
            total += _powersgd_bytes(shapes, exchange.rank, hosts)
        elif exchange.kind == "calibrated":
            total += _calibrated_bytes([math.prod(shape) for shape in shapes], hosts, exchange.block)
        else:
            total += ring_bytes(sum(map(math.prod, shapes)), _FLOAT // 2 if exchange.kind in _HALF else _FLOAT, hosts)
    return total


def messages(exchange: Exchange, workload: Workload, hosts: int) -> int:
    """Messages that wait for one another: 2 (W - 1) in a ring all-reduce."""
    ring = 2 * (hosts - 1)
    # PowerSGD: three all-reduces, of what it does not compress, of P and of Q. Ours: the all-reduce of the bounds, and
    # of the codes, as of the blocks, an all-to-all, which sends to everyone at once, and an all-gather, half a ring.
    reduced = 1 if exchange.block is None else 2
    calibrated = ring + reduced * (min(1, ring) + ring // 2)
    of_bucket = {"powersgd": 3 * ring, "calibrated": calibrated}.get(exchange.kind, ring)
    return len(workload.buckets) * of_bucket


def seconds(exchange: Exchange, workload: Workload, hosts: int, bits_per_second: float, costs: Costs) -> float:
    """Of a step. bits_per_second: of a link, headers included."""
    sent = payload(exchange, workload, hosts)
    if sent is None:
        raise ValueError(f"the bytes of {exchange.label} depend on the gradients")
    wire = sent / stream.PAYLOAD_SHARE
    waits = messages(exchange, workload, hosts) * costs.latency
    return costs.step + costs.exchange + 8 * wire / bits_per_second + waits


def faster_between(
    exchange: Exchange, other: Exchange, workload: Workload, hosts: int, costs: Costs, other_costs: Costs
) -> tuple[float, float]:
    """Bits per second between which ``exchange`` is the faster one: from 0, or to Inf, or (0, 0) for nowhere."""
    saved = payload(other, workload, hosts) - payload(exchange, workload, hosts)
    extra = costs.exchange - other_costs.exchange
    extra += messages(exchange, workload, hosts) * costs.latency
    extra -= messages(other, workload, hosts) * other_costs.latency
    if saved <= 0 <= extra:
        return 0.0, 0.0
    if extra <= 0 <= saved:
        return 0.0, math.inf
    equal = 8 * saved / stream.PAYLOAD_SHARE / extra
    return (0.0, equal) if saved > 0 else (equal, math.inf)


def _calibrated_bytes(sizes: list[int], hosts: int, block: int | None) -> int:
    """The codes of all shards but the own one, the sums of the own shard to all others, a bound per parameter; half a
    byte per block, likewise there and back."""
    per_word = digits_per_word(CODES)
    shard = -(-sum(sizes) // (hosts * per_word)) * per_word
    words = shard // per_word + words_for(shard, 2 * hosts + 1)
    blocks = 0 if block is None else sum(-(-size // block) for size in sizes)
    exponents = 2 * -(-blocks // (2 * hosts))
    return (hosts - 1) * (words * BYTES_PER_WORD + exponents) + ring_bytes(len(sizes), _FLOAT, hosts)


def _powersgd_bytes(shapes: list[list[int]], rank: int, hosts: int) -> int:
    """P (rows x rank) and Q (columns x rank) of what this makes smaller; the rest in one all-reduce."""
    plain = rows = columns = 0
    for shape in shapes:
        n, m = shape[0], math.prod(shape[1:])
        r = min(n, m, rank)
        if (n + m) * r * _MIN_COMPRESSION < n * m:
            rows, columns = rows + n * r, columns + m * r
        else:
            plain += n * m
    return sum(ring_bytes(count, _FLOAT, hosts) for count in (plain, rows, columns))
