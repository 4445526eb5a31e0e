// SPDX-License-Identifier: Apache-2.0
// calibrate_grad on the CPU: the gradient, shared by torch's threads.
#include "../cpu/calibrate_grad_cpu.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <mutex>

#include "calibrate_grad.h"

namespace csgd {

void calibrate_grad_cpu(DType dtype, const CalibrateGradCall& call, c10::Device) {
  const auto channels = static_cast<size_t>(call.channels);
  std::vector<double> scales(channels);  // room for numbers of either opmath
  calibrate_grad_scales(dtype, call, scales.data());
  std::vector<int64_t> largest_bits(channels, 0);
  int64_t moved = 0;
  std::mutex results;
  const CalibrateGradFunction calibrate = calibrate_grad_function(dtype);
  const auto run_grains = [&](int64_t first, int64_t last) {
    std::vector<int64_t> own_largest(channels, 0);
    const int64_t own_moved = calibrate(call, scales.data(), first * kCalibrateGradGrain,
                                        std::min(last * kCalibrateGradGrain, call.numel), own_largest.data());
    const std::lock_guard<std::mutex> lock(results);
    moved += own_moved;
    for (size_t c = 0; c < channels; ++c) largest_bits[c] = std::max(largest_bits[c], own_largest[c]);
  };
  at::parallel_for(0, (call.numel + kCalibrateGradGrain - 1) / kCalibrateGradGrain, 2, run_grains);
  calibrate_grad_finish(dtype, call, moved, largest_bits.data());
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { m.impl("calibrate_grad", calibrate_grad<calibrate_grad_cpu>); }

}  // namespace csgd
