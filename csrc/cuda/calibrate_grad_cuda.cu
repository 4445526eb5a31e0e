// SPDX-License-Identifier: Apache-2.0
// A gradient in, its unbiased calibration out, on a GPU: one launch, one pass over memory.
#include <cuda_runtime.h>

#include "block8.cuh"
#include "blocks.cuh"
#include "calibrate_grad_cuda.h"

namespace csgd {
namespace {

// What a thread knows of the channels of the elements it takes, one after the other.
template <class T>
struct Channels {
  const CalibrateGradCall& call;
  unsigned long long* largest;  // of each channel, in global memory
  int64_t channel = 0;
  int64_t left = 0;  // elements of this run of the channel, from the present one on
  T scale = 0;

  __device__ __forceinline__ explicit Channels(const CalibrateGradCall& of)
      : call(of), largest(reinterpret_cast<unsigned long long*>(of.tally + 1)) {
    set_scale();
  }

  __device__ __forceinline__ void set_scale() {
    const double bound = call.bounds != nullptr ? call.bounds[channel] : call.lipschitz;
    scale = calibration_scale(call.calibration, static_cast<T>(bound));
  }

  __device__ __forceinline__ void go_to(int64_t position) {
    if (call.channels == 1) return;
    channel = position / call.inner % call.channels;
    left = call.inner - position % call.inner;
    set_scale();
  }

  __device__ __forceinline__ void next() {
    if (call.channels == 1 || --left > 0) return;
    channel = channel + 1 == call.channels ? 0 : channel + 1;
    left = call.inner;
    set_scale();
  }

  // Raises the channel's maximum. It is soon so high that most have nothing to add: a look saves them the atomic.
  template <class Bits>
  __device__ __forceinline__ void note(Bits largest_bits) const {
    const auto bits = static_cast<unsigned long long>(largest_bits);
    if (__ldcg(largest + channel) < bits) atomicMax(largest + channel, bits);
  }
};

// Calibrates the `count` (1 ... 8) elements from `position`, a multiple of 8, on. `wide`: 16-byte accesses may be used.
template <class S, class T>
__device__ __forceinline__ void calibrate8(const CalibrateGradCall& call, uint32_t index, uint32_t step,
                                           Channels<T>& channels, int64_t position, int count, bool wide,
                                           Partial<T>& partial) {
  const uint64_t block = static_cast<uint64_t>(position) / kDrawsPerCall;
  S stored[kPerThread];
  load8(static_cast<const S*>(call.grad) + position, count, wide, stored);
  const Philox4x32 bits = draw_block(call.seed, kGradStream, block, index, step);
  channels.go_to(position);
  T out[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const T d = Storage<S>::load(stored[k]);
    const auto largest_bits = finite_magnitude_bits(d);
    partial.largest_bits = largest_bits > partial.largest_bits ? largest_bits : partial.largest_bits;
    const T n = moving_draws(d, channels.scale);
    const bool move = moves(draw_lane(bits, k), n);
    out[k] = select(move, calibrated(d, n), T(0));
    partial.moved += move && k < count ? 1u : 0u;
    if (call.channels > 1 && k < count) channels.note(largest_bits);
    channels.next();
  }
  round8<S>(call.stochastic_rounding, call.seed, kGradRoundingStream, index, step, block, out, stored);
  store8(static_cast<S*>(call.out) + position, count, wide, stored);
}

// The last block to come closes the call: every block has read the step and the bounds by then. Reads what others have
// counted where their atomics took place, and leaves zeros for the next call.
template <class T>
__device__ __forceinline__ void finish(const CalibrateGradCall& call, const Partial<T>& partial, uint32_t blocks) {
  CSGD_SHARED_ARRAY(bool, is_last, 1);
  CalibrationTally* tally = call.tally;
  auto* largest = reinterpret_cast<unsigned long long*>(tally + 1);
  if (threadIdx.x == 0) {
    if (call.channels == 1) atomicMax(largest, static_cast<unsigned long long>(partial.largest_bits));
    atomicAdd(&tally->moving, static_cast<unsigned long long>(partial.moved));
    __threadfence();  // all of the block's atomics, after the barrier of reduce_block, before the one below
    is_last[0] = atomicAdd(&tally->blocks_done, 1ULL) == blocks - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  __threadfence();
  for (int64_t c = threadIdx.x; c < call.channels; c += kThreads) {
    const auto bits = static_cast<typename FloatBits<T>::Type>(atomicExch(largest + c, 0ULL));
    if (call.bounds == nullptr) continue;
    const T bound = next_bound(call.bound_decay, static_cast<T>(call.bounds[c]), bit_cast<T>(bits));
    call.bounds[c] = static_cast<double>(bound);
  }
  if (threadIdx.x == 0) {
    tally->moved = static_cast<int64_t>(atomicExch(&tally->moving, 0ULL));
    tally->numel = call.numel;
    atomicExch(&tally->blocks_done, 0ULL);
    *call.step += 1;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) calibrate_grad_kernel(const __grid_constant__ CalibrateGradCall call) {
  using T = typename Storage<S>::Opmath;
  const uint32_t index = layer_index(call), step = static_cast<uint32_t>(*call.step);
  const bool aligned = aligned16(call.grad) && aligned16(call.out);
  const int64_t begin = int64_t{blockIdx.x} * call.chunk;
  const int64_t end = begin + call.chunk < call.numel ? begin + call.chunk : call.numel;
  Channels<T> channels(call);
  Partial<T> partial{0, 0};
  for (int64_t i = begin + int64_t{threadIdx.x} * kPerThread; i < end; i += kPass) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    calibrate8<S>(call, index, step, channels, i, count, aligned && count == kPerThread, partial);
  }
  __threadfence();  // each thread's maxima of channels, before the barrier in reduce_block
  partial = reduce_block(partial);
  finish(call, partial, static_cast<uint32_t>(blocks_of(call.numel, call.chunk)));
}

template <class S>
cudaError_t launch(CalibrateGradCall& call, cudaStream_t stream) {
  void* arguments[] = {&call};
  const auto blocks = static_cast<unsigned>(blocks_of(call.numel, call.chunk));
  return cudaLaunchKernel(calibrate_grad_kernel<S>, dim3(blocks), dim3(kThreads), arguments, 0, stream);
}

}  // namespace

cudaError_t launch_calibrate_grad_cuda(DType dtype, CalibrateGradCall call, cudaStream_t stream) {
  const cudaError_t error = choose_chunk(call.numel, &call.chunk);
  if (error != cudaSuccess) return error;
  if (blocks_of(call.numel, call.chunk) > kMostBlocks) return cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32: return launch<float>(call, stream);
    case DType::kFloat64: return launch<double>(call, stream);
    case DType::kBFloat16: return launch<BFloat16>(call, stream);
    case DType::kFloat16: return launch<Float16>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace csgd
