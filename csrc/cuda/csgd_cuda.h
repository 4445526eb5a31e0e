// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' launchers: plain structs and CUDA runtime types, no torch. Errors of CUDA are returned.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace csgd {

// Steps tensors of one dtype on the current GPU, in as few launches as hold their records. Each tensor needs a tally.
// Waits for nothing. `launches`, if given, is increased by the number of launches made.
cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches);

// The same for shards: a kernel of its own, so that whole parameters do not pay for the registers of its draws.
cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdShard* shards, int64_t count,
                             cudaStream_t stream, int64_t* launches);

// The architectures that the kernels were compiled for, e.g. "800,900".
const char* cuda_architectures();

}  // namespace csgd
