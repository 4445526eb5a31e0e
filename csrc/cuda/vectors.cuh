// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 bytes, the most that one instruction loads or stores. Where the threads of a warp take consecutive
// vectors, such an instruction reads or writes 512 consecutive bytes.
#pragma once

#include "../core/host_device.h"

namespace csgd {

template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S value[kSize];
};

// Whether an array can be accessed by vectors. This is decided for each array of a tensor by itself: a gradient often
// is a view of a larger buffer, at any address, and must not slow down the accesses to the parameter.
__device__ __forceinline__ bool aligned16(const void* array) { return reinterpret_cast<uintptr_t>(array) % 16 == 0; }

// Element k of several vectors.
template <class S, int kVectors>
__device__ __forceinline__ S& element(Vector<S> (&of)[kVectors], int k) {
  return of[k / Vector<S>::kSize].value[k % Vector<S>::kSize];
}
template <class S, int kVectors>
__device__ __forceinline__ const S& element(const Vector<S> (&of)[kVectors], int k) {
  return of[k / Vector<S>::kSize].value[k % Vector<S>::kSize];
}

// Loads all elements by vectors if `wide`, else the first `count` one by one, and zeros in place of the others.
template <class S, int kVectors>
__device__ __forceinline__ void load(const S* from, bool wide, int count, Vector<S> (&to)[kVectors]) {
  if (wide) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) to[v] = reinterpret_cast<const Vector<S>*>(from)[v];
  } else {
#pragma unroll
    for (int k = 0; k < kVectors * Vector<S>::kSize; ++k) element(to, k) = k < count ? from[k] : S{};
  }
}

template <class S, int kVectors>
__device__ __forceinline__ void store(S* to, bool wide, int count, const Vector<S> (&from)[kVectors]) {
  if (wide) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector<S>*>(to)[v] = from[v];
  } else {
#pragma unroll
    for (int k = 0; k < kVectors * Vector<S>::kSize; ++k) {
      if (k < count) to[k] = element(from, k);
    }
  }
}

}  // namespace csgd
