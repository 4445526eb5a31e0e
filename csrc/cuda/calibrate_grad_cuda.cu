// SPDX-License-Identifier: Apache-2.0
// The calibration of a gradient on a GPU: one launch, one pass over memory.
#include <cuda_runtime.h>

#include "blocks.cuh"
#include "calibrate_grad_cuda.h"
#include "rounding.cuh"

namespace csgd {
namespace {

// The channels of the elements that a thread takes, one element after the other.
template <class T>
struct Channels {
  using Bits = typename FloatBits<T>::Type;
  const CalibrateGradCall& call;
  unsigned long long* maxima;  // the maximum of each channel, in global memory
  int64_t channel;
  int64_t left = 0;   // elements of this run of the channel that are left, with the present one
  T scale;            // of the channel
  Bits least_bits;    // the bound of the channel if no |d| is larger; smaller maxima need not be reported
  Bits largest_bits;  // max(least_bits, |d|) over this run; with one channel, over all elements of the thread

  __device__ __forceinline__ explicit Channels(const CalibrateGradCall& of)
      : call(of), maxima(reinterpret_cast<unsigned long long*>(of.tally + 1)) {
    set_channel(0);
  }

  __device__ __forceinline__ void set_channel(int64_t to) {
    channel = to;
    const T bound = static_cast<T>(call.bounds != nullptr ? call.bounds[channel] : call.lipschitz);
    scale = calibration_scale(static_cast<T>(call.calibration), bound);
    least_bits = largest_bits = bit_cast<Bits>(next_bound(call.bound_decay, bound, T(0)));
  }

  __device__ __forceinline__ void go_to(int64_t position) {
    if (call.channels == 1) return;
    left = call.inner - position % call.inner;
    set_channel(position / call.inner % call.channels);
  }

  __device__ __forceinline__ void next() {
    if (call.channels == 1 || --left > 0) return;
    end_run();
    left = call.inner;
    set_channel(channel + 1 == call.channels ? 0 : channel + 1);
  }

  __device__ __forceinline__ void note(Bits bits) { largest_bits = bits > largest_bits ? bits : largest_bits; }

  // Raises the maximum of the channel to the maximum of the run. Few runs need an atomic: most maxima are below the
  // bound. In the first call all bounds are 0; there, reading the present maximum first saves most of the atomics.
  __device__ __forceinline__ void end_run() const {
    if (call.channels == 1 || largest_bits <= least_bits) return;
    const auto bits = static_cast<unsigned long long>(largest_bits);
    if (__ldcg(maxima + channel) < bits) atomicMax(maxima + channel, bits);
  }
};

// Calibrates `count` (1 ... 8) elements from `position`, a multiple of 8, on.
template <class S, class T>
__device__ __forceinline__ void calibrate8(const CalibrateGradCall& call, uint32_t index, uint32_t step,
                                           Channels<T>& channels, int64_t position, int count, uint32_t& moved) {
  const auto draws_of = [&](Stream stream) {
    const auto block = static_cast<uint64_t>(position) / kDrawsPerCall;
    return draws_within<kPerThread>(draw_block(call.seed, stream, block, index, step), 0);
  };
  Vector<S> stored[kPerThread / Vector<S>::kSize];
  load(static_cast<const S*>(call.grad) + position, count == kPerThread && aligned16(call.grad), count, stored);
  const auto draws = draws_of(kGradStream);
  channels.go_to(position);
  T grad[kPerThread], out[kPerThread];
  widen(stored, grad);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k > 0) channels.next();
    const T d = grad[k];
    channels.note(finite_magnitude_bits(d));                             // the zeros beyond the end change no maximum
    const T above = round_up_above(guarded_product(d, channels.scale));  // integers() + n
    const bool move = draws.template above<T>(k) < above;
    out[k] = select(move, d * inverse_probability_above(above), T(0));
    moved += move && k < count ? 1u : 0u;  // a d of 0 moves when T = 0
  }
  channels.end_run();
  narrow<S>(call.stochastic_rounding, [&] { return draws_of(kGradRoundingStream); }, out, ~0u, stored);
  store(static_cast<S*>(call.out) + position, count == kPerThread && aligned16(call.out), count, stored);
}

// The last block to arrive here completes the call. Every other block has read the step and the bounds by then. The
// last block reads the counts by atomics, as the other blocks wrote them, and leaves zeros for the next call.
template <class T>
__device__ __forceinline__ void finish(const CalibrateGradCall& call, const Partial<T>& partial) {
  CSGD_SHARED_ARRAY(bool, is_last, 1);
  CalibrationTally* tally = call.tally;
  auto* maxima = reinterpret_cast<unsigned long long*>(tally + 1);
  if (threadIdx.x == 0) {
    if (call.channels == 1) atomicMax(maxima, static_cast<unsigned long long>(partial.largest_bits));
    atomicAdd(&tally->moving, static_cast<unsigned long long>(partial.moved));
    __threadfence();  // what the block did up to the barrier of reduce_block comes before the count below
    is_last[0] = atomicAdd(&tally->blocks_done, 1ULL) == gridDim.x - 1;
    __threadfence();  // and the count comes before what the block does after the barrier below
  }
  __syncthreads();
  if (!is_last[0]) return;
  for (int64_t c = threadIdx.x; c < call.channels; c += kThreads) {
    const auto bits = static_cast<typename FloatBits<T>::Type>(atomicExch(maxima + c, 0ULL));
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
__global__ void __launch_bounds__(kThreads, 1) calibrate_grad_kernel(const __grid_constant__ CalibrateGradCall call) {
  using T = typename Storage<S>::Opmath;
  const uint32_t index = layer_index(call), step = static_cast<uint32_t>(*call.step);
  const int64_t begin = int64_t{blockIdx.x} * call.chunk;
  const int64_t end = begin + call.chunk < call.numel ? begin + call.chunk : call.numel;
  Channels<T> channels(call);
  uint32_t moved = 0;
  for (int64_t i = begin + int64_t{threadIdx.x} * kPerThread; i < end; i += kPass) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    calibrate8<S>(call, index, step, channels, i, count, moved);
  }
  finish(call, reduce_block(Partial<T>{channels.largest_bits, moved}));
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
  return with_storage(dtype, [&](auto tag) { return launch<decltype(tag)>(call, stream); });
}

}  // namespace csgd
