# SPDX-License-Identifier: Apache-2.0
"""Where the GPU has an instruction of its own, the result has the right bits: for all arguments, or all that matter."""

import numpy as np
import pytest

LARGEST = np.float32(65504)  # of float16
TINY = np.float32(2.0**-100)  # the largest of the least products


def neighbours(values):
    """The values, and the float32 numbers next to them on either side."""
    values = np.asarray(values, dtype=np.float32)
    return np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))])


def float16_steps():
    """The values of float16 from 0 to the largest, values between them, and the negatives of both."""
    grid = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = [grid[:-1] + np.float32(share) * np.diff(grid) for share in (2.0**-13, 0.3, 0.5, 1 - 2.0**-13)]
    values = np.concatenate([neighbours(grid), *between])
    values = values[(values >= 0) & (values <= LARGEST)]
    return np.concatenate([values, -values])


def truncated(values):
    """Each value rounded towards 0, as the bits of float16."""
    magnitude = np.abs(values).astype(np.float64)
    nearest = np.abs(values).astype(np.float16)
    below = np.where(nearest.astype(np.float64) > magnitude, np.nextafter(nearest, np.float16(0)), nearest)
    return below.view(np.uint16) | np.where(np.signbit(values), 0x8000, 0).astype(np.uint16)


DIRECTIONS = np.float32(
    [0.0, -0.0, 2.0**-149, 2.0**-101, TINY, -TINY, 0.5, 1.0, 1.5, -7e4, 65536, 3e38, np.inf, -np.inf, np.nan]
)
# name: (arguments, expected)
CASES = {
    "inverse_probability": (
        np.arange(1, 65537, dtype=np.float32),
        lambda n: np.float32(65536) / n,
    ),
    "round_up": (
        np.clip(neighbours(np.concatenate([np.arange(65537), [2.0**-149, 2.0**-126, 2.0**-24]])), 0, 65536),
        np.ceil,
    ),
    # fmin() of a number and NaN is the number.
    "limited_product": (DIRECTIONS, lambda d: np.fmin(np.abs(d), np.float32(65536))),
    "least_product": (DIRECTIONS, lambda d: np.fmin(np.abs(d), TINY)),
    "larger_or_nan": (DIRECTIONS, lambda x: np.maximum(x, np.float32(1))),
    "widen_float16": (
        np.delete(np.arange(65536), [*range(0x7C01, 0x8000), *range(0xFC01, 0x10000)]).astype(np.float32),  # no NaN
        lambda bits: bits.astype(np.uint16).view(np.float16).astype(np.float32),
    ),
    "truncate_float16": (float16_steps(), lambda values: truncated(values).astype(np.float32)),
}


def same_bits(got, expected):
    """Whether all bits are the same; any NaN is like any other."""
    got, expected = (np.array(values, dtype=np.float32) for values in (got, expected))
    return np.array_equal(
        *(np.where(np.isnan(values), np.float32(np.nan), values).view(np.int32) for values in (got, expected))
    )


@pytest.mark.parametrize("name", CASES)
def test_shortcuts_are_exact(name, rule_hooks):
    values, expected = CASES[name]
    assert same_bits(rule_hooks.take_shortcuts(name, values.tolist()), expected(values))


@pytest.mark.parametrize("name", CASES)
def test_shortcuts_are_exact_on_a_gpu(name, rule_hooks):
    if not hasattr(rule_hooks, "take_shortcuts_cuda"):
        pytest.skip("no GPU, or no nvcc")
    values, expected = CASES[name]
    assert same_bits(rule_hooks.take_shortcuts_cuda(name, values.tolist()), expected(values))
