// SPDX-License-Identifier: Apache-2.0
// The launchers of the step's kernels. They take plain structs and CUDA runtime types, do not need torch, and return
// CUDA's errors.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace csgd {

// Steps tensors of one dtype, either all of them whole or all of them shards, on the current GPU, in as few launches as
// can hold their records. Each tensor needs a tally. Does not wait for the GPU. If `launches` is given, the number of
// launches made is added to it.
//
// Shards have kernels of their own, so that the kernels of whole parameters do not need the registers for the draws of
// shards.
cudaError_t launch_step_cuda(DType dtype, const SgdOptions& options, const StepShard* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches);
cudaError_t launch_step_cuda(DType dtype, const AdamWOptions& options, const StepShard* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches);

// The architectures that the kernels were compiled for, e.g. "800,900".
const char* cuda_architectures();

}  // namespace csgd
