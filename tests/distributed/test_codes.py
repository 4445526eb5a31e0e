# SPDX-License-Identifier: Apache-2.0
"""Codes and their packing: the theorem of docs/exchange.md by enumeration, in exact fractions."""

import itertools
from fractions import Fraction

import pytest
import torch

from csgd_cuda.distributed import codes
from csgd_cuda.distributed.coding import digits_per_word, pack, unpack, words_for
from csgd_cuda.reference import philox

from ..helpers import heavy_tailed

ALL_DIGITS = torch.arange(2**16)


@pytest.mark.parametrize("radix", [2, 3, 5, 7, 9, 17, 255, 256, 257, 2049, 2**20 + 1])
def test_packing_gives_back_every_digit(radix, device):
    generator = torch.Generator().manual_seed(radix)
    for count in (1, 2, 19, 20, 21, 1000):
        digits = torch.randint(radix, (3, count), generator=generator)
        digits[1] = radix - 1
        words = pack(digits.to(device), radix)
        assert (words.dtype, words.shape) == (torch.int32, (3, words_for(count, radix)))
        assert torch.equal(unpack(words, radix, count).cpu().to(torch.int64), digits)


def test_words_hold_as_many_digits_as_fit():
    assert [digits_per_word(radix) for radix in (2, 3, 5, 7, 9, 17, 257, 2**16, 2**32)] == [
        32,
        20,
        13,
        11,
        10,
        7,
        3,
        2,
        1,
    ]
    for radix in range(2, 3000):
        assert radix ** digits_per_word(radix) <= 2**32 < radix ** (digits_per_word(radix) + 1)
    with pytest.raises(ValueError, match="radix must be in"):
        digits_per_word(1)


