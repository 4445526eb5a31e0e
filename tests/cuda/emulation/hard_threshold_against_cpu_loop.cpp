// SPDX-License-Identifier: Apache-2.0
// The kernels of hard thresholding, their own source emulated on the CPU, against the CPU loops: the same bits of the
// parameters, momentum buffers, masks and norms, and exactly k survivors. Usage: hard_threshold_against_cpu_loop
// [CASE]; exit status 0 if everything agrees.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>

#include "compare.h"
#include "csrc/cpu/hard_threshold_cpu.h"
#include "csrc/cuda/hard_threshold_cuda.h"

using namespace csgd;

namespace {

enum class Values { kHeavyTailed, kTies, kZeros, kSpecials };

struct Case {
  const char* name;
  std::vector<int64_t> sizes;
  int64_t keep = 0;
  std::vector<DType> dtypes = {DType::kFloat32};
  Values values = Values::kHeavyTailed;
  bool across = false;
  bool with_momentum = true;
  bool with_masks = false;
  int offset = 0;  // elements that misalign
  int64_t channels = 0;
  int64_t inner = 1;
  float found_inf = 0;
  int multiprocessors = 2;
};

// What one side of the comparison works on. Masks are of bytes, since std::vector<bool> has none to point at.
struct Tensor {
  Buffer data, momentum_buffer;
  std::vector<unsigned char> mask;
  std::vector<double> norms;
};

bool is_compiled(const Case& c) {
  return std::all_of(c.dtypes.begin(), c.dtypes.end(), [](DType dtype) { return csgd::is_compiled(dtype); });
}

double value_for(Values kind, int64_t i, Random& random) {
  static const double inf = std::numeric_limits<double>::infinity();
  static const double specials[] = {NAN, inf, -inf, 0.0, -0.0, 1e-310, 1e-40, 65504.0, -NAN};
  switch (kind) {
    case Values::kTies: return static_cast<double>(random() % 5) - 2;
    case Values::kZeros: return random() % 4 == 0 ? random.heavy_tailed() : i % 2 == 0 ? 0.0 : -0.0;
    case Values::kSpecials: return i % 3 == 1 ? specials[random() % 9] : random.heavy_tailed();
    default: return random.heavy_tailed();
  }
}

std::vector<Tensor> make_tensors(const Case& c) {
  Random random(c.sizes.size() + static_cast<uint64_t>(c.sizes[0]));
  std::vector<Tensor> tensors(c.sizes.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    const DType dtype = c.dtypes[t % c.dtypes.size()];
    int64_t i = 0;
    fill(dtype, tensors[t].data, c.sizes[t], c.offset, [&] { return value_for(c.values, i++, random); });
    fill(dtype, tensors[t].momentum_buffer, c.sizes[t], c.offset, [] { return 3.0; });
    const int64_t entries = c.channels != 0 ? c.channels : c.sizes[t];
    tensors[t].mask.assign(static_cast<size_t>(entries), 1);
    for (auto& alive : tensors[t].mask) alive = random() % 3 != 0;
    tensors[t].norms.assign(static_cast<size_t>(entries), -1.0);
  }
  return tensors;
}

std::vector<ThresholdTensor> records_of(const Case& c, std::vector<Tensor>& tensors) {
  std::vector<ThresholdTensor> records;
  int64_t total = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    ThresholdTensor r{};
    r.dtype = c.dtypes[t % c.dtypes.size()];
    r.data = data_of(tensors[t].data, r.dtype, c.offset);
    if (c.with_momentum) r.momentum_buffer = data_of(tensors[t].momentum_buffer, r.dtype, c.offset);
    if (c.with_masks) r.mask = reinterpret_cast<bool*>(tensors[t].mask.data());
    r.norms = tensors[t].norms.data();
    r.numel = c.sizes[t];
    r.channels = c.channels != 0 ? c.channels : c.sizes[t];
    r.inner = c.inner;
    r.first = c.across ? total : 0;
    r.keep = c.keep;
    r.total = c.sizes[t];
    r.selection = c.across ? 0 : static_cast<int64_t>(t);
    total += c.sizes[t];
    records.push_back(r);
  }
  for (ThresholdTensor& r : records) r.total = c.across ? total : r.total;
  return records;
}

