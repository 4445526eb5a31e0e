// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' own source, emulated on the CPU, against the CPU loop: the same bits for sizes around every
// boundary, alignments, dtypes, options and many tensors. A program rather than a Python test, so that sanitizers can
// watch all of it. Usage: csgd_against_cpu_loop [old-driver]; exit status 0 if everything agrees. With "old-driver" the
// emulated driver takes 4 KB of kernel parameters only.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../../csrc/cpu/csgd_cpu.h"
#include "../../csrc/cuda/csgd_cuda.cu"
#include "compare.h"

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

struct Case {
  const char* name;
  DType dtype;
  CsgdOptions options;
  std::vector<int64_t> sizes;
  int offset;
  int64_t launches;      // expected of each step
  ShardLayout layout{};  // of all of them
  bool masks = false;
  bool histograms = false;  // of each of them
  bool together = false;    // one for all
  bool special = false;     // some gradients are infinite, NaN or the largest of the dtype
};

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

CsgdOptions base_options() {
  CsgdOptions o{};
  o.lr = 0.1;
  o.momentum = 0.9;
  o.one_minus_dampening = 1.0;
  o.calibration = 1.0;
  o.bound_decay = 0.99;
  o.seed = 0x123456789ABCDEFull;
  o.stochastic_rounding = true;
  return o;
}

std::vector<Case> cases() {
  static const float overflow = 2.0f, no_overflow = 0.0f, scale = 3.0f;
  static const float lr_tensor = 0.2f;
  // Around the thread's block, the warp's, the block's pass, and several passes.
  const std::vector<int64_t> boundaries = {0, 1, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 6143, 6145, 20000};
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({"boundaries", dtype, base_options(), boundaries, 0, 1});
  }
  const auto with = [&](const char* name, auto change, std::vector<int64_t> sizes, DType dtype, int offset = 0) {
    CsgdOptions o = base_options();
    change(o);
    all.push_back({name, dtype, o, std::move(sizes), offset, 1});
  };
  const std::vector<int64_t> some = {9, 2048, 5000};
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({.name = "infinite, NaN, too large",
                   .dtype = dtype,
                   .options = base_options(),
                   .sizes = some,
                   .offset = 0,
                   .launches = 1,
                   .special = true});
  }
  with("misaligned", [](CsgdOptions&) {}, some, DType::kFloat32, 1);
  with("misaligned bfloat16", [](CsgdOptions&) {}, some, DType::kBFloat16, 3);
  with("no momentum", [](CsgdOptions& o) { o.momentum = 0; }, some, DType::kFloat32);
  with("no momentum, bfloat16", [](CsgdOptions& o) { o.momentum = 0; }, some, DType::kBFloat16);
  with("weight decay", [](CsgdOptions& o) { o.weight_decay = 0.01; }, some, DType::kFloat32);
  with(
      "weight decay, nesterov, bfloat16", [](CsgdOptions& o) { o.weight_decay = 0.01, o.nesterov = true; }, some,
      DType::kBFloat16);
  with(
      "weight decay, no momentum", [](CsgdOptions& o) { o.weight_decay = 0.01, o.momentum = 0; }, some,
      DType::kFloat64);
  with("little moves", [](CsgdOptions& o) { o.calibration = 1e3; }, some, DType::kFloat32);
  with("little moves, bfloat16", [](CsgdOptions& o) { o.calibration = 1e3; }, some, DType::kBFloat16);
  with(
      "nesterov, nearest", [](CsgdOptions& o) { o.nesterov = true, o.stochastic_rounding = false; }, some,
      DType::kFloat16);
  with(
      "maximize, scaled", [&](CsgdOptions& o) { o.maximize = true, o.grad_scale = &scale, o.found_inf = &no_overflow; },
      some, DType::kFloat32);
  with("overflow", [&](CsgdOptions& o) { o.found_inf = &overflow; }, some, DType::kFloat32);
  with(
      "lr tensor, no calibration", [&](CsgdOptions& o) { o.lr_float32 = &lr_tensor, o.calibration = 0; }, some,
      DType::kFloat64);
  const auto shard = [&](const char* name, DType dtype, ShardLayout layout) {
    all.push_back({name, dtype, base_options(), {0, 1, 7, 8, 9, 2049, 5000}, 0, 1, layout});
  };
  shard("shard of rows", DType::kFloat32, {8 * 1001, 5000, 5000, 1, 5000});
  shard("shard of rows, bfloat16, from within a block", DType::kBFloat16, {1003, 5000, 5000, 1, 5000});
  shard("shard of columns, blocks of 8", DType::kFloat32, {16, 24, 64, 1000, 64000});
  shard("shard of columns", DType::kFloat64, {5, 3, 10, 1000, 10000});
  shard("shard of columns, float16", DType::kFloat16, {(int64_t{1} << 36) - 40, 9, 27, 1000, 27000});
  shard("single columns", DType::kBFloat16, {2, 1, 7, 9999, 69993});
  shard("shard of two dimensions", DType::kFloat32, {33, 5, 12, 3, 60});
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({.name = "counted and masked",
                   .dtype = dtype,
                   .options = base_options(),
                   .sizes = boundaries,
                   .offset = 0,
                   .launches = 1,
                   .masks = true,
                   .histograms = true});
  }
  const auto pruned = [&](const char* name, auto change, bool masks, bool histograms, bool together, int offset) {
    CsgdOptions o = base_options();
    change(o);
    all.push_back({.name = name,
                   .dtype = DType::kFloat32,
                   .options = o,
                   .sizes = {9, 2048, 0, 5000},
                   .offset = offset,
                   .launches = 1,
                   .masks = masks,
                   .histograms = histograms,
                   .together = together});
  };
  pruned("masked", [](CsgdOptions&) {}, true, false, false, 0);
  pruned("masked, weight decay", [](CsgdOptions& o) { o.weight_decay = 0.01; }, true, false, false, 0);
  pruned("counted together", [](CsgdOptions&) {}, false, true, true, 0);
  pruned("counted, weight decay", [](CsgdOptions& o) { o.weight_decay = 0.01; }, false, true, false, 0);
  pruned("counted where little moves", [](CsgdOptions& o) { o.calibration = 1e6; }, true, true, true, 0);
  pruned("counted, misaligned", [](CsgdOptions&) {}, true, true, false, 1);
  pruned("counted, overflow", [&](CsgdOptions& o) { o.found_inf = &overflow; }, true, true, false, 0);
  all.push_back({"many tensors", DType::kFloat32, base_options(), std::vector<int64_t>(161, 40), 0, 1});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937_64 random(1);
  if (argc > 1 && std::strcmp(argv[1], "old-driver") == 0) {
    cuda_emulation::driver_version = 12000;
    const int64_t small = Launch<kSmallLaunch, float, CsgdTensor>::kTensors;
    const int64_t launches = (161 + small - 1) / small;
    return run({"old driver", DType::kFloat32, base_options(), std::vector<int64_t>(161, 9), 0, launches}, random) ? 0
                                                                                                                   : 1;
  }
  bool good = roundings_agree<BFloat16>("rounding to bfloat16", random);
  good = good && roundings_agree<Float16>("rounding to float16", random);
  for (const Case& c : cases()) good = good && run(c, random);
  // A card of one multiprocessor: chunks of several passes, and blocks that come in any order.
  cuda_emulation::multiprocessors = 1;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    good = good && run({"several passes", dtype, base_options(), {100000, 3}, 0, 1}, random);
  }
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
