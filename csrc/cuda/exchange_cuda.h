// SPDX-License-Identifier: Apache-2.0
// The launchers of the kernels of the gradient exchange. They take plain structs and CUDA runtime types, and do not
// need torch. Each makes one launch on the current GPU and does not wait for it. There must be at least one element, or
// word.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/exchange.h"

namespace csgd {

cudaError_t launch_encode_cuda(DType dtype, EncodeCall call, cudaStream_t stream);
cudaError_t launch_pack_cuda(PackCall call, cudaStream_t stream);
cudaError_t launch_add_cuda(AddCall call, cudaStream_t stream);
cudaError_t launch_decode_cuda(DType dtype, DecodeCall call, cudaStream_t stream);

}  // namespace csgd
