// SPDX-License-Identifier: Apache-2.0
// What the step of a pruned parameter does beside the step itself: one thread's part of it, and one block's.
#pragma once

#include <type_traits>

#include "../core/magnitude_key.h"
#include "../core/shard.h"
#include "blocks.cuh"

namespace csgd {

template <class Tensor>
constexpr bool kIsPruned = std::is_same_v<Tensor, CsgdPruned>;

// Whose draws a pruned parameter takes: it is a whole one.
template <class Key>
CSGD_HOST_DEVICE Philox4x32 draw_eight(const Key& key, Stream stream, const CsgdPruned& tensor, int64_t first,
                                       uint32_t step) {
  return draw_eight(key, stream, static_cast<const CsgdTensor&>(tensor), first, step);
}

// Which of the `count` (1 ... 8) elements from `position`, a multiple of 8, on are alive: a bit for each.
__device__ __forceinline__ uint32_t alive8(const bool* mask, int64_t position, int count) {
  if (mask == nullptr) return 0xFFu;
  struct alignas(kPerThread) Eight {
    uint8_t value[kPerThread];
  };
  const bool* from = mask + position;
  uint32_t alive = 0;
  if (count == kPerThread && reinterpret_cast<uintptr_t>(from) % sizeof(Eight) == 0) {
    const Eight eight = *reinterpret_cast<const Eight*>(from);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) alive |= uint32_t{eight.value[k]} << k;  // a bool is 0 or 1
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) alive |= (k < count && from[k] ? 1u : 0u) << k;
  }
  return alive;
}

// The block's counters of first digits, all 0; null where nobody asks for them.
__device__ __forceinline__ unsigned* start_counts(const CsgdPruned& tensor) {
  if (tensor.histogram == nullptr) return nullptr;
  CSGD_SHARED_ARRAY(unsigned, bins, kBins);
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  return bins;
}

// Counts the first digits of the first `count` of eight elements.
template <class S>
__device__ __forceinline__ void count8(const S (&values)[kPerThread], uint32_t alive, int count, unsigned* bins) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k < count) atomicAdd(&bins[first_digit(Storage<S>::load(values[k]), (alive >> k & 1u) != 0)], 1u);
  }
}

// Adds what the block has counted to the histogram.
__device__ __forceinline__ void end_counts(const CsgdPruned& tensor, const unsigned* bins) {
  if (bins == nullptr) return;
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) {
    if (bins[b] != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(tensor.histogram) + b, static_cast<unsigned long long>(bins[b]));
    }
  }
}

}  // namespace csgd
