// SPDX-License-Identifier: Apache-2.0
// hard_threshold_ on CUDA: launches on torch's current stream, scratch space from torch's allocator.
#include "../cuda/hard_threshold_cuda.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "hard_threshold.h"

namespace csgd {
namespace {

constexpr int64_t kScratchWords = sizeof(SelectionScratch) / sizeof(int64_t);

class Cuda : public ThresholdDevice {
 public:
  explicit Cuda(const HardThresholdArgs& args)
      : device_(args.params[0].device()),
        found_inf_(args.found_inf ? args.found_inf->const_data_ptr<float>() : nullptr),
        stream_(c10::cuda::getCurrentCUDAStream()) {}

  void select(const std::vector<ThresholdTensor>& tensors, int64_t selections) override {
    const at::Tensor scratch =  // freed in stream order, after the kernels
        at::zeros({selections, kScratchWords}, at::TensorOptions().device(device_).dtype(at::kLong));
    auto* of_selection = reinterpret_cast<SelectionScratch*>(scratch.data_ptr<int64_t>());
    C10_CUDA_CHECK(launch_hard_threshold_select_cuda(tensors, of_selection, found_inf_, stream_));
  }
  void norms(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_norms_cuda(tensors, found_inf_, stream_));
  }
  void masks(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_masks_cuda(tensors, found_inf_, stream_));
  }
  void two_of_four(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_two_of_four_cuda(tensors, found_inf_, stream_));
  }

 private:
  c10::Device device_;
  const float* found_inf_;
  cudaStream_t stream_;
};

}  // namespace

void hard_threshold_cuda(const HardThresholdArgs& args) {
  const c10::cuda::CUDAGuard guard(args.params[0].device());
  Cuda cuda(args);
  run_hard_threshold(args, cuda);
}

TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { m.impl("hard_threshold_", hard_threshold_<hard_threshold_cuda>); }

}  // namespace csgd
