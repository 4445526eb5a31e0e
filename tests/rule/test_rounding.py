# SPDX-License-Identifier: Apache-2.0
"""Storing float32 in bfloat16 and float16: stochastic rounding by exhaustion over its draws, and to nearest."""

import math
from fractions import Fraction
from math import ceil

import pytest
import torch

from csgd_cuda.reference.rule import round_stochastic

from ..helpers import assert_same_bits

LOW = [torch.bfloat16, torch.float16]
EVERY_DRAW = torch.arange(2**16)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def awkward_values(dtype):
    """float32 values between grid points: subnormal, normal, around powers of two and the largest value."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps  # the grid below the smallest normal
    generator = torch.Generator().manual_seed(5)
    values = [0.0, step, step / 2, step * 2.0**-10, step * (1 + 2.0**-10), info.tiny - step / 3, info.tiny]
    values += [info.tiny * (1 + info.eps / 3), 1.0, 1 + info.eps / 5, 1 - info.eps / 3, 2 - info.eps / 7, 1.1]
    values += [info.max, info.max * (1 - info.eps / 3), 1e-30, 2.0**-149, 2.0**-130 * 1.37]
    values += (torch.randn(12, generator=generator) * 10.0 ** torch.arange(-9, 3)).tolist()
    stored = torch.tensor(values, dtype=torch.float32)
    return torch.cat([stored, -stored[stored != 0]])


def neighbours(value, dtype):
    """The grid points around a float32 value, toward zero and away from it, as exact fractions."""
    near = torch.tensor(value).to(dtype)
    toward, away = torch.tensor(0.0, dtype=dtype), torch.tensor(float("inf"), dtype=dtype).copysign(near)
    if near.double().abs() > abs(value):
        near = torch.nextafter(near.cpu(), toward)
    up = torch.nextafter(near, away)
    if up.isinf():  # never reached: the largest value itself needs no rounding
        return Fraction(near.item()), Fraction(near.item()) * 2
    return Fraction(near.item()), Fraction(up.item())


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_stochastic_rounding_by_exhaustion(dtype, device, rule_hooks):
    """For each value all 2^16 draws: only the two neighbours, the upper one exactly as often as promised."""
    for value in awkward_values(dtype).tolist():
        out = round_stochastic(torch.full((2**16,), value, device=device), dtype, EVERY_DRAW.to(device)).double().cpu()
        truncated, up = neighbours(value, dtype) if value != 0 else (Fraction(0), Fraction(1))
        fraction = (Fraction(value) - truncated) / (up - truncated)
        count = ceil(fraction * 2**16)
        assert out[:count].eq(float(up)).all(), value
        assert out[count:].eq(float(truncated)).all(), value
        exact = dtype is torch.bfloat16 or abs(value) >= torch.finfo(dtype).tiny
        mean = (count * up + (2**16 - count) * truncated) / 2**16
        assert abs(mean - Fraction(value)) <= (0 if exact else abs(up - truncated) / 2**16), value
        assert rule_hooks.store(name(dtype), value, EVERY_DRAW.tolist()) == out.tolist(), value


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_representable_values_are_left_alone(dtype, rule_hooks):
    """All 2^16 bit patterns: what needs no rounding is not changed by any draw."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    for draw in (0, 1, 2**15, 2**16 - 1):
        got = round_stochastic(finite.float(), dtype, torch.full(finite.shape, draw))
        assert_same_bits(got, finite, f"draw {draw}")
    for value in finite[::7].tolist():
        assert rule_hooks.store(name(dtype), value, [0, 2**16 - 1, None]) == [value] * 3


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_beyond_the_largest_value_is_rounded_to_nearest(dtype, rule_hooks):
    largest = torch.finfo(dtype).max
    ulp = largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    values = [largest + ulp / 4, largest + ulp / 2, float("inf"), float("-inf"), 3.4e38, -largest - ulp / 4]
    values = torch.tensor(values, dtype=torch.float32)
    for draw in (0, 2**16 - 1):
        got = round_stochastic(values, dtype, torch.full(values.shape, draw))
        assert_same_bits(got, values.to(dtype))
        for v in values.tolist():
            expected = torch.tensor(v).to(dtype).item()
            assert rule_hooks.store(name(dtype), v, [draw]) == [expected]
    nan = round_stochastic(torch.tensor([float("nan")]), dtype, torch.tensor([7]))
    assert nan.isnan().all()
    assert all(math.isnan(v) for v in rule_hooks.store(name(dtype), float("nan"), [7, None]))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_nearest_is_that_of_torch(dtype, rule_hooks):
    """Random float32 bit patterns of every exponent, ties and borders included."""
    generator = torch.Generator().manual_seed(11)
    raw = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    ties = (raw & ~0x1FFFF) | 0x8000
    ties_float16 = (raw & ~0x3FFF) | 0x1000
    values = torch.cat([raw, ties, ties_float16]).view(torch.float32)
    values = torch.cat([values[~values.isnan()], awkward_values(dtype)])
    expected = values.to(dtype).double().tolist()
    assert [rule_hooks.store(name(dtype), v, [None])[0] for v in values.tolist()] == expected
