// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' own source, emulated on the CPU, against the CPU loop: the same bits for sizes around every
// boundary, alignments, dtypes, options and many tensors. A program rather than a Python test, so that sanitizers can
// watch all of it. Usage: step_against_cpu_loop [CASE...]; exit status 0 if everything agrees. A case can also be
// described, as "options: bfloat16, momentum, misaligned".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "compare.h"
#include "csrc/core/adamw.h"
#include "csrc/core/sgd.h"
#include "csrc/cpu/step_cpu.h"
#include "csrc/cuda/step_cuda.h"
#include "step_cases.h"
#include "step_described.h"

using namespace csgd;

namespace {

// One tensor with all it needs, on one side of the comparison.
struct Buffers {
  Buffer param, grad, of_state[kMostBuffers];
  int64_t step = 0;
  double bound = 0;
  StepTally tally{};
};

int buffers_of(const Case& c) { return c.adamw ? AdamW::kBuffers : c.options.momentum != 0 ? 1 : 0; }

StepShard record(Buffers& b, const Case& c, size_t number) {
  StepShard t{};
  t.param = data_of(b.param, c.dtype, c.offsets.param);
  t.grad = data_of(b.grad, c.dtype, c.offsets.grad);
  for (int k = 0; k < buffers_of(c); ++k) t.buffers[k] = data_of(b.of_state[k], c.dtype, c.offsets.buffers[k]);
  t.step = &b.step;
  t.bound = &b.bound;
  t.tally = &b.tally;
  t.numel = c.sizes[number];
  t.index = static_cast<uint32_t>(number);
  t.layout = c.layout;
  return t;
}

template <class Options>
void step_on_cpu(DType dtype, const Options& options, const StepShard& tensor) {
  if (overflowed(options)) return;
  ChunkResult total;
  for (int64_t begin = 0; begin < tensor.numel; begin += kCpuChunk) {
    const int64_t end = std::min(begin + kCpuChunk, tensor.numel);
    const ChunkResult r = chunk_function<Options>(dtype)(options, tensor, begin, end);
    total.largest_bits = std::max(total.largest_bits, r.largest_bits);
    total.moved += r.moved;
  }
  finish_tensor(dtype, options, tensor, total);
}

bool same(const Buffers& a, const Buffers& b) {
  const StepTally& t = a.tally;
  for (int k = 0; k < kMostBuffers; ++k) {
    if (!same_bits(a.of_state[k], b.of_state[k])) return false;
  }
  return same_bits(a.param, b.param) && same_bits(a.grad, b.grad) && a.step == b.step &&
         std::memcmp(&a.bound, &b.bound, sizeof a.bound) == 0 && t.moved == b.tally.moved && t.largest_bits == 0 &&
         t.moving == 0 && t.blocks_done == 0;
}

cudaError_t step_on_gpu(const Case& c, const std::vector<StepShard>& records, int64_t* launches) {
  const auto count = static_cast<int64_t>(records.size());
  return c.adamw ? launch_step_cuda(c.dtype, adamw_options(c), records.data(), count, nullptr, launches)
                 : launch_step_cuda(c.dtype, c.options, records.data(), count, nullptr, launches);
}

// Of the largest bfloat16 the steps below lead to numbers between it and the largest float32.
constexpr double kLargestBFloat16 = 0x1.FEp127, kStepBeyond = 4e36;

// Of the least number above 0.
int least_exponent(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return -149;
    case DType::kFloat64: return -1074;
    case DType::kBFloat16: return -133;
    case DType::kFloat16: return -24;
  }
  return 0;
}

double parameter(const Case& c, Random& random) {
  return c.special && random() % 7 == 0 ? kLargestBFloat16 : random.heavy_tailed();
}

double gradient(const Case& c, int step, Random& random) {
  if (c.tiny && step > 0) return std::ldexp(1.0, least_exponent(c.dtype));
  if (c.special && random() % 20 == 0) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double some[] = {infinity,          -infinity,   std::numeric_limits<double>::quiet_NaN(),
                           -kLargestBFloat16, kStepBeyond, -kStepBeyond,
                           -kStepBeyond};
    return some[random() % std::size(some)];
  }
  return 0.1 * random.heavy_tailed();
}

