// SPDX-License-Identifier: Apache-2.0
// How elements are divided between the blocks of a launch, and how the threads of a block combine their results.
#pragma once

#include <algorithm>

#include "../core/update_rule.h"

// Shared memory of a block. It is a macro because tests also run this file on a CPU, where the array is storage that
// the threads of a block share.
#ifndef CSGD_SHARED_ARRAY
#define CSGD_SHARED_ARRAY(type, name, size) __shared__ type name[size]
#endif

namespace csgd {

// The elements that a thread takes at a time: those that one Philox call serves. In a step they are those of a vector.
constexpr int kPerThread = kDrawsPerCall;

#ifndef CSGD_CUDA_THREADS
#define CSGD_CUDA_THREADS 256
#endif
constexpr int kThreads = CSGD_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kPass = int64_t{kThreads} * kPerThread;  // elements that a block takes at a time
constexpr int64_t kMostPasses = 16;                        // that one block makes at most
constexpr int64_t kBlocksPerMultiprocessor = 16;           // with more than these, a block makes several passes

constexpr int64_t kMostBlocks = 0x7FFFFFFF;  // of one launch

__host__ __device__ __forceinline__ int64_t blocks_of(int64_t numel, int64_t chunk) {
  // An empty tensor has a block as well, which advances its step.
  return numel == 0 ? 1 : (numel + chunk - 1) / chunk;
}

// Sets the number of elements that a block takes. That is one pass as long as this gives the GPU no more blocks than it
// needs to be busy; with more elements it is several passes, so that the cost at the end of a block is divided by more
// work.
inline cudaError_t choose_chunk(int64_t elements, int64_t* chunk) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t passes = elements / (kPass * kBlocksPerMultiprocessor * std::max(multiprocessors, 1));
  *chunk = kPass * std::min(std::max(passes, int64_t{1}), kMostPasses);
  return error;
}

// Makes one launch of blocks of kThreads threads.
template <class Call>
cudaError_t launch_blocks(void (*kernel)(Call), Call& call, int64_t blocks, cudaStream_t stream) {
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  void* arguments[] = {&call};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

// The number of the tensor that this block works on: the last one whose first block is not after this block.
template <class L>
__device__ __forceinline__ int find_tensor(const L& launch) {
  int low = 0, high = static_cast<int>(launch.header.count) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.tensors[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The number of blocks of the launch that work on a tensor.
template <class L>
__device__ __forceinline__ uint32_t blocks_of_tensor(const L& launch, int number) {
  const uint32_t next = number + 1 < launch.header.count ? launch.tensors[number + 1].first_block : gridDim.x;
  return next - launch.tensors[number].first_block;
}

// What a thread, a warp or a block contributes to the result of its tensor.
template <class T>
struct Partial {
  typename FloatBits<T>::Type largest_bits;  // max |d| over finite d
  uint32_t moved;                            // coordinates that moved
};

// Combines the partials of all threads of the block. The result is valid in thread 0.
template <class T>
__device__ __forceinline__ Partial<T> reduce_block(Partial<T> partial) {
  CSGD_SHARED_ARRAY(Partial<T>, of_warp, kWarps);
  for (int offset = 16; offset > 0; offset /= 2) {
    const auto other = __shfl_down_sync(0xFFFFFFFFu, partial.largest_bits, offset);
    partial.largest_bits = other > partial.largest_bits ? other : partial.largest_bits;
    partial.moved += __shfl_down_sync(0xFFFFFFFFu, partial.moved, offset);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = partial;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      const Partial<T> other = of_warp[w];
      partial.largest_bits = other.largest_bits > partial.largest_bits ? other.largest_bits : partial.largest_bits;
      partial.moved += other.moved;
    }
  }
  return partial;
}

}  // namespace csgd
