// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' own source, emulated on the CPU, against the CPU loop: the same bits for sizes around every
// boundary, alignments, dtypes, options and many tensors. A program rather than a Python test, so that sanitizers can
// watch all of it. Usage: csgd_against_cpu_loop [old-driver]; exit status 0 if everything agrees. With "old-driver" the
// emulated driver takes 4 KB of kernel parameters only.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../../../csrc/cpu/csgd_cpu.h"
#include "../../../csrc/cuda/csgd_cuda.cu"
#include "compare.h"
#include "csgd_cases.h"

using namespace csgd;

namespace {

// One tensor with all it needs, on one side of the comparison. `offset` elements before the data misalign it.
struct Buffers {
  Buffer param, grad, momentum_buffer;
  std::vector<unsigned char> mask;  // of bytes, since std::vector<bool> has none to point at
  std::vector<int64_t> histogram;
  int64_t step = 0;
  double bound = 0;
  CsgdTally tally{};
};

CsgdPruned record(Buffers& b, DType dtype, int64_t numel, uint32_t index, int offset, bool momentum) {
  CsgdPruned t{};
  t.param = data_of(b.param, dtype, offset);
  t.grad = data_of(b.grad, dtype, offset);
  t.momentum_buffer = momentum ? data_of(b.momentum_buffer, dtype, offset) : nullptr;
  t.step = &b.step;
  t.bound = &b.bound;
  t.tally = &b.tally;
  t.numel = numel;
  t.index = index;
  if (!b.mask.empty()) t.mask = reinterpret_cast<const bool*>(b.mask.data()) + offset;
  if (!b.histogram.empty()) t.histogram = b.histogram.data();
  return t;
}

void step_on_cpu(DType dtype, const CsgdOptions& options, const CsgdPruned& tensor) {
  if (overflowed(options)) return;
  ChunkResult total;
  for (int64_t begin = 0; begin < tensor.numel; begin += kCpuChunk) {
    const ChunkResult r = csgd_chunk_function(dtype)(options, tensor, begin, std::min(begin + kCpuChunk, tensor.numel));
    total.largest_bits = std::max(total.largest_bits, r.largest_bits);
    total.moved += r.moved;
  }
  csgd_finish_tensor(dtype, options, tensor, total);
}

bool same(const Buffers& a, const Buffers& b) {
  const CsgdTally& t = a.tally;
  return same_bits(a.param, b.param) && same_bits(a.momentum_buffer, b.momentum_buffer) && same_bits(a.grad, b.grad) &&
         same_bits(a.histogram, b.histogram) && a.step == b.step &&
         std::memcmp(&a.bound, &b.bound, sizeof a.bound) == 0 && t.moved == b.tally.moved && t.largest_bits == 0 &&
         t.moving == 0 && t.blocks_done == 0;
}

cudaError_t step_on_gpu(const Case& c, const std::vector<CsgdPruned>& pruned, int64_t* launches) {
  const auto count = static_cast<int64_t>(pruned.size());
  if (c.masks || c.histograms) {
    return launch_csgd_cuda(c.dtype, c.options, pruned.data(), count, nullptr, launches);
  }
  const std::vector<CsgdShard> records(pruned.begin(), pruned.end());
  if (c.layout.run_length > 0) {
    return launch_csgd_cuda(c.dtype, c.options, records.data(), count, nullptr, launches);
  }
  const std::vector<CsgdTensor> whole(records.begin(), records.end());
  return launch_csgd_cuda(c.dtype, c.options, whole.data(), count, nullptr, launches);
}

// Of the largest bfloat16 the steps below lead to numbers between it and the largest float32.
constexpr double kLargestBFloat16 = 0x1.FEp127, kStepBeyond = 4e36;

double parameter(const Case& c, std::mt19937_64& random) {
  return c.special && random() % 7 == 0 ? kLargestBFloat16 : heavy_tailed(random);
}

double gradient(const Case& c, std::mt19937_64& random) {
  if (c.special && random() % 20 == 0) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double some[] = {infinity,          -infinity,   std::numeric_limits<double>::quiet_NaN(),
                           -kLargestBFloat16, kStepBeyond, -kStepBeyond,
                           -kStepBeyond};
    return some[random() % std::size(some)];
  }
  return 0.1 * heavy_tailed(random);
}

