// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 bytes, the most that one instruction can load or store: how the lanes of a warp divide 256 consecutive
// elements into vectors, and how a lane loads and stores its own.
//
// The vectors of a lane lie 512 bytes apart, so that an instruction of the warp reads or writes 512 consecutive bytes.
// In 16 bits a lane has one vector, in float32 two, in float64 four.
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
  static constexpr int kEach = Vector<S>::kSize;       // elements of a vector
  static constexpr int kVectors = kPerThread / kEach;  // vectors of a lane
  static constexpr int kStride = 32 * kEach;           // elements from the start of one vector to the start of the next
  static constexpr bool kOwnDraws = kEach == kPerThread;  // the elements of a lane are those of one Philox call
};
template <class S>
using LaneVectors = Vector<S>[Lanes<S>::kVectors];

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// Whether an element of this vector of the lane is in the mask, which is not 0.
template <class S>
__device__ __forceinline__ bool in_vector(uint32_t mask, int vector) {
  if constexpr (Lanes<S>::kVectors == 1) return true;
  return (mask >> (vector * Lanes<S>::kEach) & ((1u << Lanes<S>::kEach) - 1u)) != 0;
}

// Loads and stores those of the lane's vectors that have an element in the mask. The first vector lies at `from`
// (`to`).
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
