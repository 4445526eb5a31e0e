// SPDX-License-Identifier: Apache-2.0
// The launcher of the kernel of calibrate_grad. It takes a plain struct and CUDA runtime types, and does not need
// torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace csgd {

// Calibrates one gradient on the current GPU in one launch. The call needs a tally. Does not wait for the GPU.
cudaError_t launch_calibrate_grad_cuda(DType dtype, CalibrateGradCall call, cudaStream_t stream);

}  // namespace csgd
