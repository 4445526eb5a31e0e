// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::calibrate_grad on torch's side: its arguments, their checks, and their packing into the plain
// struct of csrc/core. Each device adds one function that runs the packed call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../core/params.h"

namespace csgd {

constexpr int64_t kMostRanks = 1 << 16;
constexpr int64_t kCalibrationTallyWords = sizeof(CalibrationTally) / sizeof(int64_t);

struct CalibrateGradArgs {
  const at::Tensor& grad;
  const at::Tensor& index;
  const at::Tensor& step;
  const std::optional<at::Tensor>& lipschitz_bound;
  const std::optional<at::Tensor>& tally;
  int64_t channel_dim;
  double calibration;
  std::optional<double> lipschitz;
  double bound_decay;
  std::string_view rounding;
  int64_t seed;  // the bits of an unsigned 64-bit number
  int64_t rank;
};

// Everything that can be wrong with the arguments, before anything is changed.
void check_calibrate_grad(const CalibrateGradArgs& args);

using RunCalibrateGrad = void (*)(DType, const CalibrateGradCall&, c10::Device);
void calibrate_grad_cpu(DType dtype, const CalibrateGradCall& call, c10::Device device);
void calibrate_grad_cuda(DType dtype, const CalibrateGradCall& call, c10::Device device);
[[noreturn]] void calibrate_grad_nowhere(DType dtype, const CalibrateGradCall& call, c10::Device device);

// Checks, packs, runs; returns the calibrated gradient.
at::Tensor run_calibrate_grad(const CalibrateGradArgs& args, RunCalibrateGrad run);

// The kernel of the operator for one device.
template <RunCalibrateGrad run>
at::Tensor calibrate_grad(const at::Tensor& grad, const at::Tensor& index, const at::Tensor& step,
                          const std::optional<at::Tensor>& lipschitz_bound, const std::optional<at::Tensor>& tally,
                          int64_t channel_dim, double calibration, std::optional<double> lipschitz, double bound_decay,
                          std::string_view rounding, int64_t seed, int64_t rank) {
  return run_calibrate_grad({grad, index, step, lipschitz_bound, tally, channel_dim, calibration, lipschitz,
                             bound_decay, rounding, seed, rank},
                            run);
}

}  // namespace csgd
