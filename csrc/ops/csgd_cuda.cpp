// SPDX-License-Identifier: Apache-2.0
// csgd_ on CUDA: one launch for each dtype in the call, another for its shards, on torch's current stream.
#include "../cuda/csgd_cuda.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csgd.h"

namespace csgd {

namespace {

template <class Tensor>
void launch(DType dtype, const CsgdOptions& options, const std::vector<Tensor>& tensors, cudaStream_t stream) {
  C10_CUDA_CHECK(
      launch_csgd_cuda(dtype, options, tensors.data(), static_cast<int64_t>(tensors.size()), stream, nullptr));
}

}  // namespace

void run_cuda(const PackedStep& step) {
  const c10::cuda::CUDAGuard guard(step.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = static_cast<int64_t>(step.tensors().size());
  at::Tensor own_tallies;  // freed in stream order, after the kernels
  if (step.tensors()[0].tensor.tally == nullptr) {
    own_tallies = at::zeros({count, kTallyWords}, at::TensorOptions().device(step.device()).dtype(at::kLong));
  }
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    std::vector<CsgdTensor> whole;
    std::vector<CsgdShard> shards;
    for (int64_t i = 0; i < count; ++i) {
      if (step.tensors()[i].dtype != dtype) continue;
      CsgdShard tensor = step.tensors()[i].tensor;
      if (own_tallies.defined()) {
        tensor.tally = reinterpret_cast<CsgdTally*>(own_tallies.data_ptr<int64_t>()) + i;
      }
      if (tensor.layout.run_length == 0) {
        whole.push_back(tensor);
      } else {
        shards.push_back(tensor);
      }
    }
    launch(dtype, step.options(), whole, stream);
    launch(dtype, step.options(), shards, stream);
  }
}

TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { m.impl("csgd_", unboxed<CsgdArgs, csgd_<run_cuda>>); }

}  // namespace csgd