bool run(const Case& c, Random& random) {
  cuda_emulation::multiprocessors = c.multiprocessors;
  std::vector<Buffers> cpu(c.sizes.size()), gpu;
  for (size_t k = 0; k < c.sizes.size(); ++k) {
    fill(c.dtype, cpu[k].param, c.sizes[k], c.offsets.param, [&] { return parameter(c, random); });
    for (int b = 0; b < kMostBuffers; ++b) {
      fill(c.dtype, cpu[k].of_state[b], c.sizes[k], c.offsets.buffers[b], [] { return 0.0; });
    }
  }
  gpu = cpu;
  for (int step = 0; step < c.steps; ++step) {
    std::vector<StepShard> records;
    for (size_t k = 0; k < c.sizes.size(); ++k) {
      fill(c.dtype, cpu[k].grad, c.sizes[k], c.offsets.grad, [&] { return gradient(c, step, random); });
      gpu[k].grad = cpu[k].grad;
      if (c.adamw) {
        step_on_cpu(c.dtype, adamw_options(c), record(cpu[k], c, k));
      } else {
        step_on_cpu(c.dtype, c.options, record(cpu[k], c, k));
      }
      records.push_back(record(gpu[k], c, k));
    }
    int64_t launches = 0;
    if (step_on_gpu(c, records, &launches) != cudaSuccess) return std::printf("%s: no launch\n", c.name.c_str()), false;
    if (launches != c.launches) {
      return std::printf("%s: %lld launches\n", c.name.c_str(), static_cast<long long>(launches)), false;
    }
    for (size_t k = 0; k < c.sizes.size(); ++k) {
      for (Buffers* each : {&gpu[k], &cpu[k]}) {
        for (Buffer* buffer : {&each->param, &each->of_state[0], &each->of_state[1], &each->grad}) {
          unite_nans(c.dtype, *buffer);
        }
      }
      if (!same(gpu[k], cpu[k]))
        return std::printf("%s: tensor %zu differs in step %d\n", c.name.c_str(), k, step), false;
    }
  }
  std::printf("%s: %zu tensors agree\n", c.name.c_str(), c.sizes.size());
  return true;
}

// The kernels' own way to round eight numbers of 16 bits stochastically, from each finite number towards the next.
template <class S>
bool roundings_agree(const char* name, Random& random) {
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const double from = Storage<S>::load(S{static_cast<uint16_t>(pattern)});
    const double to = Storage<S>::load(S{static_cast<uint16_t>(pattern + 1)});
    float values[8] = {};
    for (int k = 0; k < 8; ++k) {
      const double shares[8] = {0, 0x1p-30, 0x1p-16, 1.0 / 3, 0.5, 0.75, 1 - 0x1p-13, 1 - 0x1p-24};
      values[k] = static_cast<float>(from + shares[k] * (to - from));
    }
    for (const uint32_t draw : {0u, 1u, 0xFFFFu, 0x8000u, static_cast<uint32_t>(random() % 0x10000)}) {
      S rounded[8];
      if (!round_eight(values, draw, rounded)) continue;
      for (int k = 0; k < 8; ++k) {
        if (rounded[k].bits != Storage<S>::store_stochastic(values[k], draw).bits) {
          return std::printf("%s: %a with draw %u differs\n", name, values[k], draw), false;
        }
      }
    }
  }
  return std::printf("%s: all numbers agree\n", name), true;
}

std::vector<Case> all_cases() {
  std::vector<Case> all = cases();
  for (const bool adamw : {false, true}) {
    const auto more = static_cast<size_t>(tensors_of_launch(adamw) + 2);
    all.push_back({"more than a launch holds", DType::kFloat32, base_options(), std::vector<int64_t>(more, 3), {}, 2});
    all.back().steps = 1;
    all.back().adamw = adamw;
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  Random random(1);
  bool good = true;
  if (is_chosen("rounding to bfloat16", argc, argv)) good = roundings_agree<BFloat16>("rounding to bfloat16", random);
  if (is_chosen("rounding to float16", argc, argv)) {
    good = good && roundings_agree<Float16>("rounding to float16", random);
  }
  for (const Case& c : all_cases()) {
    if (is_compiled(c.dtype) && is_chosen(c.name.c_str(), argc, argv)) good = good && run(c, random);
  }
  constexpr char kOptions[] = "options: ";
  for (int k = 1; k < argc; ++k) {
    if (std::strncmp(argv[k], kOptions, sizeof kOptions - 1) != 0) continue;
    good = good && run(described_case(argv[k] + sizeof kOptions - 1), random);
  }
  return good ? 0 : 1;
}
