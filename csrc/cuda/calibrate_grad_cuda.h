// SPDX-License-Identifier: Apache-2.0
// The launcher of the kernel of calibrate_grad: a plain struct and CUDA runtime types, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace csgd {

// Calibrates one gradient on the current GPU, in one launch; needs a tally. Waits for nothing.
cudaError_t launch_calibrate_grad_cuda(DType dtype, CalibrateGradCall call, cudaStream_t stream);

}  // namespace csgd