bool run(const Case& c, std::mt19937_64& random) {
  const bool momentum = c.options.momentum != 0;
  std::vector<Buffers> cpu(c.sizes.size()), gpu;
  for (size_t k = 0; k < c.sizes.size(); ++k) {
    fill(c.dtype, cpu[k].param, c.sizes[k], c.offset, [&] { return parameter(c, random); });
    fill(c.dtype, cpu[k].momentum_buffer, c.sizes[k], c.offset, [] { return 0.0; });
    if (c.masks) cpu[k].mask.assign(static_cast<size_t>(c.sizes[k] + c.offset) + 1, 1);
    for (auto& alive : cpu[k].mask) alive = random() % 3 != 0;
    if (c.histograms) cpu[k].histogram.assign(kBins, 0);
  }
  gpu = cpu;
  for (int step = 0; step < 3; ++step) {
    std::vector<CsgdPruned> records;
    for (size_t k = 0; k < c.sizes.size(); ++k) {
      fill(c.dtype, cpu[k].grad, c.sizes[k], c.offset, [&] { return gradient(c, random); });
      gpu[k].grad = cpu[k].grad;
      const auto index = static_cast<uint32_t>(k);
      CsgdPruned on_cpu = record(cpu[k], c.dtype, c.sizes[k], index, c.offset, momentum);
      on_cpu.layout = c.layout;
      if (c.together) on_cpu.histogram = cpu[0].histogram.data();
      step_on_cpu(c.dtype, c.options, on_cpu);
      records.push_back(record(gpu[k], c.dtype, c.sizes[k], index, c.offset, momentum));
      records.back().layout = c.layout;
      if (c.together) records.back().histogram = gpu[0].histogram.data();
    }
    int64_t launches = 0;
    if (step_on_gpu(c, records, &launches) != cudaSuccess) return false;
    if (launches != c.launches) {
      return std::printf("%s: %lld launches\n", c.name, static_cast<long long>(launches)), false;
    }
    for (size_t k = 0; k < c.sizes.size(); ++k) {
      for (Buffers* each : {&gpu[k], &cpu[k]}) {
        for (Buffer* buffer : {&each->param, &each->momentum_buffer, &each->grad}) unite_nans(c.dtype, *buffer);
      }
      if (!same(gpu[k], cpu[k])) return std::printf("%s: tensor %zu differs in step %d\n", c.name, k, step), false;
    }
  }
  std::printf("%s: %zu tensors agree\n", c.name, c.sizes.size());
  return true;
}

// The kernels' own way to round eight numbers of 16 bits stochastically, from each finite number towards the next.
template <class S>
bool roundings_agree(const char* name, std::mt19937_64& random) {
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const double from = Storage<S>::load(S{static_cast<uint16_t>(pattern)});
    const double to = Storage<S>::load(S{static_cast<uint16_t>(pattern + 1)});
    float values[kPerThread] = {};
    for (int k = 0; k < kPerThread; ++k) {
      const double shares[kPerThread] = {0, 0x1p-30, 0x1p-16, 1.0 / 3, 0.5, 0.75, 1 - 0x1p-13, 1 - 0x1p-24};
      values[k] = static_cast<float>(from + shares[k] * (to - from));
    }
    if (!are_ordinary<S>(values)) continue;
    for (const uint32_t all : {0u, 1u, 0xFFFFu, 0x8000u, static_cast<uint32_t>(random() % 0x10000)}) {
      const uint32_t word = all | all << 16;
      Vector<S> rounded;
      round_ordinary({{word, word, word, word}}, values, rounded);
      for (int k = 0; k < kPerThread; ++k) {
        if (rounded.value[k].bits != Storage<S>::store_stochastic(values[k], all).bits) {
          return std::printf("%s: %a with draw %u differs\n", name, values[k], all), false;
        }
      }
    }
  }
  return std::printf("%s: all numbers agree\n", name), true;
}

// Before CUDA 12.1 a launch holds fewer tensors, and its kernels decide while running what the options ask for.
bool run_old_driver(std::mt19937_64& random) {
  cuda_emulation::driver_version = 12000;
  const int64_t small = Launch<kSmallLaunch, float, CsgdTensor>::kTensors;
  const int64_t launches = (161 + small - 1) / small;
  bool good = run({"old driver", DType::kFloat32, base_options(), std::vector<int64_t>(161, 9), 0, launches}, random);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const double momentum : {0.9, 0.0}) {
      Case c = {"old driver", dtype, base_options(), {9, 300, 5000}, 0, 1};
      c.options.momentum = momentum;
      good = good && run(c, random);
      c.options.weight_decay = 0.01;
      good = good && run(c, random);
    }
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937_64 random(1);
  if (argc > 1 && std::strcmp(argv[1], "old-driver") == 0) return run_old_driver(random) ? 0 : 1;
  bool good = roundings_agree<BFloat16>("rounding to bfloat16", random);
  good = good && roundings_agree<Float16>("rounding to float16", random);
  for (const Case& c : cases()) good = good && run(c, random);
  // A card of one multiprocessor: chunks of several passes, and blocks that come in any order.
  cuda_emulation::multiprocessors = 1;
  for (const Case& c : several_passes()) good = good && run(c, random);
  good = good && run({.name = "counted in several passes",
                      .dtype = DType::kFloat32,
                      .options = base_options(),
                      .sizes = {100000, 3},
                      .offset = 0,
                      .launches = 1,
                      .masks = true,
                      .histograms = true,
                      .together = true},
                     random);
  const int64_t more = Launch<kLargeLaunch, float, CsgdTensor>::kTensors + 2;
  good = good && run({"more than a launch holds", DType::kFloat32, base_options(),
                      std::vector<int64_t>(static_cast<size_t>(more), 3), 0, 2},
                     random);
  return good ? 0 : 1;
}
