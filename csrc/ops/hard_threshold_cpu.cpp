// SPDX-License-Identifier: Apache-2.0
// hard_threshold_ on the CPU: shared by torch's threads.
#include "../cpu/hard_threshold_cpu.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "hard_threshold.h"

namespace csgd {
namespace {

void parallel_for(int64_t count, const Ranges& work) { at::parallel_for(0, count, 2, work); }

class Cpu : public ThresholdDevice {
 public:
  void select(const std::vector<ThresholdTensor>& tensors, int64_t) override {
    hard_threshold_select_cpu(tensors, parallel_for);
  }
  void norms(const std::vector<ThresholdTensor>& tensors) override { hard_threshold_norms_cpu(tensors, parallel_for); }
  void masks(const std::vector<ThresholdTensor>& tensors) override { hard_threshold_masks_cpu(tensors, parallel_for); }
  void two_of_four(const std::vector<ThresholdTensor>& tensors) override {
    hard_threshold_two_of_four_cpu(tensors, parallel_for);
  }
};

}  // namespace

void hard_threshold_cpu(const HardThresholdArgs& args) {
  if (args.found_inf && *args.found_inf->const_data_ptr<float>() != 0.0f) return;
  Cpu cpu;
  run_hard_threshold(args, cpu);
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { m.impl("hard_threshold_", hard_threshold_<hard_threshold_cpu>); }

}  // namespace csgd
