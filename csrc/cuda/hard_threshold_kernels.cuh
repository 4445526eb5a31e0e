// SPDX-License-Identifier: Apache-2.0
// The kernels of hard thresholding: what one block does in a pass.
#pragma once

#include "../core/hard_threshold.h"
#include "blocks.cuh"
#include "vectors.cuh"

namespace csgd {
namespace {

// The records of a launch are passed as a kernel parameter, of the 4 KB that every driver allows.
struct ThresholdLaunch {
  struct Header {
    const float* found_inf;
    SelectionScratch* scratch;
    DigitPass pass;
    int64_t chunk;  // items that a block takes
    int64_t count;
  };
  static constexpr int kTensors = (4096 - static_cast<int>(sizeof(Header))) / static_cast<int>(sizeof(ThresholdTensor));
  Header header;
  ThresholdTensor tensors[kTensors];
};

// What a block works on: the items [begin, end) of one tensor; none where the call changes nothing.
struct Work {
  const ThresholdTensor& tensor;
  int64_t begin;
  int64_t end;
};

template <class Items>
__device__ __forceinline__ Work work_of(const ThresholdLaunch& launch, Items items) {
  const ThresholdTensor& tensor = launch.tensors[find_tensor(launch)];
  if (launch.header.found_inf != nullptr && *launch.header.found_inf != 0.0f) return {tensor, 0, 0};
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensor.first_block) * launch.header.chunk;
  const int64_t end = begin + launch.header.chunk, last = items(tensor);
  return {tensor, begin, end < last ? end : last};
}

__host__ __device__ __forceinline__ int64_t numel_of(const ThresholdTensor& tensor) { return tensor.numel; }
__host__ __device__ __forceinline__ int64_t channels_of(const ThresholdTensor& tensor) { return tensor.channels; }
__host__ __device__ __forceinline__ int64_t fours_of(const ThresholdTensor& tensor) { return tensor.numel / 4; }

template <class S>
__device__ __forceinline__ auto key_at(const ThresholdTensor& tensor, S value, int64_t i) {
  return key_of(Storage<S>::load(value), tensor.mask == nullptr || tensor.mask[i]);
}

template <class S>
__device__ __forceinline__ void drop(const ThresholdTensor& tensor, int64_t i) {
  static_cast<S*>(tensor.data)[i] = S{};
  if (tensor.momentum_buffer != nullptr) static_cast<S*>(tensor.momentum_buffer)[i] = S{};
}

// One block finds the digit: each thread adds up some bins, and the thread whose bins contain the last survivor goes
// through them. Leaves zeros in the bins for the next pass.
__device__ __forceinline__ void pick_digit(const ThresholdTensor& tensor, const DigitPass& pass,
                                           SelectionScratch& scratch) {
  constexpr int kOwnBins = kBins / kThreads;
  CSGD_SHARED_ARRAY(int64_t, sums, kThreads);
  unsigned long long own[kOwnBins];
  int64_t sum = 0;
  const int first = static_cast<int>(threadIdx.x) * kOwnBins;
#pragma unroll
  for (int b = 0; b < kOwnBins; ++b) {
    own[b] = atomicExch(&scratch.bins[first + b], 0ULL);
    sum += static_cast<int64_t>(own[b]);
  }
  sums[threadIdx.x] = sum;
  const int64_t missing = tensor.keep - scratch.state.taken;
  __syncthreads();
  int64_t more = 0;
  for (int other = kThreads - 1; other > static_cast<int>(threadIdx.x); --other) more += sums[other];
  if (more >= missing || more + sum < missing) return;
  bool found = false;
#pragma unroll
  for (int b = kOwnBins - 1; b >= 0; --b) {
    const auto count = static_cast<int64_t>(own[b]);
    if (!found && more + count >= missing) {
      take_digit(scratch.state, pass, first + b, more, count, tensor.keep);
      found = true;
    }
    more += count;
  }
}

// Counts the digits of a pass. The last block to finish finds the digit of the threshold.
template <class S>
__global__ void __launch_bounds__(kThreads) histogram_kernel(const __grid_constant__ ThresholdLaunch launch) {
  CSGD_SHARED_ARRAY(unsigned, bins, kBins);
  CSGD_SHARED_ARRAY(bool, is_last, 1);
  const Work work = work_of(launch, numel_of);
  const ThresholdTensor& tensor = work.tensor;
  const DigitPass& pass = launch.header.pass;
  SelectionScratch& scratch = launch.header.scratch[tensor.selection];
  const Selection selection = scratch.state;
  if (work.begin >= work.end || is_trivial(tensor) || selection.done != 0) return;
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  const S* data = static_cast<const S*>(tensor.data);
  for (int64_t i = work.begin + int64_t{threadIdx.x} * kPerThread; i < work.end; i += kPass) {
    const int count = work.end - i < kPerThread ? static_cast<int>(work.end - i) : kPerThread;
    Vector<S> values[kPerThread / Vector<S>::kSize];
    load(data + i, count == kPerThread && aligned16(data), count, values);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (k >= count) continue;
      const int digit = digit_of(selection, pass, key_at(tensor, element(values, k), i + k), from_end(tensor, i + k));
      if (digit >= 0) atomicAdd(&bins[digit], 1u);
    }
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {
    if (bins[b] != 0) atomicAdd(&scratch.bins[b], static_cast<unsigned long long>(bins[b]));
  }
  __threadfence();  // the last block sees the counts before it sees that this block is done
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto last = static_cast<unsigned long long>(tensor.selection_blocks - 1);
    is_last[0] = atomicAdd(&scratch.blocks_done, 1ULL) == last;
    __threadfence();
  }
  __syncthreads();
  if (!is_last[0]) return;
  if (threadIdx.x == 0) atomicExch(&scratch.blocks_done, 0ULL);
  pick_digit(tensor, pass, scratch);
}

