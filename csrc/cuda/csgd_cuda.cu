// SPDX-License-Identifier: Apache-2.0
// The fused step on a GPU: gradient in, calibrated update out, one pass over memory, many tensors in one launch.
#include "../core/update_rule.h"
#include "csgd_cuda.h"

namespace csgd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = kDrawsPerCall;                       // elements a thread takes at a time: one Philox call
constexpr int64_t kChunk = int64_t{kThreads} * kPerThread * 4;  // elements a block takes

struct Launch {
  CsgdOptions options;
  CsgdTensor tensors[kTensorsPerLaunch];
  uint32_t first_block[kTensorsPerLaunch + 1];
  CsgdCudaWork* work;
  int count;
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters above 4 KB need CUDA 12.1 and a driver to match");

// 16 bytes, the widest access of one instruction.
template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S value[kSize];
};

// Eight consecutive elements; beyond `count` zeros are read and nothing is written. `wide`: 16-byte accesses,
// for full blocks at aligned addresses.
template <class S>
__device__ void load8(const S* from, int count, bool wide, S (&to)[kPerThread]) {
  if (wide) {
#pragma unroll
    for (int v = 0; v < kPerThread / Vector<S>::kSize; ++v) {
      const Vector<S> vector = reinterpret_cast<const Vector<S>*>(from)[v];
#pragma unroll
      for (int k = 0; k < Vector<S>::kSize; ++k) to[v * Vector<S>::kSize + k] = vector.value[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) to[k] = k < count ? from[k] : S{};
  }
}

template <class S>
__device__ void store8(S* to, int count, bool wide, const S (&from)[kPerThread]) {
  if (wide) {
#pragma unroll
    for (int v = 0; v < kPerThread / Vector<S>::kSize; ++v) {
      Vector<S> vector;
#pragma unroll
      for (int k = 0; k < Vector<S>::kSize; ++k) vector.value[k] = from[v * Vector<S>::kSize + k];
      reinterpret_cast<Vector<S>*>(to)[v] = vector;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (k < count) to[k] = from[k];
    }
  }
}

// Rounds eight opmath values to storage, each with its own draw where the options ask for it.
template <class S, class T>
__device__ void round8(const CsgdOptions& options, Stream stream, const CsgdTensor& tensor, uint32_t step,
                       uint64_t block, const T (&values)[kPerThread], S (&out)[kPerThread]) {
  if (Storage<S>::kRounds && options.stochastic_rounding) {
    const Philox4x32 bits = draw_block(options.seed, stream, block, tensor.index, step);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = Storage<S>::store_stochastic(values[k], draw_lane(bits, k));
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = Storage<S>::store_nearest(values[k]);
  }
}

// What a thread, a warp, a block contributes to its tensor.
struct Tally {
  unsigned long long largest_bits;
  unsigned int moved;
};

// Steps the `count` (1 ... 8) elements from `position` on.
template <class S>
__device__ void step8(const CsgdOptions& options, const CsgdTensor& tensor,
                      const StepScalars<typename Storage<S>::Opmath>& scalars, int64_t position, int count, bool wide,
                      Tally& tally) {
  using T = typename Storage<S>::Opmath;
  const RuntimeParts parts = runtime_parts(options);
  S* param_at = static_cast<S*>(tensor.param) + position;
  S* momentum_at = static_cast<S*>(tensor.momentum_buffer) + position;
  const uint64_t block = static_cast<uint64_t>(position) / kDrawsPerCall;

  S grad[kPerThread], param[kPerThread] = {}, momentum_buffer[kPerThread] = {};
  load8(static_cast<const S*>(tensor.grad) + position, count, wide, grad);
  if (parts.momentum) load8(momentum_at, count, wide, momentum_buffer);
  if (parts.weight_decay) load8(param_at, count, wide, param);

  T d[kPerThread], momentum[kPerThread], n[kPerThread];
  const Philox4x32 bits = draw_block(options.seed, kCalibrationStream, block, tensor.index, scalars.step);
  unsigned int move = 0;  // one bit for each element
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    momentum[k] = Storage<S>::load(momentum_buffer[k]);
    d[k] = direction(parts, scalars, Storage<S>::load(grad[k]), Storage<S>::load(param[k]), momentum[k]);
    n[k] = moving_draws(d[k], scalars.scale);
    if (k < count) {
      move |= (moves(draw_lane(bits, k), n[k]) ? 1u : 0u) << k;
      const unsigned long long largest_bits = finite_magnitude_bits(d[k]);
      tally.largest_bits = largest_bits > tally.largest_bits ? largest_bits : tally.largest_bits;
    }
  }
  tally.moved += __popc(move);

  if (parts.momentum) {
    round8<S>(options, kMomentumStream, tensor, scalars.step, block, momentum, momentum_buffer);
    store8(momentum_at, count, wide, momentum_buffer);
  }
  if (move == 0) return;  // the parameter's memory is not touched
  if (!parts.weight_decay) load8(param_at, count, wide, param);
  T theta[kPerThread];
  S stored[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) theta[k] = moved_value(Storage<S>::load(param[k]), scalars.lr, d[k], n[k]);
  round8<S>(options, kParamStream, tensor, scalars.step, block, theta, stored);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if ((move >> k) & 1u) param[k] = stored[k];
  }
  store8(param_at, count, wide, param);
}

