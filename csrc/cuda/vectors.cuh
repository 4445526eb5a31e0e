// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 bytes, the widest access of one instruction: how a warp's lanes share out 256 consecutive elements by
// them, and what a lane does with its own.
//
// A lane takes vectors that lie 512 bytes apart, so that an instruction of the warp reads or writes 512 consecutive
// bytes. In 16 bits a lane has one vector, in float32 two, in float64 four.
#pragma once

#include "blocks.cuh"

namespace csgd {

template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S value[kSize];
};

__device__ __forceinline__ bool aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <class S>
struct Lanes {
  static constexpr int kEach = Vector<S>::kSize;          // elements of a vector
  static constexpr int kVectors = kPerThread / kEach;     // of a lane
  static constexpr int kStride = 32 * kEach;              // elements from the start of one of them to that of the next
  static constexpr bool kOwnDraws = kEach == kPerThread;  // a lane's elements are those of one Philox call
};
template <class S>
using LaneVectors = Vector<S>[Lanes<S>::kVectors];

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// Whether one of the elements of a lane's vector is in the mask, which is not 0.
template <class S>
__device__ __forceinline__ bool in_vector(uint32_t mask, int vector) {
  if constexpr (Lanes<S>::kVectors == 1) return true;
  return (mask >> (vector * Lanes<S>::kEach) & ((1u << Lanes<S>::kEach) - 1u)) != 0;
}

// The lane's vectors, the first of which lies at `from`; those with an element in the mask.
template <class S>
__device__ __forceinline__ void load_vectors(const S* from, uint32_t mask, LaneVectors<S>& to) {
#pragma unroll
  for (int v = 0; v < Lanes<S>::kVectors; ++v) {
    if (in_vector<S>(mask, v)) to[v] = *reinterpret_cast<const Vector<S>*>(from + v * Lanes<S>::kStride);
  }
}

template <class S>
__device__ __forceinline__ void store_vectors(S* to, uint32_t mask, const LaneVectors<S>& from) {
#pragma unroll
  for (int v = 0; v < Lanes<S>::kVectors; ++v) {
    if (in_vector<S>(mask, v)) *reinterpret_cast<Vector<S>*>(to + v * Lanes<S>::kStride) = from[v];
  }
}

}  // namespace csgd