// How many elements were not dropped, by their momentum, which is nowhere 0 before.
int64_t survivors(const Case& c, const std::vector<ThresholdTensor>& records) {
  int64_t count = 0;
  for (const ThresholdTensor& r : records) {
    const size_t size = size_of(r.dtype);
    for (int64_t i = 0; i < r.numel; ++i) {
      const char* at = static_cast<const char*>(r.momentum_buffer) + static_cast<size_t>(i) * size;
      static const char zeros[8] = {};
      count += std::memcmp(at, zeros, size) != 0 ? 1 : 0;
    }
    if (!c.across && count != std::min(c.keep, r.total)) return -1;
    if (!c.across) count = 0;
  }
  return count;
}

// NaN of any sign and payload is the same norm.
bool same_norms(const std::vector<double>& a, const std::vector<double>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) {
    same = std::isnan(a[i]) ? std::isnan(b[i]) : bit_cast<uint64_t>(a[i]) == bit_cast<uint64_t>(b[i]);
  }
  return same;
}

bool report(const Case& c, const char* work, const std::vector<Tensor>& gpu, const std::vector<Tensor>& cpu) {
  const char* what = nullptr;
  for (size_t t = 0; t < gpu.size(); ++t) {
    if (!same_bits(gpu[t].data, cpu[t].data)) what = "a parameter";
    if (!same_bits(gpu[t].momentum_buffer, cpu[t].momentum_buffer)) what = "a momentum buffer";
    if (!same_bits(gpu[t].mask, cpu[t].mask)) what = "a mask";
    if (!same_norms(gpu[t].norms, cpu[t].norms)) what = "a norm";
  }
  std::printf("%s, %s, %lld elements, k = %lld: %s %s\n", work, c.name, static_cast<long long>(c.sizes[0]),
              static_cast<long long>(c.keep), what == nullptr ? "all" : what, what == nullptr ? "agree" : "differs");
  return what == nullptr;
}

void serial(int64_t count, const Ranges& work) {
  for (int64_t i = 0; i < count; ++i) work(i, i + 1);
}

using OnCpu = void (*)(const std::vector<ThresholdTensor>&, const ParallelFor&);
using OnGpu = cudaError_t (*)(std::vector<ThresholdTensor>, const float*, cudaStream_t);

cudaError_t select_on_gpu(std::vector<ThresholdTensor> records, const float* found_inf, cudaStream_t stream) {
  std::vector<SelectionScratch> scratch(records.size());
  const cudaError_t error = launch_hard_threshold_select_cuda(records, scratch.data(), found_inf, stream);
  for (const SelectionScratch& s : scratch) {
    for (const unsigned long long bin : s.bins) {
      if (bin != 0 || s.blocks_done != 0) return cudaErrorInvalidValue;
    }
  }
  return error;
}

bool run(const Case& c, const char* work, OnGpu on_gpu, OnCpu on_cpu) {
  cuda_emulation::multiprocessors = c.multiprocessors;
  std::vector<Tensor> cpu = make_tensors(c), gpu = cpu;
  if (c.found_inf == 0) on_cpu(records_of(c, cpu), serial);
  if (on_gpu(records_of(c, gpu), &c.found_inf, nullptr) != cudaSuccess) {
    return std::printf("%s, %s: the launch or its scratch differs from what is expected\n", work, c.name), false;
  }
  return report(c, work, gpu, cpu);
}

bool run_select(const Case& c) {
  if (!run(c, "select", select_on_gpu, hard_threshold_select_cpu)) return false;
  if (c.with_masks || !c.with_momentum || c.found_inf != 0) return true;
  std::vector<Tensor> cpu = make_tensors(c);
  const std::vector<ThresholdTensor> records = records_of(c, cpu);
  hard_threshold_select_cpu(records, serial);
  const int64_t expected = c.across ? std::min(c.keep, records[0].total) : 0;
  if (survivors(c, records) == expected) return true;
  return std::printf("%s: the number of survivors differs from k\n", c.name), false;
}

