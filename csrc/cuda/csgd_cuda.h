// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' launchers: plain structs and CUDA runtime types, no torch. Each returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"
#include "../core/philox.h"

namespace csgd {

// Where the blocks of one tensor meet: one for each tensor of a launch, in device memory, all zero before it.
struct CsgdCudaWork {
  unsigned long long largest_bits;  // max |d| over finite d, as the bits of opmath
  unsigned long long moved;
  unsigned long long blocks_done;
};

// Tensors that one launch takes: their records travel as a kernel parameter, of which 4 KB work everywhere.
constexpr int kTensorsPerLaunch = 48;

// Steps `count` (1 ... kTensorsPerLaunch) tensors of one dtype. Waits for nothing.
cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int count,
                             CsgdCudaWork* work, cudaStream_t stream);

// The architectures that the kernels were compiled for, e.g. "800,900".
const char* cuda_architectures();

// For tests: one Philox call on the current GPU, result brought to the host.
cudaError_t philox4x32_10_on_gpu(Philox4x32 counter, uint32_t key0, uint32_t key1, Philox4x32* result);

}  // namespace csgd
