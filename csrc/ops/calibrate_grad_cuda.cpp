// SPDX-License-Identifier: Apache-2.0
// calibrate_grad on CUDA: one launch, on torch's current stream.
#include "../cuda/calibrate_grad_cuda.h"

#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "calibrate_grad.h"

namespace csgd {

void calibrate_grad_cuda(DType dtype, const CalibrateGradCall& given, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  CalibrateGradCall call = given;
  at::Tensor own_tally;  // freed in stream order, after the kernel
  if (call.tally == nullptr) {
    own_tally =
        at::zeros({kCalibrationTallyWords + call.channels}, at::TensorOptions().device(device).dtype(at::kLong));
    call.tally = reinterpret_cast<CalibrationTally*>(own_tally.data_ptr<int64_t>());
  }
  C10_CUDA_CHECK(launch_calibrate_grad_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { m.impl("calibrate_grad", calibrate_grad<calibrate_grad_cuda>); }

}  // namespace csgd
