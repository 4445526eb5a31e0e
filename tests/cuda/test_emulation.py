# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, run on the CPU with a thread for each CUDA thread: bits, memory and races.

emulation/ holds the emulation of CUDA and, for each kernel, the program that compares it with its CPU loop.
"""

import pytest

from .emulation_programs import ADDRESS, PLAIN, QUICK, THREAD, Program, Programs

pytestmark = pytest.mark.xdist_group("emulation")  # each process would compile all programs

VARIANTS = {"plain": PLAIN, "address and undefined behaviour": ADDRESS, "thread": THREAD}
OLD_DRIVER = Program("csgd", QUICK, ("old-driver",))


# The kernels for one combination of the rule's parts are those that decide while running, with less in them. Where one
# fault is sought in all of them the latter do, and compile in half the time.
FEWER_KERNELS = {"csgd": [("if constexpr (sizeof(L) > kSmallLaunch && ", "if constexpr (sizeof(L) < 0 && ")]}


def broken(kernel, fault):
    changes = (*FAULTS[kernel, fault], *FEWER_KERNELS.get(kernel, ()))
    return Program(kernel, SANITIZED.get(fault, QUICK), changes=changes)


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """Those of the tests that were chosen have all been started."""
    programs = Programs(tmp_path_factory.mktemp("cuda_emulation"))
    for test in request.session.items:
        if test.module is request.module:
            given = test.callspec.params if hasattr(test, "callspec") else {}
            if "flags" in given:
                programs.start(Program(given["kernel"], given["flags"]))
            else:
                programs.start(broken(**given) if given else OLD_DRIVER)
    yield programs
    programs.stop()


@pytest.mark.parametrize(
    ("kernel", "cases"), [("csgd", 57), ("calibrate_grad", 70), ("exchange", 34), ("hard_threshold", 163)]
)
@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS.keys())
def test_kernels_make_the_bits_of_the_cpu_loop(flags, kernel, cases, programs):
    done = programs.start(Program(kernel, flags)).result()
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("agree") >= cases


def test_old_drivers_take_smaller_launches(programs):
    """Before CUDA 12.1 a kernel's parameters are 4 KB at most: the same bits in more launches."""
    done = programs.start(OLD_DRIVER).result()
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("agree") == 9


