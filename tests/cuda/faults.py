# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the CUDA kernels. Each breaks a kernel in one place; if the comparison with the CPU loop did not
notice, it would prove nothing.
"""

from typing import NamedTuple

from .cpp_source import Change
from .emulation_programs import ADDRESS, QUICK, THREAD


class Fault(NamedTuple):
    """A fault, and the smallest program that shows it: one case, and kernels for one storage type and kind of record.

    ``storage`` and ``record`` are names in C++; without them the program has all kernels.
    """

    kernel: str
    name: str
    changes: tuple[Change, ...]
    case: str
    storage: str | None
    record: str | None
    flags: tuple[str, ...]


FAULTS = []


def fault(kernel, name, *changes, case, storage="float", record=None, flags=QUICK):
    changes = tuple(Change(*change) for change in changes)
    FAULTS.append(Fault(kernel, name, changes, case, storage, record, flags))


def in_step(name, *change, case, storage="float", record="CsgdTensor", flags=QUICK):
    fault("csgd", name, change, case=case, storage=storage, record=record, flags=flags)


def in_shard(name, *change, case, storage="float"):
    in_step(name, *change, case=case, storage=storage, record="CsgdShard")


def in_layer(name, *changes, case="quick decay", storage="float", flags=QUICK):
    fault("calibrate_grad", name, *changes, case=case, storage=storage, flags=flags)


def in_threshold(name, *change, case="misaligned", storage="float", flags=QUICK):
    fault("hard_threshold", name, change, case=case, storage=storage, flags=flags)


def in_exchange(name, *change, case="ranks", flags=QUICK):
    fault("exchange", name, change, case=case, storage=None, flags=flags)


# How blocks meet.
in_step(
    "no barrier before thread 0 adds up the warps",
    *("cuda/blocks.cuh", "reduce_block", "__syncthreads(); if (threadIdx.x == 0)", "if (threadIdx.x == 0)"),
    case="misaligned",
    flags=THREAD,
)
in_step(
    "the first block closes the step",
    *("cuda/csgd_cuda.cu", "finish_tensor", "!= blocks - 1) return;", "!= 0) return;"),
    case="misaligned",
)
in_step(
    "the tally is not cleared",
    *("cuda/csgd_cuda.cu", "finish_tensor", "atomicExch(&tally->blocks_done, 0ULL);", ""),
    case="misaligned",
)
in_step(
    "the blocks of a tensor wait for those of the next tensor",
    *("cuda/blocks.cuh", "blocks_of_tensor", "number + 1 < launch.header.count ?", "false ?"),
    case="misaligned",
)

# Eight elements of a thread.
in_step(
    "elements beyond the end count as moved",
    *("cuda/block8.cuh", "step8", "move &= (1u << count) - 1u;", ""),
    case="misaligned",
)
in_step(
    "16-byte accesses at any address",
    *("cuda/csgd_cuda.cu", "csgd_kernel", "aligned && count == kPerThread", "count == kPerThread"),
    case="misaligned",
    flags=ADDRESS,
)
in_step(
    "an infinite d raises the bound",
    *("cuda/block8.cuh", "note_largest", "if (largest < bit_cast<T>(FloatBits<T>::kInfinity))", "if (true)"),
    case="infinite, NaN, too large",
)

# The draws of a shard.
in_shard(
    "eight draws come from one Philox call although a run ends among them",
    "core/shard.h",
    "draw_eight",
    "position % kDrawsPerCall == 0 && in_run + kDrawsPerCall <= layout.run_length",
    "position % kDrawsPerCall == 0",
    case="shard of two dimensions",
)
in_shard(
    "eight draws come from one Philox call although the second begins among them",
    *("core/shard.h", "draw_eight", "position % kDrawsPerCall == 0 && in_run", "in_run"),
    case="shard of rows, bfloat16, from within a block",
    storage="BFloat16",
)
in_shard(
    "a run does not end",
    *("core/shard.h", "draw_eight", "in_run = 0; position = run_position(layout, ++run);", ""),
    case="shard of two dimensions",
)
in_shard(
    "the draws of the last Philox call are used once more",
    "core/shard.h",
    "draw_eight",
    "/ kDrawsPerCall; bits = draw_block(key, stream, block, shard.index, step);",
    "/ kDrawsPerCall;",
    case="shard of two dimensions",
)
in_shard(
    "groups of runs are forgotten",
    *("core/shard.h", "run_position", "run / layout.group_runs * layout.group_stride +", ""),
    case="shard of two dimensions",
)
in_shard(
    "the halves of a word of draws are swapped",
    *("core/shard.h", "draw_any_lane", "(lane & 4) == 0", "(lane & 4) != 0"),
    case="shard of two dimensions",
)
in_shard(
    "warps step shards whose elements do not share Philox calls",
    *("core/shard.h", "shares_calls", "&& shard.layout.offset % kDrawsPerCall == 0", ""),
    case="shard of rows, bfloat16, from within a block",
    storage="BFloat16",
)
in_shard(
    "warps step across the runs of a shard",
    *("core/shard.h", "shares_calls", "shard.layout.run_length >= shard.numel &&", ""),
    case="shard of columns, blocks of 8",
)
in_shard(
    "warps step a shard with the draws of the tensor's start",
    *("core/shard.h", "first_call", "static_cast<uint64_t>(shard.layout.offset)", "static_cast<uint64_t>(0)"),
    case="shard of rows",
)

# The pass of a warp.
in_step(
    "gradients are read before they are copied",
    *("cuda/warp_pass.cuh", "take", "__pipeline_wait_prior(kSlots - 1);", ""),
    case="weight decay",
)
in_step(
    "a slot is filled before it is read",
    *("cuda/warp_pass.cuh", "refill", "copy((slot_ + kSlots - 1) % kSlots)", "copy(slot_)"),
    case="several passes",
)
in_step(
    "a pass too many",
    *("cuda/warp_pass.cuh", "WarpPasses", "+ kPass - kWarpPass) / kPass", "+ kPass) / kPass"),
    case="weight decay",
    flags=ADDRESS,
)
in_step(
    "the elements that fill no pass are left out",
    *("cuda/csgd_cuda.cu", "csgd_kernel", "int64_t i = passes_end +", "int64_t i = end +"),
    case="weight decay",
)
in_step(
    "a momentum buffer that does not exist is copied",
    *("cuda/warp_pass.cuh", "Ahead", "(kMayHaveMomentum && momentum)", "(kMayHaveMomentum)"),
    case="no momentum",
    flags=ADDRESS,
)
in_step(
    "passes at any address",
    *("cuda/csgd_cuda.cu", "csgd_kernel", "aligned && shares_calls(tensor) ?", "shares_calls(tensor) ?"),
    case="misaligned",
)
in_step(
    "no barrier between writing draws and reading those of other lanes",
    *("cuda/warp_pass.cuh", "LaneDraws", "__syncwarp();", ""),
    case="weight decay",
    flags=THREAD,
)
in_step(
    "no barrier between reading draws and writing those of the next pass",
    *("cuda/warp_pass.cuh", "take", "__syncwarp();", ""),
    case="several passes",
    flags=THREAD,
)
in_step(
    "a lane takes the other half of the words",
    *("cuda/warp_pass.cuh", "LaneDraws", "within < 4 ? kLowHalf", "within >= 4 ? kLowHalf"),
    case="weight decay",
)
in_step(
    "a lane always takes the first words",
    *("cuda/warp_pass.cuh", "LaneDraws", "value[within % 4 + e]", "value[e]"),
    case="weight decay, no momentum",
    storage="double",
)
in_step(
    "a vector moves only if its first element does",
    *("cuda/vectors.cuh", "in_vector", "((1u << Lanes<S>::kEach) - 1u)", "1u"),
    case="little moves",
)

# Rounding to 16 bits.
in_step(
    "NaN is rounded as numbers are",
    *("cuda/rounding.cuh", "narrow", "if (are_ordinary<S>(values)) return", "return"),
    case="infinite, NaN, too large",
    storage="BFloat16",
)
in_step(
    "the largest numbers are rounded as others are",
    *("cuda/rounding.cuh", "are_ordinary", "<= bit_cast<float>(Storage<S>::Format::kLargest)", "<= 3.4e38f"),
    case="infinite, NaN, too large",
    storage="BFloat16",
)
in_step(
    "the draw is compared with half of the part that float16 cuts off",
    *("cuda/rounding.cuh", "round_ordinary", "draw_unit(values[k]) < rest", "draw_unit(values[k]) < 0.5f * rest"),
    case="rounding to float16",
)
in_step(
    "two rounded numbers are packed in the wrong order",
    "cuda/rounding.cuh",
    "round_ordinary",
    "__byte_perm(sums[2 * w], sums[2 * w + 1]",
    "__byte_perm(sums[2 * w + 1], sums[2 * w]",
    case="rounding to bfloat16",
)

# The calibration of a gradient.
LAYER = "cuda/calibrate_grad_cuda.cu"
in_layer(
    "no barrier before is_last is read",
    (LAYER, "finish", "__syncthreads(); if (!is_last[0])", "if (!is_last[0])"),
    flags=THREAD,
)
in_layer("the first block closes the call", (LAYER, "finish", "== gridDim.x - 1", "== 0"))
in_layer(
    "the step advances before all blocks have read it",
    (LAYER, "finish", "*call.step += 1;", ""),
    (
        *(LAYER, "calibrate_grad_kernel", "uint32_t moved = 0;"),
        "uint32_t moved = 0; if (blockIdx.x + threadIdx.x == 0) *call.step += 1;",
    ),
    flags=THREAD,
)
in_layer(
    "each thread closes one channel at most",
    (LAYER, "finish", "c += kThreads", "c += call.channels"),
    case="more channels than elements of a block",
)
in_layer("a channel's maximum is not reset", (LAYER, "finish", "atomicExch(maxima + c, 0ULL)", "maxima[c]"))
in_layer("the count is not reset", (LAYER, "finish", "atomicExch(&tally->moving, 0ULL)", "tally->moving"))
in_layer("the number of finished blocks is not reset", (LAYER, "finish", "atomicExch(&tally->blocks_done, 0ULL);", ""))
in_layer(
    "elements beyond the end count as moved",
    (LAYER, "calibrate8", "move && k < count", "move"),
    case="no calibration",
)
in_layer("a run is one element too long", (LAYER, "next", "--left > 0", "left-- > 0"))
in_layer(
    "the first run is a whole one",
    (LAYER, "go_to", "call.inner - position % call.inner", "call.inner"),
)
in_layer(
    "one channel too many",
    (LAYER, "next", "channel + 1 == call.channels ?", "channel == call.channels ?"),
    flags=ADDRESS,
)
in_layer(
    "the maximum of a run is dropped at its end",
    (LAYER, "next", "end_run(); left", "left"),
)
in_layer("the maximum of the last run is dropped", (LAYER, "calibrate8", "channels.end_run();", ""))
in_layer(
    "a maximum goes to the next channel",
    (
        *(LAYER, "next", "end_run(); left = call.inner; set_channel(channel + 1 == call.channels ? 0 : channel + 1);"),
        "left = call.inner; const Bits largest = largest_bits;"
        "set_channel(channel + 1 == call.channels ? 0 : channel + 1);"
        "const Bits least = least_bits; largest_bits = largest; end_run(); largest_bits = least;",
    ),
)
in_layer(
    "a maximum between the decayed bound and the bound is lost",
    (LAYER, "set_channel", "next_bound(call.bound_decay, bound, T(0))", "next_bound(1.0, bound, T(0))"),
)
in_layer(
    "a maximum is raised without an atomic",
    (LAYER, "end_run", "atomicMax(maxima + channel, bits)", "maxima[channel] = bits"),
    flags=THREAD,
)
in_layer(
    "16-byte accesses at any address",
    (LAYER, "calibrate_grad_kernel", "aligned16(call.grad) && aligned16(call.out)", "aligned16(call.grad)"),
    case="misaligned result",
    storage="Float16",
    flags=ADDRESS,
)
in_layer(
    "the draws that decide also round",
    (LAYER, "calibrate8", "kGradRoundingStream", "kGradStream"),
    case="another rank",
    storage="BFloat16",
)

# Hard thresholding.
THRESHOLD, THRESHOLD_RULE = "cuda/hard_threshold_kernels.cuh", "core/hard_threshold.h"
in_threshold("counts of the block before", THRESHOLD, "histogram_kernel", "bins[b] = 0;", "bins[b] += 0;")
in_threshold(
    "no barrier before a block's counts are added to the others",
    THRESHOLD,
    "histogram_kernel",
    "__syncthreads(); for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) { if",
    "for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) { if",
    flags=THREAD,
)
in_threshold(
    "no block is the last",
    *(THRESHOLD, "histogram_kernel", "(tensor.selection_blocks - 1)", "(tensor.selection_blocks)"),
)
in_threshold(
    "counts are not zero for the next pass",
    *(THRESHOLD, "pick_digit", "atomicExch(&scratch.bins[first + b], 0ULL)", "scratch.bins[first + b]"),
)
in_threshold(
    "the number of finished blocks is not reset",
    *(THRESHOLD, "histogram_kernel", "atomicExch(&scratch.blocks_done, 0ULL)", "(void)0"),
)
in_threshold(
    "elements beyond the end are counted",
    THRESHOLD,
    "histogram_kernel",
    "if (k >= count) continue;",
    "",
    case="across, zeros",
)
in_threshold(
    "the last survivor is sought one digit too low",
    *(THRESHOLD, "pick_digit", "more >= missing ||", "more > missing ||"),
)
in_threshold(
    "NaN is no larger than infinity in 16 bits",
    *(THRESHOLD_RULE, "key_of", "Bits::kInfinity | Bits::kInfinity >> 1", "Bits::kInfinity + 1"),
    case="specials",
    storage="BFloat16",
)
in_threshold(
    "of equal magnitudes those of higher index survive",
    *(THRESHOLD_RULE, "from_end", "tensor.total - 1 - tensor.first - position", "tensor.first + position"),
    case="tensors of several launches",
)
in_threshold(
    "places are counted anew in each tensor",
    *(THRESHOLD_RULE, "from_end", "- tensor.first - position", "- position"),
    case="across launches",
)
in_threshold(
    "dropped elements are chosen again",
    *(THRESHOLD, "key_at", "tensor.mask == nullptr || tensor.mask[i]", "true"),
    case="masks",
)
in_threshold(
    "squares are added in another order",
    THRESHOLD,
    "norms_kernel",
    "half = kNormLanes / 2; half > 0; half /= 2",
    "half = 1; half < kNormLanes; half *= 2",
    case="norms",
)
in_threshold(
    "of four equal elements the last survive",
    *(THRESHOLD_RULE, "two_of_four", "other < j", "other > j"),
    case="two of four",
)
in_threshold(
    "an overflow is ignored",
    *(THRESHOLD, "work_of", "*launch.header.found_inf != 0.0f", "false"),
    case="overflow",
)
in_threshold(
    "the momentum of dropped elements stays",
    THRESHOLD,
    "select_kernel",
    "if ((dropped >> k & 1u) != 0) values[k] = S{};",
    "if (dropped == 0) values[k] = S{};",
)
in_threshold(
    "16-byte accesses at any address",
    THRESHOLD,
    "histogram_kernel",
    "load8(data + i, count, aligned && count == kPerThread, values)",
    "load8(data + i, count, count == kPerThread, values)",
    flags=ADDRESS,
)

# The exchange of gradients.
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
    *(EXCHANGE, "encode_kernel", "aligned && count == kPerThread", "count == kPerThread"),
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
