// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::hard_threshold_ on torch's side: its arguments, their checks, and what is made of them for
// each device (hard_threshold_cpu.cpp, hard_threshold_cuda.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

struct HardThresholdArgs {
  at::TensorList params;
  at::TensorList momentum_buffers;  // empty: are left alone
  at::TensorList masks;             // empty: nothing was dropped for good
  std::optional<at::IntArrayRef> keeps;
  std::string_view structure;
  bool across;
  const std::optional<at::Tensor>& found_inf;
};

// Everything that can be wrong with the arguments, before anything is changed. Errors name the parameter by its place.
void check_hard_threshold(const HardThresholdArgs& args);

// The work on one device, on packed tensors.
class ThresholdDevice {
 public:
  virtual ~ThresholdDevice() = default;
  virtual void select(const std::vector<ThresholdTensor>& tensors, int64_t selections) = 0;
  virtual void norms(const std::vector<ThresholdTensor>& tensors) = 0;
  virtual void masks(const std::vector<ThresholdTensor>& tensors) = 0;
  virtual void two_of_four(const std::vector<ThresholdTensor>& tensors) = 0;
};

using RunHardThreshold = void (*)(const HardThresholdArgs&);
void hard_threshold_cpu(const HardThresholdArgs& args);
void hard_threshold_cuda(const HardThresholdArgs& args);
[[noreturn]] void hard_threshold_nowhere(const HardThresholdArgs& args);

// Packs the arguments and has the device do the work.
void run_hard_threshold(const HardThresholdArgs& args, ThresholdDevice& device);

// The kernel of the operator for one device.
template <RunHardThreshold run>
void hard_threshold_(at::TensorList params, at::TensorList momentum_buffers, at::TensorList masks,
                     at::OptionalIntArrayRef keeps, std::string_view structure, bool across,
                     const std::optional<at::Tensor>& found_inf) {
  std::optional<at::IntArrayRef> counts;
  if (keeps.has_value()) counts = *keeps;
  const HardThresholdArgs args{params, momentum_buffers, masks, counts, structure, across, found_inf};
  check_hard_threshold(args);
  if (!params.empty()) run(args);
}

}  // namespace csgd
