# SPDX-License-Identifier: Apache-2.0
"""Rows of sums as planes of bits: which bits, how many, and that every row comes back."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from csgd_cuda.distributed.coding import choose_coding, digits_per_word, pack, words_for
from csgd_cuda.distributed.planes import from_planes, to_planes

from ..conftest import need_kernel
from ..helpers import assert_same_bits

MOST = [1, 2, 4, 17, 127, 128, 300]  # of 127 a sum still fits a byte


def sums_of(count, most, share, seed=0):
    """So large a share of them is not 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-most, most + 1, (count,), generator=generator)
    return values * (torch.rand(count, generator=generator) < share) + most


def bits_of(message):
    return "".join(f"{byte:08b}"[::-1] for byte in message.tolist())


def test_bits_by_hand():
    sums = torch.tensor([0, 0, 0, 0, 0, 3, 0, -1, 0, 0, 0, 0, 2])
    planes = ["0101", "0101" + "1000", "101", "101", "10"]  # groups, not 0, sign, larger than 1, larger than 2
    assert bits_of(to_planes(sums + 3, 3)) == "".join(plane.ljust(8, "0") for plane in planes)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("most", MOST)
def test_every_row_comes_back(most, share):
    for count in (0, 1, 3, 4, 5, 8, 9, 31, 33, 1000):
        sums = sums_of(count, most, share)
        assert torch.equal(from_planes(to_planes(sums, most), count, most).to(torch.int64), sums)


def test_a_sum_takes_the_bits_that_the_docstring_says():
    sums = sums_of(4000, 4, 0.3)
    values = (sums - 4).abs()
    occupied = values.view(-1, 4).any(1).sum().item()
    planes = [1000, 4 * occupied, *((values >= size).sum().item() for size in (1, 1, 2, 3))]
    assert len(to_planes(sums, 4)) == sum(-(-bits // 8) for bits in planes)


@pytest.mark.parametrize(
    "change", [lambda m: m[:-1], lambda m: torch.cat([m, m[:1]]), lambda m: m[:2], lambda m: m[:0]]
)
def test_a_row_of_another_length_is_refused(change, device):
    sums = sums_of(400, 4, 0.2).to(device)
    words = pack(sums[None], 9)
    message = change(to_planes(sums, 4))
    with pytest.raises(ValueError, match="bytes"):
        from_planes(message, 400, 4)
    for fused in (None, False):
        with pytest.raises(ValueError, match="bytes"):
            choose_coding(device, fused).read_rows([message], words.shape[1], 4)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    rows=st.integers(1, 4),
    words=st.integers(0, 40),
    most=st.sampled_from(MOST),
    share=st.sampled_from([0, 0.03, 0.3, 1]),
    seed=st.integers(0, 2**20),
)
def test_kernel_and_reference_write_the_same_bytes_and_read_them(rows, words, most, share, seed):
    need_kernel(torch.device("cpu"))
    count = words * digits_per_word(2 * most + 1)
    digits = torch.stack([sums_of(count, most, share, seed + row) for row in range(rows)])
    packed = pack(digits, 2 * most + 1)
    kernels, reference = (choose_coding(torch.device("cpu"), fused) for fused in (True, False))
    messages = reference.write_rows(packed, most)
    for own, other, row in zip(kernels.write_rows(packed, most), messages, digits, strict=True):
        assert_same_bits(own, other)
        assert len(own) == min(len(to_planes(row, most)), 4 * words_for(count, 2 * most + 1))
    for coding in (kernels, reference):
        assert_same_bits(coding.read_rows(messages, words, most), packed)
