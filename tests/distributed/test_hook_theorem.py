# SPDX-License-Identifier: Apache-2.0
"""The theorem of docs/exchange.md through the whole exchange, by enumeration of all draws of all ranks."""

from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

from csgd_cuda.distributed import codes

from .launch import exchanged, run, with_hook

PLACES = 16  # draws that are enumerated for each pair of ranks


def pairs_of(world_size):
    return -(-world_size // 2)


def mean_over_all_draws(rank, sixteenths, compact):
    """Sums over all combinations of the draws of pairs of ranks, a coordinate for each.

    The draws are multiples of 2^12, and so are the thresholds: |g| is a multiple of T / 16.
    """
    pair, combinations = rank // 2, PLACES ** pairs_of(dist.get_world_size())

    def enumerated(begin, end, *, index, **_):
        assert index >> 16 == pair
        place = torch.arange(begin, end) // PLACES**pair % PLACES
        return place * (2**16 // PLACES)

    codes.draws = enumerated
    model, _ = with_hook([(combinations + 1,)] * len(sixteenths), fused=False, compact=compact)
    grads = []
    for of_ranks in sixteenths:
        grad = torch.full((combinations + 1,), 0.75 * of_ranks[rank] / 16)
        grad[-1] = 0.75  # so that T is 0.75
        grads.append(grad)
    return [out[:combinations] for out in exchanged(model, grads)]


@pytest.mark.parametrize("compact", [False, True], ids=["words", "planes"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_mean_over_all_draws_of_all_ranks_is_the_mean_gradient(world_size, compact):
    """The theorem, through the whole exchange: exact fractions, no luck of a sample."""
    sixteenths = [(16, -16, 5, 1), (1, 2, 3, 4), (-7, 7, 0, 3), (15, 16, -1, -8), (0, 0, 0, 0), (-9, -10, -16, -15)]
    (first, *_) = run(world_size, mean_over_all_draws, sixteenths, compact)
    for out, of_ranks in zip(first, sixteenths, strict=True):
        values, counts = (tensor.tolist() for tensor in torch.unique(out, return_counts=True))
        total = sum(Fraction(value) * count for value, count in zip(values, counts, strict=True))
        assert total / PLACES ** pairs_of(world_size) == Fraction(3, 64) * sum(of_ranks[:world_size]) / world_size