# Each breaks a kernel in one place; the comparison must notice, or it proves nothing. (kernel, what: changes)
FAULTS = {
    ("csgd", "no barrier before thread 0 adds up"): [
        ("  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)")
    ],
    ("csgd", "the first block closes the step"): [("!= blocks - 1) return;", "!= 0) return;")],
    ("csgd", "tails are not masked"): [("move &= (1u << count) - 1u;", "")],
    ("csgd", "the tally is not cleared"): [("  atomicExch(&tally->blocks_done, 0ULL);\n", "")],
    ("csgd", "wide access at any address"): [("aligned && count == kPerThread", "count == kPerThread")],
    ("csgd", "eight draws of one block at the end of a run"): [
        (
            "position % kDrawsPerCall == 0 && in_run + kDrawsPerCall <= layout.run_length",
            "position % kDrawsPerCall == 0",
        )
    ],
    ("csgd", "eight draws of one block in the middle of it"): [
        ("position % kDrawsPerCall == 0 && in_run + kDrawsPerCall", "in_run + kDrawsPerCall")
    ],
    ("csgd", "a run does not end"): [("      in_run = 0;\n      position = run_position(layout, ++run);\n", "")],
    ("csgd", "draws of the block before"): [("      bits = draw_block(key, stream, block, shard.index, step);\n", "")],
    ("csgd", "groups of runs are forgotten"): [("run / layout.group_runs * layout.group_stride +", "")],
    ("csgd", "the lanes' halves are swapped"): [
        ("(lane & 4) == 0 ? (word & 0xFFFFu)", "(lane & 4) != 0 ? (word & 0xFFFFu)")
    ],
    ("csgd", "blocks of the next tensor are waited for"): [("number + 1 < launch.header.count ?", "false ?")],
    ("csgd", "gradients are read before they are there"): [("    __pipeline_wait_prior(kSlots - 1);\n", "")],
    ("csgd", "a slot is filled before it is read"): [("copy((slot_ + kSlots - 1) % kSlots)", "copy(slot_)")],
    ("csgd", "a pass too many"): [("+ kPass - kWarpPass) / kPass)", "+ kPass) / kPass)")],
    ("csgd", "what fills no pass is left out"): [("    begin = passes_end;\n", "    begin = end;\n")],
    ("csgd", "a momentum buffer that is not there is copied"): [
        ("(kMayHaveMomentum && momentum)", "(kMayHaveMomentum)")
    ],
    ("csgd", "passes at any address"): [
        ("aligned && shares_calls(tensor) ? end - (end - begin) % kWarpPass : begin", "end")
    ],
    ("csgd", "passes where a shard's elements do not share calls"): [
        (" && shard.layout.offset % kDrawsPerCall == 0;", ";")
    ],
    ("csgd", "passes across the runs of a shard"): [("shard.layout.run_length >= shard.numel && ", "")],
    ("csgd", "a shard's passes draw from the start"): [("(shard.layout.offset) / kDrawsPerCall", "(0)")],
    ("csgd", "draws are read before they are told"): [("    __syncwarp();\n      // Of a call", "      // Of a call")],
    ("csgd", "draws are told before those of the last pass are read"): [("    __syncwarp();  // lets", "    // lets")],
    ("csgd", "a lane takes the other half of the words"): [("within < 4 ? kLowHalf", "within >= 4 ? kLowHalf")],
    ("csgd", "a lane takes the first words only"): [("value[within % 4 + e]", "value[e]")],
    ("csgd", "a vector moves by its first element only"): [("((1u << Lanes<S>::kEach) - 1u)", "1u")],
    ("csgd", "an infinite d raises the bound"): [("if (largest < bit_cast<T>(FloatBits<T>::kInfinity))", "if (true)")],
    ("csgd", "NaN is rounded as numbers are"): [("if (are_ordinary<S>(values)) return", "return")],
    ("csgd", "the largest numbers are rounded as others are"): [
        ("<= bit_cast<float>(Storage<S>::Format::kLargest)", "<= 3.4e38f")
    ],
    ("csgd", "the draw is compared with half of what float16 cuts off"): [
        ("draw_unit(values[k]) < rest", "draw_unit(values[k]) < 0.5f * rest")
    ],
    ("csgd", "two rounded numbers are packed the wrong way round"): [
        ("__byte_perm(sums[2 * w], sums[2 * w + 1]", "__byte_perm(sums[2 * w + 1], sums[2 * w]")
    ],
    ("csgd", "no barrier before the counting"): [("  __syncthreads();\n  return bins;", "  return bins;")],
    ("csgd", "no barrier before the counts are told"): [("  __syncthreads();\n  for (int b", "  for (int b")],
    ("csgd", "counts of the block before"): [("bins[b] = 0;", "bins[b] += 0;")],
    ("csgd", "elements beyond the end are counted"): [("if (k < count) atomicAdd(&bins", "atomicAdd(&bins")],
    ("csgd", "what does not move is not counted"): [("if (bins != nullptr) count8", "if (move != 0 && bins) count8")],
    ("csgd", "what does not move is not read"): [(" || (kIsPruned<Tensor> && bins != nullptr);", ";")],
    ("csgd", "masked gradients are taken"): [("select((alive >> k & 1u) != 0, grad[k], S{})", "grad[k]")],
    ("csgd", "masked elements count as alive"): [
        ("load(values[k]), (alive >> k & 1u) != 0)", "load(values[k]), true)")
    ],
    ("csgd", "masks are read wide at any address"): [
        ("count == kPerThread && reinterpret_cast<uintptr_t>(from) % sizeof(Eight) == 0", "count == kPerThread")
    ],
    ("csgd", "masks are read beyond the end"): [("k < count && from[k] ?", "from[k] ?")],
    ("csgd", "the first digit is shifted by a bit"): [
        ("sizeof(LaneOf<Value>)) - kDigitBits)", "sizeof(LaneOf<Value>)) - 10)")
    ],
    ("calibrate_grad", "no barrier before is_last is read"): [
        ("  __syncthreads();\n  if (!is_last[0])", "  if (!is_last[0])")
    ],
    ("calibrate_grad", "the first block closes the call"): [("== gridDim.x - 1;", "== 0;")],
    ("calibrate_grad", "the step advances before all have read it"): [
        ("    *call.step += 1;\n", ""),
        ("  uint32_t moved = 0;", "  uint32_t moved = 0;\n  if (blockIdx.x + threadIdx.x == 0) *call.step += 1;"),
    ],
    ("calibrate_grad", "each thread closes one channel at most"): [("c += kThreads", "c += call.channels")],
    ("calibrate_grad", "a channel's maximum is not reset"): [("atomicExch(maxima + c, 0ULL)", "maxima[c]")],
    ("calibrate_grad", "the count is not reset"): [("atomicExch(&tally->moving, 0ULL)", "tally->moving")],
    ("calibrate_grad", "the blocks' meeting is not reset"): [("    atomicExch(&tally->blocks_done, 0ULL);\n", "")],
    ("calibrate_grad", "elements beyond the end are counted"): [("move && k < count", "move")],
    ("calibrate_grad", "a run is one element too long"): [("--left > 0", "left-- > 0")],
    ("calibrate_grad", "the first run is a whole one"): [("call.inner - position % call.inner", "call.inner")],
    ("calibrate_grad", "one channel too many"): [("channel + 1 == call.channels ?", "channel == call.channels ?")],
    ("calibrate_grad", "a run's maximum is not told at its end"): [("    end_run();\n    left", "    left")],
    ("calibrate_grad", "the last run's maximum is not told"): [("  channels.end_run();\n", "")],
    ("calibrate_grad", "a maximum goes to the next channel"): [
        ("    end_run();\n    left = call.inner;", "    left = call.inner;"),
        ("call.channels ? 0 : channel + 1);\n", "call.channels ? 0 : channel + 1);\n    end_run();\n"),
    ],
    ("calibrate_grad", "a maximum between the decayed bound and the bound is lost"): [
        ("next_bound(call.bound_decay, bound, T(0))", "next_bound(1.0, bound, T(0))")
    ],
    ("calibrate_grad", "a maximum is raised without an atomic"): [
        ("atomicMax(maxima + channel, bits)", "maxima[channel] = bits")
    ],
    ("calibrate_grad", "wide access at any address"): [
        ("aligned16(call.grad) && aligned16(call.out)", "aligned16(call.grad)")
    ],
    ("calibrate_grad", "rounding by the draws that decide"): [("kGradRoundingStream", "kGradStream")],
    ("hard_threshold", "counts of the block before"): [("b += kThreads) bins[b] = 0;", "b += kThreads) bins[b] += 0;")],
    ("hard_threshold", "no barrier before the counts are told"): [
        (
            "  __syncthreads();\n  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {\n    if",
            "  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {\n    if",
        )
    ],
    ("hard_threshold", "no block is the last"): [("tensor.selection_blocks - 1)", "tensor.selection_blocks)")],
    ("hard_threshold", "counts are not zero for the next pass"): [
        ("atomicExch(&scratch.bins[b], 0ULL)", "scratch.bins[b]")
    ],
    ("hard_threshold", "the blocks' meeting is not reset"): [("atomicExch(&scratch.blocks_done, 0ULL)", "(void)0")],
    ("hard_threshold", "elements beyond the end are counted"): [
        ("      if (k >= count) continue;\n      const int digit", "      const int digit")
    ],
    ("hard_threshold", "the last survivor is sought one digit too low"): [("more >= missing ||", "more > missing ||")],
    ("hard_threshold", "NaN is no larger than Inf in 16 bits"): [
        ("Bits::kInfinity | Bits::kInfinity >> 1", "Bits::kInfinity + 1")
    ],
    ("hard_threshold", "ties go to the higher index"): [
        ("tensor.total - 1 - tensor.first - position", "tensor.first + position")
    ],
    ("hard_threshold", "places begin anew in each tensor"): [(" - tensor.first - position", " - position")],
    ("hard_threshold", "what was dropped for good is chosen"): [("tensor.mask == nullptr || tensor.mask[i]", "true")],
    ("hard_threshold", "squares are added in another order"): [
        ("half = kNormLanes / 2; half > 0; half /= 2", "half = 1; half < kNormLanes; half *= 2")
    ],
    ("hard_threshold", "ties of four go to the last"): [("other < j)", "other > j)")],
    ("hard_threshold", "an overflow is not looked at"): [("*launch.header.found_inf != 0.0f", "false")],
    ("hard_threshold", "the first digit from the counts of one bin"): [("tensor.histogram[b]", "tensor.histogram[0]")],
    ("hard_threshold", "the first digit once for each tensor"): [
        ("heads.empty() || heads.back().selection != tensor.selection", "true")
    ],
    ("hard_threshold", "what was counted is counted again"): [("      counted = false;\n", "")],
    ("hard_threshold", "the momentum is left"): [
        ("if ((dropped >> k & 1u) != 0) values[k] = S{};", "if (dropped == 0) values[k] = S{};")
    ],
    ("hard_threshold", "wide access at any address"): [
        (
            "load8(data + i, count, aligned && count == kPerThread, values)",
            "load8(data + i, count, count == kPerThread, values)",
        )
    ],
    ("exchange", "what float32 does not decide is left at that"): [
        ("    if (!decided && !zero) codes[k] = exact_code(call, bound, g, position + k, draw);\n", "")
    ],
    ("exchange", "codes where there is no bound"): [("above && !zero", "above")],
    ("exchange", "all of a block take its first draw"): [("draw = draw_lane(bits, k);", "draw = draw_lane(bits, 0);")],
    ("exchange", "codes beyond the end are written"): [("if (k < count) call.codes", "call.codes")],
    ("exchange", "wide access at any address"): [("aligned && count == kPerThread", "count == kPerThread")],
    ("exchange", "a row's absent codes are read"): [("at < available ? digits[at] : 0u", "digits[at]")],
    ("exchange", "a thread for a word too many"): [("number >= call.rows * call.words_per_row", "number < 0")],
    ("exchange", "each rank adds its own codes only"): [("rank * call.code_words + position", "position")],
    ("exchange", "each gradient takes the first sums"): [("call.first + i);", "i);")],
}
SANITIZED = {
    "no barrier before thread 0 adds up": THREAD,
    "no barrier before the counting": THREAD,
    "a pass too many": ADDRESS,
    "a momentum buffer that is not there is copied": ADDRESS,
    "draws are read before they are told": THREAD,
    "draws are told before those of the last pass are read": THREAD,
    "masks are read wide at any address": ADDRESS,
    "masks are read beyond the end": ADDRESS,
    "no barrier before is_last is read": THREAD,
    "the step advances before all have read it": THREAD,
    "a maximum is raised without an atomic": THREAD,
    "wide access at any address": ADDRESS,
    "one channel too many": ADDRESS,
    "no barrier before the counts are told": THREAD,
    "codes beyond the end are written": ADDRESS,
    "a row's absent codes are read": ADDRESS,
    "a thread for a word too many": ADDRESS,
}


@pytest.mark.parametrize(("kernel", "fault"), FAULTS)
def test_a_broken_kernel_is_found_out(kernel, fault, programs):
    done = programs.start(broken(kernel, fault)).result()
    assert done.returncode != 0
    assert any(sign in done.stdout + done.stderr for sign in ("differs", "Sanitizer", "runtime error"))
