// SPDX-License-Identifier: Apache-2.0
// csgd_ on CUDA: groups the tensors by dtype and launches, on torch's current stream.
#include "../cuda/csgd_cuda.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "csgd.h"

namespace csgd {

void run_cuda(const PackedStep& step) {
  if (step.tensors().empty()) return;
  const c10::cuda::CUDAGuard guard(step.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  constexpr int64_t kWords = sizeof(CsgdCudaWork) / sizeof(int64_t);
  const at::Tensor work_tensor = at::zeros({static_cast<int64_t>(step.tensors().size()), kWords},
                                           at::TensorOptions().device(step.device()).dtype(at::kLong));
  auto* work = reinterpret_cast<CsgdCudaWork*>(work_tensor.data_ptr<int64_t>());
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    std::vector<CsgdTensor> batch;
    const auto launch = [&] {
      if (batch.empty()) return;
      const int count = static_cast<int>(batch.size());
      C10_CUDA_CHECK(launch_csgd_cuda(dtype, step.options(), batch.data(), count, work, stream));
      work += count;
      batch.clear();
    };
    for (const PackedTensor& packed : step.tensors()) {
      if (packed.dtype != dtype) continue;
      batch.push_back(packed.tensor);
      if (batch.size() == kTensorsPerLaunch) launch();
    }
    launch();
  }
}

TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { m.impl("csgd_", csgd_<run_cuda>); }

}  // namespace csgd