@pytest.mark.parametrize("dtype", codes.SIGNIFICANT_BITS, ids=str)
def test_every_sum_of_codes_is_exact(dtype):
    """k t is a number of dtype for all k = 0 ... W, W t is at least the size, and little more."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    size = torch.cat([heavy_tailed((50,), generator).abs(), torch.tensor([0.0, 1.0, 1 + 2.0**-7, 3.0, info.tiny])])
    size = torch.cat([size.to(dtype), torch.tensor([info.tiny * info.eps, 3 * info.tiny * info.eps], dtype=dtype)])
    for world_size in (1, 2, 3, 4, 5, 7, 64, 127, 128):
        t = codes.unit_of(size.to(torch.float32), world_size, dtype)
        k = torch.arange(world_size + 1, dtype=torch.float64).unsqueeze(1)
        assert torch.equal((k * t).to(dtype).to(torch.float64), k * t)
        keep = codes.SIGNIFICANT_BITS[dtype] - (world_size - 1).bit_length()
        for s, unit in zip(size.tolist(), t.tolist(), strict=True):
            assert world_size * Fraction(unit) >= Fraction(s)
            slack = max(Fraction(s) * Fraction(2, 2**keep), world_size * Fraction(info.tiny * info.eps))
            assert world_size * Fraction(unit) <= Fraction(s) + slack


def test_unit_of_what_is_not_finite_is_not_finite():
    assert codes.unit_of(torch.tensor(torch.inf), 3, torch.float32) == torch.inf


def coded_with_digits(monkeypatch, g, bound, tail, antithetic=False):
    """The codes of g for all 2^16 first digits of the U it is compared with, each followed by ``tail`` and then zeros.

    What is drawn is U itself, or where 1 - U is to be taken for it (g < 0, or antithetic) the complement.
    """
    complement = 2**16 - 1 if (g < 0) != antithetic else 0

    def draws_at(positions, **_):
        level = positions >> 40
        assert torch.equal(positions & (2**40 - 1), positions - (level << 40))
        return torch.tensor([*tail, *[0] * 40])[level - 1] ^ complement

    monkeypatch.setattr(codes, "draws", lambda begin, end, **_: ALL_DIGITS[begin:end] ^ complement)
    monkeypatch.setattr(codes, "draws_at", draws_at)
    grad = torch.full((2**16,), g, dtype=torch.float32)
    which = {"seed": 0, "index": 0, "step": torch.tensor(0), "antithetic": antithetic}
    got = codes.encode(grad, torch.tensor(bound, dtype=torch.float64), **which)
    return got.to(torch.int64) - codes.ZERO_CODE


# T with few and with all 24 bits; |g| / T dyadic or not, from far below one draw to 1.
BOUNDS = [1.0, 0.75, 1 + 2.0**-23, 16777215 * 2.0**-40, 2.0**-149, 3 * 2.0**126]
SHARES = [0, 2.0**-120, 2.0**-47, 2.0**-17, 1.5 * 2.0**-16, 0.001, 1 / 3, 0.5, 0.7, 1 - 2.0**-17, 1 - 2.0**-24, 1]


@pytest.mark.parametrize("bound", BOUNDS)
def test_code_is_the_sign_exactly_where_u_is_below_p(bound, monkeypatch):
    """For U uniform in [0, 1) the probability of U < p is p, so this is E[T code] = g, without any rounding.

    All first digits of U are enumerated; where the first is that of p, digits after it around those of p are.
    """
    for share in SHARES:
        g = min(torch.tensor(share * bound, dtype=torch.float32).item(), bound)
        p = Fraction(g) / Fraction(bound)
        first, second, third = (int(p * 2 ** (16 * k)) % 2**16 for k in (1, 2, 3))
        tails = {(second, third), (second, max(third - 1, 0)), (second, min(third + 1, 2**16 - 1)), (0,), (2**16 - 1,)}
        for tail in tails:
            u_of_tie = Fraction(first, 2**16) + sum(Fraction(d, 2 ** (16 * k)) for k, d in enumerate(tail, start=2))
            expected = (int(p * 2**16) > ALL_DIGITS).to(torch.int64)
            if p < 1:
                expected[first] = int(u_of_tie < p)
            for sign, antithetic in itertools.product((1, -1), (False, True)):
                got = coded_with_digits(monkeypatch, sign * g, bound, tail, antithetic)
                assert torch.equal(got, sign * expected), f"g = {sign * g}, T = {bound}, tail {tail}"


@pytest.mark.parametrize("shares", [(0.25, 0.25), (0.125, 0.5), (0.75, 0.5), (1.0, 0.25)], ids=str)
def test_codes_of_a_pair_are_antithetic(shares, monkeypatch):
    """Of the same sign they are as seldom both not 0 as can be, of different signs as often: their sum varies least."""
    monkeypatch.setattr(codes, "draws", lambda begin, end, **_: ALL_DIGITS[begin:end])
    bound, which = torch.tensor(1.0, dtype=torch.float64), {"seed": 0, "index": 0, "step": torch.tensor(0)}
    for signs in itertools.product((1, -1), (1, -1)):
        grads = [torch.full((2**16,), share * sign) for share, sign in zip(shares, signs, strict=True)]
        coded = [codes.encode(grad, bound, **which, antithetic=k == 1) for k, grad in enumerate(grads)]
        first, second = (of_rank.to(torch.int64) - codes.ZERO_CODE for of_rank in coded)
        assert [c.sum().item() / 2**16 for c in (first, second)] == [grad[0].item() for grad in grads]
        both = ((first != 0) & (second != 0)).sum().item() / 2**16
        assert both == (max(0, sum(shares) - 1) if signs[0] == signs[1] else min(shares))


def test_codes_have_the_mean_of_the_gradient():
    """With the real draws: a million coordinates, within 5 standard deviations."""
    n = 2**20 + 5
    grad = torch.linspace(-1, 1, n)
    got = codes.encode(grad, torch.tensor(1.0, dtype=torch.float64), seed=3, index=7, step=torch.tensor(2))
    code = got.to(torch.float64) - codes.ZERO_CODE
    assert abs((code * grad.sign() - grad.abs()).mean()) < 5 * (1 / 6) ** 0.5 / n**0.5  # Var = |g| (1 - |g|)
    assert abs((code - grad).mean()) < 5 * (1 / 6) ** 0.5 / n**0.5


def test_zero_and_infinite_bounds_make_no_trouble():
    for grad, bound in (([0.0, -0.0], 0.0), ([1.0, torch.nan, -torch.inf], torch.inf)):
        tensors = torch.tensor(grad), torch.tensor(bound, dtype=torch.float64)
        got = codes.encode(*tensors, seed=0, index=0, step=torch.tensor(0))
        assert set(got.tolist()) <= {0, 1, 2}
    assert codes.encode(torch.empty(0), tensors[1], seed=0, index=0, step=torch.tensor(0)).shape == (0,)


def test_draws_at_positions_are_those_of_ranges(device):
    which = {
        "seed": 2**63 + 5,
        "stream": philox.EXCHANGE_STREAM,
        "index": 2**32 - 1,
        "step": torch.tensor(9).to(device),
    }
    for begin in (0, 2**35 - 64, 2**40):
        expected = philox.draws(begin, begin + 128, device=device, **which).tolist()
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        got = philox.draws_at(begin + order.to(device), **which)
        assert got.tolist() == [expected[k] for k in order]


def test_streams_are_not_shared():
    streams = {name: value for name, value in vars(philox).items() if name.endswith("_STREAM")}
    assert len(set(streams.values())) == len(streams) == 8
