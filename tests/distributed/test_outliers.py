# SPDX-License-Identifier: Apache-2.0
"""Outliers: what is taken, what travels, and the mean that is put back, each against a few plain lines."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csgd_cuda.distributed.clip_and_block import (
    _IN_CACHE,
    Outliers,
    add_mean,
    pack_exponents,
    pack_outliers,
    smallest_exponents,
    take_outliers,
    unpack_exponents,
    unpack_outliers,
)

from ..helpers import assert_same_bits, heavy_tailed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [5, 1, 0, _IN_CACHE - 1, _IN_CACHE, _IN_CACHE + 1, 2 * _IN_CACHE + 3]  # round what is worked on at a time
INF = torch.inf


def gradients(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [heavy_tailed((size,), generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_beyond_the_bound_is_taken_and_nothing_else(dtype):
    grads = gradients(0, dtype)
    bounds = torch.tensor([0.5, INF, 1.0, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    left = [grad.clone() for grad in grads]
    outliers = take_outliers(left, bounds)
    limits = torch.cat([bound.expand(size) for bound, size in zip(bounds, SIZES, strict=True)])
    flat = torch.cat(grads)
    beyond = flat.to(torch.float64).abs() > limits
    assert outliers.positions.tolist() == beyond.nonzero().flatten().tolist()
    assert_same_bits(outliers.values, flat[beyond])
    assert_same_bits(torch.cat(left), torch.where(beyond, 0, flat))
    assert beyond.any()


@given(
    gaps=st.lists(st.sampled_from([0, 1, 7, 253, 254, 255, 256, 509, 510, 511, 765, 100_000]), max_size=20),
    dtype=st.sampled_from(DTYPES),
)
def test_message_holds_any_positions_and_values(gaps, dtype):
    """A distance takes a byte, and one more for each 255."""
    positions = (torch.tensor(gaps, dtype=torch.int64) + 1).cumsum(0) - 1
    values = torch.randn(len(gaps), generator=torch.Generator().manual_seed(len(gaps))).to(dtype)
    message = pack_outliers(Outliers(positions, values))
    assert message.dtype == torch.uint8
    distances = sum(1 + gap // 255 for gap in gaps)
    assert len(message) == (8 + distances + values.nbytes if gaps else 0)
    one_further = torch.cat([message.new_zeros(1), message])[1:]  # as among messages of other ranks
    back = unpack_outliers(one_further, dtype)
    assert torch.equal(back.positions, positions)
    assert_same_bits(back.values, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mean_is_added_in_float64(world_size, dtype):
    """Where several ranks have taken the same coordinate, too."""
    grads = gradients(7, dtype)
    bounds = torch.full((len(SIZES),), 1.0, dtype=torch.float64)
    of_ranks = [take_outliers(gradients(seed, dtype), bounds) for seed in range(world_size)]
    flat = torch.cat(grads)
    total = torch.zeros(len(flat), dtype=torch.float64)
    times = torch.zeros(len(flat), dtype=torch.int64)
    for outliers in of_ranks:
        total[outliers.positions] += outliers.values.to(torch.float64)
        times[outliers.positions] += 1
    expected = torch.where(times > 0, (total / world_size + flat.to(torch.float64)).to(dtype), flat)
    add_mean(grads, of_ranks)
    assert_same_bits(torch.cat(grads), expected)
    assert times.max() == world_size


@given(rows=st.integers(1, 5), exponents=st.lists(st.integers(0, 15), min_size=1, max_size=50))
def test_exponents_take_half_a_byte(rows, exponents):
    packed = pack_exponents(torch.tensor(exponents, dtype=torch.uint8), rows)
    assert packed.shape == (rows, -(-len(exponents) // (2 * rows)))
    assert unpack_exponents(packed)[: len(exponents)].tolist() == exponents


@given(st.lists(st.tuples(*[st.integers(0, 15)] * 4), min_size=1, max_size=5))
def test_smallest_exponents_are_those_over_the_rows(rows):
    """An exponent of one half of a byte has no part in the other."""
    packed = torch.stack([pack_exponents(torch.tensor(row, dtype=torch.uint8), 1)[0] for row in rows])
    assert unpack_exponents(smallest_exponents(packed)).tolist() == [min(column) for column in zip(*rows, strict=True)]
