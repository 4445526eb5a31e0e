# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the CUDA kernels of the exchange of gradients; faults.py has those of the other kernels."""

from .emulation_programs import ADDRESS, QUICK, THREAD
from .faults import fault


def in_exchange(name, *change, case="ranks", flags=QUICK):
    fault("exchange", name, change, case=case, storage=None, flags=flags)


def in_planes(name, *change, case="ranks", flags=QUICK):
    fault("planes", name, change, case=case, storage=None, flags=flags)


# Codes.
EXCHANGE = "cuda/exchange_cuda.cu"
in_exchange(
    "codes that float32 cannot decide are not decided exactly",
    EXCHANGE,
    "encode8",
    "if (!decided && !zero) codes[k] = exact_code(call, bound, g, position + k, draw);",
    "",
    case="a bound where float32 decides nothing",
)
in_exchange("codes where there is no bound", EXCHANGE, "encode8", "above && !zero", "above", case="no bound")
in_exchange("eight elements take one draw", EXCHANGE, "encode8", "draw_lane(bits, k)", "draw_lane(bits, 0)")
in_exchange(
    "codes beyond the end are written",
    *(EXCHANGE, "encode8", "if (k < count) call.codes", "call.codes"),
    flags=ADDRESS,
)
in_exchange(
    "16-byte accesses at any address",
    *(EXCHANGE, "encode8", "count == kPerThread && aligned16(call.grad)", "count == kPerThread"),
    case="misaligned",
    flags=ADDRESS,
)
in_exchange(
    "codes beyond the end of a row are read",
    *(EXCHANGE, "pack_kernel", "at < available ? digits[at] : 0u", "digits[at]"),
    flags=ADDRESS,
)
in_exchange(
    "threads without a word write one",
    *(EXCHANGE, "pack_kernel", "number >= call.rows * call.words_per_row", "number < 0"),
    flags=ADDRESS,
)
in_exchange(
    "the codes of the first rank are added for each rank",
    *(EXCHANGE, "sum_of_codes", "rank * call.code_words + position", "position"),
)
in_exchange(
    "each gradient takes the first sums",
    *(EXCHANGE, "decode_kernel", "call.first + i", "i"),
)

# Planes of bits.
PLANES = "cuda/planes_cuda.cu"
in_planes(
    "no barrier before the numbers of the last call are overwritten",
    *(PLANES, "sum_before", "__syncthreads(); if (lane == 0)", "if (lane == 0)"),
    flags=THREAD,
)
in_planes(
    "no barrier before the sums of the warps are read",
    *(PLANES, "sum_before", "of_warps[warp] = from_here; __syncthreads();", "of_warps[warp] = from_here;"),
    flags=THREAD,
)
in_planes("the own number counts as one before", PLANES, "sum_before", "+ of_warps[warp] - from_here", "+ own")
in_planes("sums are counted in place of groups", PLANES, "count_kernel", "groups_in(mask) : mask", "mask : mask")
in_planes(
    "each round adds up counts from 0 on",
    *(PLANES, "add_counts_kernel", "sum += total;", "sum = total;"),
    case="long row",
)
in_planes("the planes of large sums have no length", PLANES, "length_kernel", "bytes += bytes_of(left);", "")
in_planes("bits are set without atomics", PLANES, "set_bits", "atomicOr(words, low)", "*words |= low", flags=THREAD)
in_planes("bits do not go on in the next word", PLANES, "set_bits", "if (high != 0) atomicOr(words + 1, high);", "")
in_planes("a group without a bit takes four", PLANES, "write_kernel", "if ((groups & 1u) == 0) mask >>= kGroup;", "")
in_planes(
    "each block writes where the first one does",
    *(PLANES, "write_kernel", "at = counts[block] + sum_before(static_cast<uint32_t>(__popc(mask))"),
    "at = counts[0] + sum_before(static_cast<uint32_t>(__popc(mask))",
)
in_planes(
    "sums beyond the end of the row are read",
    *(PLANES, "index_kernel", "counted -= groups_of(of) * kGroup - sums_of(of);", ""),
    case="sizes",
)
in_planes(
    "each round of a directory begins with 0",
    *(PLANES, "index_plane", "ranks[number] = sum + before;", "ranks[number] = before;"),
    case="long row",
)
in_planes(
    "planes that are cut off are read",
    *(PLANES, "index_kernel", "whole = bytes_of(bits) <= end - next.byte;", "whole = true;"),
    flags=ADDRESS,
)
in_planes("bytes behind the planes are accepted", PLANES, "index_kernel", "whole && next.byte == end", "whole")
in_planes("refused rows are read", PLANES, "read_kernel", "if (call.broken[row]) return;", "")
in_planes("the rank of a bit counts this bit", PLANES, "ones", "(1u << (end - i)) - 1", "(2u << (end - i)) - 1")
in_planes(
    "rows of words are read as planes",
    PLANES,
    "index_kernel",
    "const bool as_words =",
    "const bool as_words = false &&",
    case="shares",
)