// Sums up the block's tallies; the result is valid in thread 0.
__device__ Tally reduce_block(Tally tally) {
  __shared__ Tally of_warp[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_down_sync(0xFFFFFFFFu, tally.largest_bits, offset);
    tally.largest_bits = other > tally.largest_bits ? other : tally.largest_bits;
    tally.moved += __shfl_down_sync(0xFFFFFFFFu, tally.moved, offset);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = tally;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      tally.largest_bits = of_warp[w].largest_bits > tally.largest_bits ? of_warp[w].largest_bits : tally.largest_bits;
      tally.moved += of_warp[w].moved;
    }
  }
  return tally;
}

// Thread 0 of each block adds the block's tally to its tensor's; the last block to come closes the step. Every
// block has read the step and the bound by then, so they can be overwritten.
template <class T>
__device__ void finish_tensor(const CsgdOptions& options, const CsgdTensor& tensor, CsgdCudaWork* work,
                              const Tally& tally, unsigned int blocks) {
  atomicMax(&work->largest_bits, tally.largest_bits);
  atomicAdd(&work->moved, static_cast<unsigned long long>(tally.moved));
  __threadfence();
  if (atomicAdd(&work->blocks_done, 1ULL) != blocks - 1) return;
  __threadfence();
  using Bits = typename Storage<T>::Bits;
  // Read where the atomics of the other blocks took place, not from this multiprocessor's cache.
  const Bits largest_bits = static_cast<Bits>(atomicMax(&work->largest_bits, 0ULL));
  const int64_t moved = static_cast<int64_t>(atomicAdd(&work->moved, 0ULL));
  advance(options, tensor, bit_cast<T>(largest_bits), moved);
}

// The tensor that this block works on.
__device__ int find_tensor(const Launch& launch) {
  int low = 0, high = launch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (launch.first_block[middle] <= blockIdx.x) low = middle;
    else high = middle - 1;
  }
  return low;
}

__device__ bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class S>
__global__ void __launch_bounds__(kThreads) csgd_kernel(const __grid_constant__ Launch launch) {
  using T = typename Storage<S>::Opmath;
  if (overflowed(launch.options)) return;
  const int t = find_tensor(launch);
  const CsgdTensor& tensor = launch.tensors[t];
  const StepScalars<T> scalars = step_scalars<T>(launch.options, tensor);
  const bool aligned = aligned16(tensor.param) && aligned16(tensor.grad) && aligned16(tensor.momentum_buffer);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - launch.first_block[t]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;
  Tally tally{0, 0};
  for (int64_t i = begin + int64_t{threadIdx.x} * kPerThread; i < end; i += int64_t{kThreads} * kPerThread) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    step8<S>(launch.options, tensor, scalars, i, count, aligned && count == kPerThread, tally);
  }
  tally = reduce_block(tally);
  if (threadIdx.x == 0) {
    const unsigned int blocks = launch.first_block[t + 1] - launch.first_block[t];
    finish_tensor<T>(launch.options, tensor, launch.work + t, tally, blocks);
  }
}

}  // namespace

#define CSGD_TEXT_OF(...) #__VA_ARGS__
#define CSGD_TEXT(...) CSGD_TEXT_OF(__VA_ARGS__)
const char* cuda_architectures() { return CSGD_TEXT(__CUDA_ARCH_LIST__); }

cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int count,
                             CsgdCudaWork* work, cudaStream_t stream) {
  Launch launch;
  launch.options = options;
  launch.work = work;
  launch.count = count;
  launch.first_block[0] = 0;
  for (int t = 0; t < count; ++t) {
    launch.tensors[t] = tensors[t];
    // An empty tensor has a block as well: somebody must advance its step.
    const int64_t blocks = tensors[t].numel == 0 ? 1 : (tensors[t].numel + kChunk - 1) / kChunk;
    launch.first_block[t + 1] = launch.first_block[t] + static_cast<uint32_t>(blocks);
  }
  const unsigned int grid = launch.first_block[count];
  switch (dtype) {
    case DType::kFloat32: csgd_kernel<float><<<grid, kThreads, 0, stream>>>(launch); break;
    case DType::kFloat64: csgd_kernel<double><<<grid, kThreads, 0, stream>>>(launch); break;
    case DType::kBFloat16: csgd_kernel<BFloat16><<<grid, kThreads, 0, stream>>>(launch); break;
    case DType::kFloat16: csgd_kernel<Float16><<<grid, kThreads, 0, stream>>>(launch); break;
  }
  return cudaGetLastError();
}

}  // namespace csgd
