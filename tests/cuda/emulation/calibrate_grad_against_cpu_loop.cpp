// SPDX-License-Identifier: Apache-2.0
// The kernel of calibrate_grad, its own source emulated on the CPU, against the CPU loop: the same bits of the result,
// the bounds, the step and the tally, over several calls in a row. Usage: calibrate_grad_against_cpu_loop [CASE]; exit
// status 0 if everything agrees.
#include <cmath>
#include <cstdio>
#include <limits>

#include "compare.h"
#include "csrc/cpu/calibrate_grad_cpu.h"
#include "csrc/cuda/calibrate_grad_cuda.h"

using namespace csgd;

namespace {

struct Case {
  const char* name;
  DType dtype = DType::kFloat32;
  int64_t numel = 5000;
  int64_t channels = 1;
  int64_t inner = 1;
  int grad_offset = 0;  // elements that misalign
  int out_offset = 0;
  bool fixed_lipschitz = false;
  bool specials = false;  // NaN and Inf among the gradients
  double calibration = 1.0;
  double bound_decay = 0.9;
  bool stochastic_rounding = true;
  uint32_t rank = 0;
  int64_t first_step = 0;
  int multiprocessors = 2;
};

// What one side of the comparison works on.
struct Buffers {
  Buffer grad, out, bounds;
  std::vector<unsigned long long> tally;
  std::vector<int64_t> step, index;  // of one element
};

constexpr int64_t kIndex = 5;
constexpr int kCalls = 3;

Buffers make_buffers(const Case& c) {
  Buffers b;
  b.bounds.assign(static_cast<size_t>(c.channels), 0.0);
  b.tally.assign(sizeof(CalibrationTally) / sizeof(b.tally[0]) + static_cast<size_t>(c.channels), 0);
  b.step = {c.first_step};
  b.index = {kIndex};
  return b;
}

CalibrateGradCall call_of(const Case& c, Buffers& b) {
  CalibrateGradCall call{};
  call.grad = data_of(b.grad, c.dtype, c.grad_offset);
  call.out = data_of(b.out, c.dtype, c.out_offset);
  call.index = b.index.data();
  call.step = b.step.data();
  call.bounds = c.fixed_lipschitz ? nullptr : b.bounds.data();
  call.tally = reinterpret_cast<CalibrationTally*>(b.tally.data());
  call.numel = c.numel;
  call.channels = c.channels;
  call.inner = c.inner;
  call.calibration = c.calibration;
  call.lipschitz = 0.2;
  call.bound_decay = c.bound_decay;
  call.seed = 0x123456789ABCDEFull;
  call.stochastic_rounding = c.stochastic_rounding;
  call.rank = c.rank;
  return call;
}

void calibrate_on_cpu(DType dtype, const CalibrateGradCall& call) {
  const auto channels = static_cast<size_t>(call.channels);
  std::vector<double> scales(channels);
  std::vector<int64_t> largest_bits(channels, 0);
  calibrate_grad_scales(dtype, call, scales.data());
  int64_t moved = 0;
  for (int64_t begin = 0; begin < call.numel; begin += kCalibrateGradGrain) {
    const int64_t end = std::min(begin + kCalibrateGradGrain, call.numel);
    moved += calibrate_grad_function(dtype)(call, scales.data(), begin, end, largest_bits.data());
  }
  calibrate_grad_finish(dtype, call, moved, largest_bits.data());
}

void fill_grad(const Case& c, Buffer& grad, Random& random) {
  static const double inf = std::numeric_limits<double>::infinity();
  static const double specials[] = {NAN, inf, -inf, 0.0, -0.0, 1e-310, 1e-40, 65504.0};
  int64_t i = 0;
  fill(c.dtype, grad, c.numel, c.grad_offset, [&] {
    const int64_t k = i++;
    return c.specials && k % 5 == 2 ? specials[k / 5 % 8] : 0.1 * random.heavy_tailed();
  });
}

// What differs, or null. The CPU leaves the tally's scratch words zero, as they must be after a launch.
const char* difference(const Buffers& gpu, const Buffers& cpu) {
  if (!same_bits(gpu.out, cpu.out)) return "the result";
  if (!same_bits(gpu.bounds, cpu.bounds)) return "a bound";
  if (!same_bits(gpu.tally, cpu.tally)) return "the tally";
  if (!same_bits(gpu.grad, cpu.grad)) return "the gradient, which is only read,";
  return gpu.step == cpu.step ? nullptr : "the step";
}

bool run(const Case& c) {
  cuda_emulation::multiprocessors = c.multiprocessors;
  Random random(static_cast<uint64_t>(c.numel));
  Buffers cpu = make_buffers(c), gpu = cpu;
  for (int k = 0; k < kCalls; ++k) {
    fill_grad(c, cpu.grad, random);
    // Not zero: what is not written, and what is written beyond the end, shows.
    fill(c.dtype, cpu.out, c.numel, c.out_offset, [] { return 77.0; });
    gpu.grad = cpu.grad;
    gpu.out = cpu.out;
    calibrate_on_cpu(c.dtype, call_of(c, cpu));
    if (launch_calibrate_grad_cuda(c.dtype, call_of(c, gpu), nullptr) != cudaSuccess) return false;
    for (Buffer* out : {&cpu.out, &gpu.out}) unite_nans(c.dtype, *out);
    if (const char* what = difference(gpu, cpu)) {
      return std::printf("%s, %lld elements: %s differs after call %d\n", c.name, static_cast<long long>(c.numel), what,
                         k + 1),
             false;
    }
  }
  std::printf("%s, %lld elements: agree\n", c.name, static_cast<long long>(c.numel));
  return true;
}

std::vector<Case> cases() {
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};
  std::vector<Case> all;
  // Around a thread's eight, the warp's, the block's pass, and many blocks.
  for (const int64_t numel : {0, 1, 7, 8, 9, 255, 256, 257, 511, 513, 2047, 2048, 2049, 20000}) {
    all.push_back({.name = "one bound", .numel = numel});
    all.push_back({.name = "channels", .dtype = DType::kBFloat16, .numel = numel, .channels = 3, .inner = 3});
  }
  for (const DType dtype : kAll) {
    all.push_back({.name = "dtypes", .dtype = dtype, .numel = 4100});
    all.push_back({.name = "dtypes, channels last", .dtype = dtype, .numel = 4096, .channels = 64});
    all.push_back({.name = "dtypes, NaN and Inf", .dtype = dtype, .numel = 1003, .specials = true});
    all.push_back(
        {.name = "channels, NaN and Inf", .dtype = dtype, .numel = 1008, .channels = 7, .inner = 9, .specials = true});
    all.push_back({.name = "nearest", .dtype = dtype, .numel = 1000, .stochastic_rounding = false});
  }
  for (const int64_t inner : {1, 2, 3, 5, 8, 9, 64, 1000}) {
    all.push_back({.name = "runs of all lengths", .numel = 6 * inner * 20 + 1, .channels = 6, .inner = inner});
  }
  all.push_back({.name = "3 channels", .numel = 9999, .channels = 3});
  all.push_back({.name = "more channels than elements of a block", .numel = 2 * 2500, .channels = 2500});
  all.push_back({.name = "a channel for each element", .numel = 700, .channels = 700});
  all.push_back({.name = "no channels", .numel = 0, .channels = 0});
  all.push_back({.name = "misaligned", .grad_offset = 1, .out_offset = 1});
  all.push_back({.name = "misaligned gradient", .dtype = DType::kBFloat16, .grad_offset = 3});
  all.push_back({.name = "misaligned result", .dtype = DType::kFloat16, .out_offset = 5});
  all.push_back({.name = "fixed Lipschitz constant", .fixed_lipschitz = true});
  all.push_back({.name = "no calibration", .numel = 4999, .calibration = 0.0});
  all.push_back({.name = "strong calibration", .calibration = 30.0});
  all.push_back({.name = "no decay", .channels = 5, .inner = 25, .bound_decay = 1.0});
  all.push_back({.name = "quick decay", .channels = 5, .inner = 25, .bound_decay = 0.1});
  all.push_back({.name = "bounds forgotten", .bound_decay = 0.0});
  all.push_back({.name = "another rank", .dtype = DType::kBFloat16, .rank = 65535});
  all.push_back({.name = "steps beyond 32 bits", .numel = 1000, .first_step = 0xFFFFFFFF});
  // A card of one multiprocessor: blocks take several passes, and come in any order.
  all.push_back({.name = "several passes", .numel = 100000, .multiprocessors = 1});
  all.push_back(
      {.name = "several passes, channels", .numel = 98304, .channels = 48, .inner = 16, .multiprocessors = 1});
  all.push_back({.name = "several passes, channels last", .numel = 98304, .channels = 3, .multiprocessors = 1});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool good = true;
  for (const Case& c : cases()) {
    if (is_compiled(c.dtype) && is_chosen(c.name, argc, argv)) good = good && run(c);
  }
  return good ? 0 : 1;
}
