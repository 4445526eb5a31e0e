// SPDX-License-Identifier: Apache-2.0
// For tests: Philox as the GPU computes it, to hold against the known answers.
#include "csgd_cuda.h"

namespace csgd {
namespace {

__global__ void philox_kernel(Philox4x32 counter, uint64_t key, Philox4x32* result) {
  *result = philox4x32_10(counter, key);
}

}  // namespace

cudaError_t philox4x32_10_on_gpu(Philox4x32 counter, uint64_t key, Philox4x32* result) {
  Philox4x32* on_gpu = nullptr;
  cudaError_t error = cudaMalloc(&on_gpu, sizeof(Philox4x32));
  if (error != cudaSuccess) return error;
  philox_kernel<<<1, 1>>>(counter, key, on_gpu);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(result, on_gpu, sizeof(Philox4x32), cudaMemcpyDeviceToHost);
  const cudaError_t freed = cudaFree(on_gpu);
  return error == cudaSuccess ? freed : error;
}

}  // namespace csgd
