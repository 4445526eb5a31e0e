// SPDX-License-Identifier: Apache-2.0
// The fused step on a GPU: gradient in, calibrated update out, one pass over memory, a whole model in one launch.
#include <cuda_runtime.h>

#include <algorithm>

#include "block8.cuh"
#include "csgd_cuda.h"

// Shared memory of a block. A macro, since the tests run this file on a CPU, where it is the storage of a block's
// threads.
#ifndef CSGD_SHARED_ARRAY
#define CSGD_SHARED_ARRAY(type, name, size) __shared__ type name[size]
#endif

namespace csgd {
namespace {

#ifndef CSGD_CUDA_THREADS
#define CSGD_CUDA_THREADS 256
#endif
constexpr int kThreads = CSGD_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kPass = int64_t{kThreads} * kPerThread;  // elements a block takes at a time
constexpr int64_t kMostPasses = 32;                        // of one block
constexpr int64_t kBlocksPerMultiprocessor = 16;           // wanted at least, before blocks take more than one pass

// The records of a launch travel as a kernel parameter: no copy to the device, nothing to keep alive.
template <int kBytes>
struct Launch {
  struct Header {
    CsgdOptions options;
    int64_t chunk;  // elements that a block takes; a multiple of kPass
    int64_t count;
  };
  static constexpr int kTensors = (kBytes - static_cast<int>(sizeof(Header))) / static_cast<int>(sizeof(CsgdTensor));
  Header header;
  CsgdTensor tensors[kTensors];
};
using SmallLaunch = Launch<4096>;   // what every driver takes
using LargeLaunch = Launch<32764>;  // from CUDA 12.1 on
static_assert(LargeLaunch::kTensors >= 500, "a model of 500 tensors goes in one launch");

// Adds up the block's partials; the result is valid in thread 0.
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

// Thread 0 of each block adds the block's part to its tensor's tally; the last block to come closes the step. Every
// block has read the step and the bound by then, so they can be overwritten, and nobody needs the tally any more.
template <class T>
__device__ __forceinline__ void finish_tensor(const CsgdOptions& options, const CsgdTensor& tensor,
                                              const Partial<T>& partial, uint32_t blocks) {
  CsgdTally* tally = tensor.tally;
  atomicMax(&tally->largest_bits, static_cast<unsigned long long>(partial.largest_bits));
  atomicAdd(&tally->moving, static_cast<unsigned long long>(partial.moved));
  __threadfence();  // the two above before the one below, for all other blocks
  if (atomicAdd(&tally->blocks_done, 1ULL) != blocks - 1) return;
  __threadfence();
  // Exchanged rather than loaded: read where the other blocks' atomics took place, and zero for the next step.
  using Bits = typename FloatBits<T>::Type;
  const Bits largest_bits = static_cast<Bits>(atomicExch(&tally->largest_bits, 0ULL));
  const int64_t moved = static_cast<int64_t>(atomicExch(&tally->moving, 0ULL));
  atomicExch(&tally->blocks_done, 0ULL);
  advance(options, tensor, bit_cast<T>(largest_bits), moved);
}

// The tensor that this block works on: the last one whose first block is not beyond it.
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

__host__ __device__ __forceinline__ int64_t blocks_of(int64_t numel, int64_t chunk) {
  // An empty tensor has a block as well: somebody must advance its step.
  return numel == 0 ? 1 : (numel + chunk - 1) / chunk;
}

__device__ __forceinline__ bool aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <class S, class L>
__global__ void __launch_bounds__(kThreads) csgd_kernel(const __grid_constant__ L launch) {
  using T = typename Storage<S>::Opmath;
  const CsgdOptions& options = launch.header.options;
  if (overflowed(options)) return;
  const CsgdTensor& tensor = launch.tensors[find_tensor(launch)];
  const StepScalars<T> scalars = step_scalars<T>(options, tensor);
  const bool aligned = aligned16(tensor.param) && aligned16(tensor.grad) && aligned16(tensor.momentum_buffer);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensor.first_block) * launch.header.chunk;
  const int64_t end = begin + launch.header.chunk < tensor.numel ? begin + launch.header.chunk : tensor.numel;
  Partial<T> partial{0, 0};
  for (int64_t i = begin + int64_t{threadIdx.x} * kPerThread; i < end; i += kPass) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    step8<S>(options, tensor, scalars, i, count, aligned && count == kPerThread, partial);
  }
  partial = reduce_block(partial);
  if (threadIdx.x == 0) {
    finish_tensor(options, tensor, partial, static_cast<uint32_t>(blocks_of(tensor.numel, launch.header.chunk)));
  }
}

template <class S, class L>
cudaError_t launch_kernel(L& launch, int64_t blocks, cudaStream_t stream) {
  void* arguments[] = {&launch};
  return cudaLaunchKernel(csgd_kernel<S, L>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

template <class L>
cudaError_t launch_dtype(DType dtype, L& launch, int64_t blocks, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32: return launch_kernel<float>(launch, blocks, stream);
    case DType::kFloat64: return launch_kernel<double>(launch, blocks, stream);
    case DType::kBFloat16: return launch_kernel<BFloat16>(launch, blocks, stream);
    case DType::kFloat16: return launch_kernel<Float16>(launch, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

// Elements that a block takes: one pass while that gives the card no more blocks than keep it busy, then more, so that
// the cost of a block's end is spread over more work.
cudaError_t choose_chunk(const CsgdTensor* tensors, int64_t count, int64_t* chunk) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int64_t elements = 0;
  for (int64_t t = 0; t < count; ++t) elements += tensors[t].numel;
  const int64_t passes = elements / (kPass * kBlocksPerMultiprocessor * std::max(multiprocessors, 1));
  *chunk = kPass * std::min(std::max(passes, int64_t{1}), kMostPasses);
  return error;
}

template <class L>
cudaError_t launch_all(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int64_t count,
                       cudaStream_t stream, int64_t* launches) {
  constexpr int64_t kMostBlocks = 0x7FFFFFFF;  // of a grid
  L launch;
  launch.header.options = options;
  cudaError_t error = choose_chunk(tensors, count, &launch.header.chunk);
  for (int64_t first = 0; error == cudaSuccess && first < count;) {
    int64_t blocks = 0, taken = 0;
    while (first + taken < count && taken < L::kTensors) {
      const CsgdTensor& tensor = tensors[first + taken];
      const int64_t more = blocks_of(tensor.numel, launch.header.chunk);
      if (blocks + more > kMostBlocks) break;
      launch.tensors[taken] = tensor;
      launch.tensors[taken].first_block = static_cast<uint32_t>(blocks);
      blocks += more;
      ++taken;
    }
    if (taken == 0) return cudaErrorInvalidValue;  // a tensor of more than 2^47 elements
    launch.header.count = taken;
    error = launch_dtype(dtype, launch, blocks, stream);
    if (launches != nullptr) *launches += 1;
    first += taken;
  }
  return error;
}

}  // namespace

cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches) {
  static const bool large = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010 && CUDART_VERSION >= 12010;
  }();
  return large ? launch_all<LargeLaunch>(dtype, options, tensors, count, stream, launches)
               : launch_all<SmallLaunch>(dtype, options, tensors, count, stream, launches);
}

#define CSGD_TEXT_OF(...) #__VA_ARGS__
#define CSGD_TEXT(...) CSGD_TEXT_OF(__VA_ARGS__)
const char* cuda_architectures() { return CSGD_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace csgd