// Drops the elements that do not survive their selection.
template <class S>
__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ ThresholdLaunch launch) {
  const Work work = work_of(launch, numel_of);
  const ThresholdTensor& tensor = work.tensor;
  const Selection selection = launch.header.scratch[tensor.selection].state;
  S* data = static_cast<S*>(tensor.data);
  S* momentum_buffer = static_cast<S*>(tensor.momentum_buffer);
  for (int64_t i = work.begin + int64_t{threadIdx.x} * kPerThread; i < work.end; i += kPass) {
    const int count = work.end - i < kPerThread ? static_cast<int>(work.end - i) : kPerThread;
    Vector<S> values[kPerThread / Vector<S>::kSize];
    load(data + i, count == kPerThread && aligned16(data), count, values);
    unsigned dropped = 0;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (k >= count) continue;
      const auto key = key_at(tensor, element(values, k), i + k);
      if (key != 0 && survives(tensor, selection, key, from_end(tensor, i + k))) continue;
      dropped |= 1u << k;
      element(values, k) = S{};
      if (tensor.mask != nullptr) tensor.mask[i + k] = false;
    }
    if (dropped == 0) continue;
    store(data + i, count == kPerThread && aligned16(data), count, values);
    if (momentum_buffer == nullptr) continue;
    load(momentum_buffer + i, count == kPerThread && aligned16(momentum_buffer), count, values);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if ((dropped >> k & 1u) != 0) element(values, k) = S{};
    }
    store(momentum_buffer + i, count == kPerThread && aligned16(momentum_buffer), count, values);
  }
}

// A warp takes one channel at a time: each lane adds up the squares of every 32nd element, then the lanes are added in
// halves.
template <class S>
__global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ ThresholdLaunch launch) {
  const Work work = work_of(launch, channels_of);
  const ThresholdTensor& tensor = work.tensor;
  const S* data = static_cast<const S*>(tensor.data);
  const int64_t size = tensor.numel / tensor.channels;
  const int lane = static_cast<int>(threadIdx.x) % kNormLanes;
  for (int64_t c = work.begin + threadIdx.x / kNormLanes; c < work.end; c += kWarps) {
    double sum = 0;
    for (int64_t k = lane; k < size; k += kNormLanes) {
      const auto value = static_cast<double>(Storage<S>::load(data[position_in_channel(tensor, c, k)]));
      sum += value * value;
    }
    for (int half = kNormLanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, half);
    if (lane == 0) tensor.norms[c] = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) masks_kernel(const __grid_constant__ ThresholdLaunch launch) {
  const Work work = work_of(launch, numel_of);
  const ThresholdTensor& tensor = work.tensor;
  for (int64_t i = work.begin + threadIdx.x; i < work.end; i += kThreads) {
    if (!tensor.mask[i / tensor.inner % tensor.channels]) drop<S>(tensor, i);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) two_of_four_kernel(const __grid_constant__ ThresholdLaunch launch) {
  const Work work = work_of(launch, fours_of);
  const ThresholdTensor& tensor = work.tensor;
  const S* data = static_cast<const S*>(tensor.data);
  for (int64_t four = work.begin + threadIdx.x; four < work.end; four += kThreads) {
    const int64_t first = position_of_four(tensor, four);
    typename KeyType<typename Storage<S>::Opmath>::Type keys[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) keys[j] = key_at(tensor, data[first + j * tensor.inner], first + j * tensor.inner);
    const unsigned kept = two_of_four(keys);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if ((kept >> j & 1u) != 0 && keys[j] != 0) continue;
      drop<S>(tensor, first + j * tensor.inner);
      if (tensor.mask != nullptr) tensor.mask[first + j * tensor.inner] = false;
    }
  }
}

}  // namespace
}  // namespace csgd
