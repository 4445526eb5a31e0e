# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in the CUDA kernels. Each breaks a kernel in one place; if the comparison with the CPU loop did not
notice, it would prove nothing.
"""

from typing import NamedTuple

from .cpp_source import Change
from .emulation_programs import ADDRESS, QUICK, THREAD


class Fault(NamedTuple):
    """A fault, and the smallest program that shows it: one case, and kernels for one storage type.

    ``storage`` is its name in C++; without it the program has all kernels.
    """

    kernel: str
    name: str
    changes: tuple[Change, ...]
    case: str
    storage: str | None
    flags: tuple[str, ...]


FAULTS = []


def fault(kernel, name, *changes, case, storage="float", flags=QUICK):
    changes = tuple(Change(*change) for change in changes)
    FAULTS.append(Fault(kernel, name, changes, case, storage, flags))


def in_step(name, *change, case, storage="float", flags=QUICK):
    fault("step", name, change, case=case, storage=storage, flags=flags)


def in_layer(name, *changes, case="quick decay", storage="float", flags=QUICK):
    fault("calibrate_grad", name, *changes, case=case, storage=storage, flags=flags)


def in_threshold(name, *change, case="misaligned", storage="float", flags=QUICK):
    fault("hard_threshold", name, change, case=case, storage=storage, flags=flags)


# How blocks meet.
in_step(
    "no barrier before thread 0 adds up the warps",
    *("cuda/blocks.cuh", "reduce_block", "__syncthreads(); if (threadIdx.x == 0)", "if (threadIdx.x == 0)"),
    case="misaligned",
    flags=THREAD,
)
in_step(
    "the first block closes the step",
    *("cuda/step_cuda.cu", "finish_tensor", "!= blocks - 1) return;", "!= 0) return;"),
    case="misaligned",
)
in_step(
    "the tally is not cleared",
    *("cuda/step_cuda.cu", "finish_tensor", "atomicExch(&tally->blocks_done, 0ULL);", ""),
    case="misaligned",
)
in_step(
    "the blocks of a tensor wait for those of the next tensor",
    *("cuda/blocks.cuh", "blocks_of_tensor", "number + 1 < launch.header.count ?", "false ?"),
    case="misaligned",
)

# The vector of a thread.
STEP, DRAWS = "cuda/step.cuh", "cuda/draws.cuh"
in_step(
    "elements beyond the end count as moved",
    *(STEP, "step_vector", "if (!kWhole) move &= (1u << count) - 1u;", ""),
    case="misaligned",
)
in_step(
    "16-byte accesses at any address",
    *(STEP, "step_vector", "count == kCount && aligned16(array)", "count == kCount"),
    case="misaligned",
    flags=ADDRESS,
)
in_step(
    "the gradient's address does not count",
    *(STEP, "step_part", "aligned16(part.param) && aligned16(part.grad)", "aligned16(part.param)"),
    case="misaligned gradient",
    flags=ADDRESS,
)
in_step(
    "elements that fill no vector are read and written",
    *(STEP, "step_part", "aligned ? part.count - part.count % kCount : 0", "aligned ? part.count : 0"),
    case="weight decay",
    flags=ADDRESS,
)
in_step(
    "elements that fill no vector are left out",
    *(STEP, "step_part", "i < part.count; i += kThreads * kCount", "false; i += kThreads * kCount"),
    case="weight decay",
)
in_step(
    "a block takes its first vectors only",
    *(STEP, "step_part", "i < whole_end; i += kThreads * kCount", "i < whole_end; i += part.count"),
    case="several passes",
)
in_step(
    "a block's last vectors are those of the next block",
    *(STEP, "BlockPart", "from + chunk < tensor.numel ? chunk :", "false ? chunk :"),
    case="several passes",
)
in_step(
    "a momentum buffer that does not exist is read",
    *("core/sgd.h", "has_buffers", "return parts_.momentum;", "return true;"),
    case="no momentum",
    flags=ADDRESS,
)
in_step(
    "an infinite d raises the bound",
    *(STEP, "note_largest", "if (largest < bit_cast<T>(FloatBits<T>::kInfinity))", "if (true)"),
    case="infinite, NaN, too large",
)
in_step(
    "a d whose product underflows never moves",
    *(STEP, "find_moving_draws", "if (!may_underflow(scale)) return;", "return;"),
    case="underflow",
)
in_step(
    "the parameter is written where nothing moves",
    *(STEP, "step_vector", "select((move >> k & 1u) != 0, param[k] - d[k], param[k])", "param[k] - d[k]"),
    case="little moves",
)

# Directions with several buffers, and scalars that one thread computes for all.
in_step(
    "scalars are read before they are there",
    *("cuda/step_cuda.cu", "tensor_scalars", "__syncthreads();", ""),
    case="AdamW, misaligned",
    flags=THREAD,
)
in_step(
    "the powers of AdamW are those of the step before",
    *("core/adamw.h", "tensor_scalars", "static_cast<uint64_t>(steps) + 1", "static_cast<uint64_t>(steps)"),
    case="AdamW, misaligned",
)
in_step(
    "the address of the second buffer does not count",
    *(STEP, "step_part", "aligned && aligned16(part.buffers[b])", "aligned && aligned16(part.buffers[0])"),
    case="AdamW, misaligned second buffer",
    storage="BFloat16",
    flags=ADDRESS,
)
in_step(
    "both buffers are rounded by the same draws",
    *(STEP, "step_vector", "draws_of(buffer_stream(b))", "draws_of(buffer_stream(0))"),
    case="AdamW, little moves",
    storage="BFloat16",
)

# The draws of a vector.
in_step(
    "the second vector of a call takes the halves of the first",
    *(DRAWS, "draws_within", "within < 4 ?", "within < 8 ?"),
    case="weight decay",
)
in_step(
    "a vector of two takes the first words of its half",
    *(DRAWS, "draws_within", "kCount == 2 && within % 4 != 0 ?", "false ?"),
    case="weight decay, no momentum",
    storage="double",
)
in_step(
    "a vector's place in its call is not that of the whole parameter",
    *(
        DRAWS,
        "vector_draws",
        "draws_within<kCount>(bits, static_cast<int>(position",
        "draws_within<kCount>(bits, static_cast<int>(first",
    ),
    case="shard of rows from the second vector of a call",
)
in_step(
    "all draws come from one Philox call although a run ends among them",
    DRAWS,
    "vector_draws",
    "position % kCount == 0 && in_run + kCount <= layout.run_length",
    "position % kCount == 0",
    case="shard of columns, blocks of 4",
)
in_step(
    "all draws come from one Philox call although the second begins among them",
    *(DRAWS, "vector_draws", "position % kCount == 0 && in_run", "in_run"),
    case="shard of rows, bfloat16, from within a block",
    storage="BFloat16",
)
in_step(
    "a run does not end",
    *(DRAWS, "vector_draws", "in_run = 0; position = run_position(layout, ++run);", ""),
    case="shard of two dimensions",
)
in_step(
    "a shard of several runs has one",
    *(DRAWS, "vector_draws", "layout.run_length >= shard.numel ? 0 :", "true ? 0 :"),
    case="shard of columns",
    storage="double",
)
in_step(
    "the draws of the last Philox call are used once more",
    DRAWS,
    "vector_draws",
    "/ kDrawsPerCall; bits = draw_block(key, stream, call, shard.index, step);",
    "/ kDrawsPerCall;",
    case="shard of two dimensions",
)
in_step(
    "a draw that is added to eight takes the wrong half",
    *(DRAWS, "push", "first >> 16 | draw << 16", "(first & 0xFFFF0000u) | draw"),
    case="single columns",
    storage="BFloat16",
)
in_step(
    "groups of runs are forgotten",
    *("core/shard.h", "run_position", "run / layout.group_runs * layout.group_stride +", ""),
    case="shard of two dimensions",
)
in_step(
    "the halves of a word of draws are swapped",
    *("core/shard.h", "draw_any_lane", "(lane & 4) == 0", "(lane & 4) != 0"),
    case="shard of two dimensions",
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
    "a NaN among large numbers is overlooked",
    *("core/lanes.h", "larger_or_nan", "a > b || a != a ? a : b", "a > b ? a : b"),
    case="infinite, NaN, too large",
    storage="BFloat16",
)
in_step(
    "the draws of the upper halves are not complemented",
    *("cuda/draws.cuh", "complement", "~word[k % 4] >> 16", "word[k % 4] >> 16"),
    case="rounding to bfloat16",
    storage="BFloat16",
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
    (LAYER, "calibrate8", "count == kPerThread && aligned16(call.out)", "count == kPerThread"),
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
    "if ((dropped >> k & 1u) != 0) element(values, k) = S{};",
    "if (dropped == 0) element(values, k) = S{};",
)
in_threshold(
    "16-byte accesses at any address",
    THRESHOLD,
    "histogram_kernel",
    "load(data + i, count == kPerThread && aligned16(data), count, values)",
    "load(data + i, count == kPerThread, count, values)",
    flags=ADDRESS,
)
