# SPDX-License-Identifier: Apache-2.0
"""The kernels of the exchange make the bits of the reference: codes, words, sums, gradients."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from csgd_cuda.distributed import codes
from csgd_cuda.distributed.coding import choose_coding
from csgd_cuda.reference.philox import EXCHANGE_STREAM, draws, draws_at

from ..conftest import need_kernel
from ..helpers import assert_same_bits, heavy_tailed
from .launch import draws_of

KERNELS = choose_coding(torch.device("cpu"), None)
REFERENCE = choose_coding(torch.device("cpu"), False)
DTYPES = list(codes.SIGNIFICANT_BITS)
# Around a block of draws, a tile, a word of codes on several ranks, a range, two ranges.
SIZES = [0, 1, 7, 8, 9, 19, 20, 21, 127, 128, 129, 255, 257, 1001, 2560, 5000, 16383, 16385, 32769]
SEED = 2**64 - 5


@pytest.fixture(autouse=True)
def _need_kernel():
    need_kernel(torch.device("cpu"))


def gradients(sizes, dtype, seed=0):
    """Of very different scales; some coordinates are 0, -0 and as large as any."""
    generator = torch.Generator().manual_seed(seed)
    grads = [heavy_tailed((n,), generator) * 10.0 ** (k % 7 - 4) for k, n in enumerate(sizes)]
    for grad in grads:
        if len(grad) > 2:
            grad[2], grad[-1] = -0.0, -grad.abs().max()
    return [grad.to(dtype) for grad in grads]


def bounds_of(grads, ranks, dtype):
    sizes = torch.stack([grad.abs().max().float() if len(grad) else torch.tensor(0.0) for grad in grads])
    units = codes.unit_of(sizes, ranks, dtype)
    return units, units * ranks


def encoded(coding, grads, bounds, rank, step):
    """The codes of one rank; pairs of ranks have antithetic ones."""
    indices = [draws_of(rank, parameter)["index"] for parameter in range(len(grads))]
    return coding.encode(grads, bounds, indices, seed=SEED, step=step, antithetic=rank % 2 == 1)


def exchanged(coding, grads, units, ranks, step=3):
    """Everything that the operations make of the gradients that ``ranks`` ranks would have."""
    coded = [encoded(coding, grads, units * ranks, rank, step) for rank in range(ranks)]
    words = [coding.pack(of_rank, ranks) for of_rank in coded]
    sums = torch.stack([coding.add(torch.stack([of_rank[shard] for of_rank in words])) for shard in range(ranks)])
    out = [torch.full_like(grad, 7) for grad in grads]
    coding.decode(sums, units, out)
    return [torch.stack(coded), torch.stack(words), sums, *out, *written(coding, words, sums)]


def written(coding, words, sums):
    """The rows as they travel in compact form, and what is read again."""
    messages = [coding.write_rows(of_rank, 1) for of_rank in words]
    for of_rank, rows in zip(messages, words, strict=True):
        assert_same_bits(coding.read_rows(of_rank, rows.shape[1], 1), rows)
    messages.append(coding.write_rows(sums, len(sums)))
    assert_same_bits(coding.read_rows(messages[-1], sums.shape[1], len(sums)), sums)
    return [row for rows in messages for row in rows]


def assert_agree(grads, units, ranks, device="cpu", **options):
    there = [grad.to(device) for grad in grads]
    results = exchanged(KERNELS, there, units.to(device), ranks, **options)
    references = exchanged(REFERENCE, grads, units, ranks, **options)
    for k, (kernel, reference) in enumerate(zip(results, references, strict=True)):
        assert_same_bits(kernel, reference, f"result {k}")
    return references


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 17])
def test_kernels_make_the_bits_of_the_reference(dtype, ranks, device):
    need_kernel(device)
    grads = gradients(SIZES if ranks < 5 else SIZES[:12], dtype)
    assert_agree(grads, bounds_of(grads, ranks, dtype)[0], ranks, device)


@pytest.mark.parametrize("ranks", [127, 128, 130])
def test_sums_of_many_ranks_outgrow_bytes(ranks):
    grads = gradients([3, 50, 300], torch.float32)
    assert_agree(grads, bounds_of(grads, ranks, torch.float32)[0], ranks)


@pytest.mark.parametrize("count", SIZES)
def test_buckets_of_one_gradient_of_any_size(count):
    grads = gradients([count], torch.float32, seed=count)
    for ranks in (1, 3):
        assert_agree(grads, bounds_of(grads, ranks, torch.float32)[0], ranks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_bounds(dtype, device):
    """Zero, subnormal, the largest, NaN and Inf; gradients of few values, which often tie with a threshold."""
    need_kernel(device)
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(1)
    sizes = [0.0, info.tiny * info.eps, 5 * info.tiny * info.eps, info.tiny, 1.0, 2.0**-14, info.max, math.inf]
    grads = []
    for size in sizes:
        share = torch.randint(-8, 9, (3000,), generator=generator) / 8
        grads.append((share * (size if size < math.inf else 1)).to(dtype))
    grads[-1][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    for ranks in (1, 2, 3):
        units = codes.unit_of(torch.tensor(sizes), ranks, dtype)
        out = assert_agree(grads, units, ranks, device)
        assert not out[3].any()
        assert not out[2 + len(grads)].isfinite().any()
    assert_agree(grads, torch.full((len(grads),), math.nan, dtype=torch.float64), 2, device)


def test_ties_of_the_first_digit_take_the_next_ones():
    """2^20 coordinates: some 16 ties for each threshold, and 2 in 2^15 where float32 alone does not decide."""
    grad = torch.full((2**20 + 3,), 1 / 3)
    out = assert_agree([grad], torch.tensor([1.0], dtype=torch.float64), 1)
    assert abs((out[0] == 2).float().mean() - 1 / 3) < 5 * (2 / 9) ** 0.5 / 2**10


@pytest.mark.parametrize("bound", [1.0, 0.75, 1.25 * 2.0**-100])
def test_ties_are_decided_exactly(bound):
    """p = |g| / T is put on the first two digits of U (or of 1 - U) itself, which then is not below p, and above."""
    which = {"seed": SEED, "stream": EXCHANGE_STREAM, "index": 5, "step": torch.tensor(3)}
    for above, sign, antithetic in itertools.product((-1, 0, 1), (1, -1), (False, True)):
        all_ones = 2**16 - 1 if (sign < 0) != antithetic else 0
        first = draws(0, 2**17, device=torch.device("cpu"), **which).to(torch.int64) ^ all_ones
        places = (first < 32).nonzero().squeeze(1)  # p and g then have few enough bits for a float32
        assert len(places) > 20
        second = draws_at(places + 2**40, **which).to(torch.int64) ^ all_ones
        p = (first[places] * 2**16 + second + above).clamp_(min=0).to(torch.float64) / 2**32
        grad = torch.zeros(2**17)
        grad[places] = (p * bound).to(torch.float32)
        assert torch.equal(grad[places].to(torch.float64), p * bound)
        bounds = torch.tensor([bound], dtype=torch.float64)
        for coding in (KERNELS, REFERENCE):
            coded = coding.encode([sign * grad], bounds, [5], seed=SEED, step=3, antithetic=antithetic)
            assert (coded[places] == (1 + sign if above > 0 else 1)).all(), f"{above}, {coding}"


def test_every_instruction_set_and_thread_count(compiled):
    threads, isa = torch.get_num_threads(), compiled.build_info()["cpu_isa"]
    results = []
    try:
        for name, count in [("baseline", 1), ("avx2", 1), ("avx512", 1), (isa, 2), (isa, 3)]:
            if not compiled.set_cpu_isa(name):
                continue
            torch.set_num_threads(count)
            for dtype in DTYPES:
                grads = gradients([*SIZES, 100_003], dtype)
                two, three = (exchanged(KERNELS, grads, bounds_of(grads, ranks, dtype)[0], ranks) for ranks in (2, 3))
                results.append((name, count, dtype, two + three))
    finally:
        torch.set_num_threads(threads)
        compiled.set_cpu_isa(isa)
    for name, count, dtype, other in results[len(DTYPES) :]:
        first = next(made for _, _, same, made in results if same == dtype)
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b, f"{name}, {count} threads, {dtype}")


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), ranks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES), scale=st.integers(-40, 30), seed=st.integers(0, 2**32), step=st.integers(0, 2**33),
)  # fmt: skip
def test_any_bucket(sizes, ranks, dtype, scale, seed, step):
    grads = [grad * 2.0**scale for grad in gradients(sizes, dtype, seed)]
    assert_agree(grads, bounds_of(grads, ranks, dtype)[0], ranks, step=step)


def test_fused_true_demands_the_kernels(monkeypatch):
    monkeypatch.setattr("csgd_cuda.extension._C", None)
    assert choose_coding(torch.device("cpu"), None) is REFERENCE
    with pytest.raises(RuntimeError, match="fused=True, but the extension is not built"):
        choose_coding(torch.device("cpu"), True)


GRADS = [torch.ones(5), torch.ones(30)]
UNITS = torch.ones(2, dtype=torch.float64)
OPS = torch.ops.csgd_cuda


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.encode_codes(GRADS, UNITS[:1], [0, 1], seed=0, step=0), "bounds must be .* each of the 2 grad"),
        (lambda: OPS.encode_codes(GRADS, UNITS.float(), [0, 1], seed=0, step=0), "bounds must be a contiguous float64"),
        (lambda: OPS.encode_codes(GRADS, UNITS, [0], seed=0, step=0), "indices must have an entry"),
        (lambda: OPS.encode_codes(GRADS, UNITS, [0, 2**32], seed=0, step=0), "indices must be in 0"),
        (lambda: OPS.encode_codes([GRADS[0].double()] * 2, UNITS, [0, 1], seed=0, step=0), r"\[0\] has dtype Double"),
        (lambda: OPS.encode_codes([GRADS[0], GRADS[1].half()], UNITS, [0, 1], seed=0, step=0), r"grads\[1\] must be a"),
        (lambda: OPS.encode_codes([GRADS[0], GRADS[1][::2]], UNITS, [0, 1], seed=0, step=0), r"grads\[1\] must be a"),
        (lambda: OPS.encode_codes([GRADS[0].to_sparse()], UNITS[:1], [0], seed=0, step=0), "sparse"),
        (lambda: OPS.pack_codes(GRADS[0], 2), "codes must be a contiguous uint8"),
        (lambda: OPS.pack_codes(GRADS[0].byte(), 0), "rows must be in"),
        (lambda: OPS.add_codes(torch.ones(2, dtype=torch.int32)), "words must be a contiguous int32"),
        (lambda: OPS.decode_sums(torch.ones(2, 2, dtype=torch.int32), UNITS[:1], GRADS), "units must be"),
        (lambda: OPS.decode_sums(torch.ones(2, 3, dtype=torch.int32), UNITS, GRADS), "words must have 2 columns"),
        (lambda: OPS.write_rows(torch.ones(2, dtype=torch.int32), 1), "words must be a contiguous int32"),
        (lambda: OPS.write_rows(torch.ones(2, 3, dtype=torch.int32), 0), "most must be in"),
        (lambda: OPS.read_rows(GRADS[0], [5], 3, 1), "message must be a contiguous uint8"),
        (lambda: OPS.read_rows(GRADS[0].byte(), [5], -1, 1), "words must be >= 0"),
        (lambda: OPS.read_rows(GRADS[0].byte(), [5], 1, 1), "a row has 5 bytes, its words only 4"),
        (lambda: OPS.read_rows(GRADS[0].byte(), [4], 3, 1), "lengths add up to 4 bytes, but message has 5"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in GRADS)


def test_opcheck():
    """Schema (what is mutated), fake implementation, and tracing, by torch's own checker."""
    coded = OPS.encode_codes(GRADS, UNITS, [0, 1], seed=0, step=0)
    words = OPS.pack_codes(coded, 2)
    sums = torch.stack([OPS.add_codes(words)] * 2)
    torch.library.opcheck(OPS.encode_codes.default, (GRADS, UNITS, [0, 1]), {"seed": 0, "step": 0})
    torch.library.opcheck(OPS.pack_codes.default, (coded, 2))
    torch.library.opcheck(OPS.add_codes.default, (words,))
    torch.library.opcheck(OPS.write_rows.default, (words, 1))
    message = torch.cat(KERNELS.write_rows(words, 1))
    lengths = [len(row) for row in KERNELS.write_rows(words, 1)]
    torch.library.opcheck(OPS.read_rows.default, (message, lengths, words.shape[1], 1))
    torch.library.opcheck(OPS.decode_sums.default, (sums, UNITS, [torch.ones(5), torch.ones(30)]))