std::vector<Case> select_cases() {
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  std::vector<Case> all;
  // Around a thread's eight, the warp's, the block's pass, and many blocks.
  for (const int64_t numel : {0, 1, 7, 8, 9, 257, 511, 513, 2049}) {
    all.push_back({.name = "sizes", .sizes = {numel}, .keep = numel / 3});
    if (numel > 1) all.push_back({.name = "sizes", .sizes = {numel}, .keep = numel - 1});
  }
  for (const DType dtype : kAll) {
    for (const Values values : {Values::kHeavyTailed, Values::kTies, Values::kZeros, Values::kSpecials}) {
      all.push_back({.name = "dtypes", .sizes = {700}, .keep = 251, .dtypes = {dtype}, .values = values});
    }
    all.push_back({.name = "specials", .sizes = {500}, .keep = 40, .dtypes = {dtype}, .values = Values::kSpecials});
    all.push_back({.name = "masks",
                   .sizes = {700, 300},
                   .keep = 150,
                   .dtypes = {dtype},
                   .values = Values::kTies,
                   .with_masks = true});
  }
  all.push_back({.name = "all survive", .sizes = {900}, .keep = 900});
  all.push_back({.name = "nothing survives", .sizes = {900}, .keep = 0});
  all.push_back({.name = "more than are alive", .sizes = {1000}, .keep = 900, .with_masks = true});
  all.push_back({.name = "misaligned", .sizes = {3000}, .keep = 100, .offset = 1});
  all.push_back({.name = "misaligned", .sizes = {3000}, .keep = 100, .dtypes = {DType::kBFloat16}, .offset = 3});
  all.push_back({.name = "no momentum", .sizes = {3000}, .keep = 100, .with_momentum = false});
  all.push_back({.name = "overflow", .sizes = {3000}, .keep = 100, .found_inf = 2});
  std::vector<int64_t> many;
  for (int64_t n = 0; n < 90; ++n) many.push_back(n * 7 % 41);
  all.push_back({.name = "tensors of several launches", .sizes = many, .keep = 9, .values = Values::kTies});
  all.push_back({.name = "across launches", .sizes = many, .keep = 700, .values = Values::kTies, .across = true});
  all.push_back({.name = "across", .sizes = {5000, 0, 1200, 3}, .keep = 1100, .across = true});
  all.push_back(
      {.name = "across, zeros", .sizes = {2001, 1203, 3}, .keep = 2500, .values = Values::kZeros, .across = true});
  all.push_back({.name = "across dtypes",
                 .sizes = {600, 1, 1200, 900},
                 .keep = 800,
                 .dtypes = {DType::kBFloat16, DType::kFloat32, DType::kFloat16},
                 .values = Values::kTies,
                 .across = true});
  all.push_back({.name = "dtypes each on their own",
                 .sizes = {600, 700, 1200, 900, 600},
                 .keep = 400,
                 .dtypes = {DType::kBFloat16, DType::kFloat64, DType::kFloat32, DType::kFloat16}});
  // A card of one multiprocessor: blocks take several passes, and come in any order.
  all.push_back({.name = "several passes", .sizes = {100000}, .keep = 20000, .multiprocessors = 1});
  all.push_back(
      {.name = "several passes", .sizes = {60000, 50000}, .keep = 99, .values = Values::kZeros, .multiprocessors = 1});
  return all;
}

struct Kernel {
  const char* name;
  OnGpu on_gpu;
  OnCpu on_cpu;
};
constexpr Kernel kNorms{"norms", launch_hard_threshold_norms_cuda, hard_threshold_norms_cpu};
constexpr Kernel kMasks{"masks", launch_hard_threshold_masks_cuda, hard_threshold_masks_cpu};
constexpr Kernel kTwoOfFour{"two of four", launch_hard_threshold_two_of_four_cuda, hard_threshold_two_of_four_cpu};

std::vector<std::pair<Kernel, Case>> other_cases() {
  std::vector<std::pair<Kernel, Case>> all;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const Values values : {Values::kTies, Values::kSpecials}) {
      for (const int64_t inner : {1, 9}) {
        Case c{.name = "channels",
               .sizes = {12 * 9 * inner, 12 * inner, 0},
               .dtypes = {dtype},
               .values = values,
               .channels = 12,
               .inner = inner};
        all.push_back({kTwoOfFour, c});
        c.with_masks = true;  // one entry for each channel, where 2:4 has one for each element
        all.push_back({kMasks, c});
        c.sizes.pop_back();
        all.push_back({kNorms, c});
      }
    }
  }
  all.push_back({kMasks, {.name = "masks of elements", .sizes = {1200}, .values = Values::kTies, .with_masks = true}});
  all.push_back({kNorms, {.name = "a filter of many elements", .sizes = {5 * 3333}, .channels = 5, .inner = 3333}});
  for (const Kernel& kernel : {kTwoOfFour, kMasks, kNorms}) {
    all.push_back({kernel, {.name = "overflow", .sizes = {120}, .with_masks = true, .channels = 12, .found_inf = 1}});
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool good = true;
  for (const Case& c : select_cases()) {
    if (is_compiled(c) && is_chosen(c.name, argc, argv)) good = good && run_select(c);
  }
  for (const auto& [kernel, c] : other_cases()) {
    if (is_compiled(c) && is_chosen(kernel.name, argc, argv)) {
      good = good && run(c, kernel.name, kernel.on_gpu, kernel.on_cpu);
    }
  }
  return good ? 0 : 1;
}
