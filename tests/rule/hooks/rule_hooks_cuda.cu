// SPDX-License-Identifier: Apache-2.0
#include "rule_hooks_cuda.h"

namespace csgd {
namespace {

__global__ void philox_kernel(Philox4x32 counter, uint64_t key, Philox4x32* result) {
  *result = philox4x32_10(counter, key);
}

__global__ void shortcut_kernel(Shortcut shortcut, float* values, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) values[i] = take_shortcut(shortcut, values[i]);
}

// Copies `count` values to the GPU, calls launch(copy), and copies the result back.
template <class T, class Launch>
cudaError_t on_gpu(T* values, int64_t count, Launch launch) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  T* copy = nullptr;
  cudaError_t error = cudaMalloc(&copy, bytes);
  if (error != cudaSuccess) return error;
  error = cudaMemcpy(copy, values, bytes, cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    launch(copy);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpy(values, copy, bytes, cudaMemcpyDeviceToHost);
  const cudaError_t freed = cudaFree(copy);
  return error == cudaSuccess ? freed : error;
}

}  // namespace

cudaError_t philox4x32_10_on_gpu(Philox4x32 counter, uint64_t key, Philox4x32* result) {
  return on_gpu(result, 1, [&](Philox4x32* copy) { philox_kernel<<<1, 1>>>(counter, key, copy); });
}

cudaError_t take_shortcuts_on_gpu(Shortcut shortcut, float* values, int64_t count) {
  const auto blocks = static_cast<unsigned>((count + 255) / 256);
  return on_gpu(values, count, [&](float* copy) { shortcut_kernel<<<blocks, 256>>>(shortcut, copy, count); });
}

}  // namespace csgd
