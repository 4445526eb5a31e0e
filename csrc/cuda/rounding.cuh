// SPDX-License-Identifier: Apache-2.0
// Converts vectors from storage to opmath and, with rounding, back.
#pragma once

#include <type_traits>

#include "../core/update_rule.h"
#include "draws.cuh"
#include "vectors.cuh"

namespace csgd {

template <class S, class T, int kVectors, int kCount>
__device__ __forceinline__ void widen(const Vector<S> (&from)[kVectors], T (&to)[kCount]) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // two elements of a word at a time, by half of the instructions
#pragma unroll
    for (int w = 0; w < kCount / 2; ++w) {
      const uint32_t word = bit_cast<Vector<uint32_t>>(from[w / 4]).value[w % 4];
      to[2 * w] = bit_cast<float>(word << 16);
      to[2 * w + 1] = bit_cast<float>(word & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[k] = Storage<S>::load(element(from, k));
  }
}

// The largest magnitude of the values, NaN if one of them is NaN.
template <class T, int kCount>
__device__ __forceinline__ T largest_magnitude(const T (&values)[kCount]) {
  T largest = magnitude(values[0]);
#pragma unroll
  for (int k = 1; k < kCount; ++k) largest = larger_or_nan(largest, magnitude(values[k]));
  return largest;
}

// Whether none of the values is NaN or beyond the largest number of the format.
template <class S, int kCount>
__device__ __forceinline__ bool are_ordinary(const float (&values)[kCount]) {
  return largest_magnitude(values) <= bit_cast<float>(Storage<S>::Format::kLargest);
}

// Rounds ordinary values stochastically, by fewer instructions than Storage does it for any value.
__device__ __forceinline__ void round_ordinary(const VectorDraws<8>& draws, const float (&values)[8],
                                               Vector<BFloat16>& to) {
  uint32_t sums[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) sums[k] = bit_cast<uint32_t>(values[k]) + draws.complement(k);
  Vector<uint32_t> words;
#pragma unroll
  for (int w = 0; w < 4; ++w) words.value[w] = __byte_perm(sums[2 * w], sums[2 * w + 1], 0x7632);  // the upper halves
  to = bit_cast<Vector<BFloat16>>(words);
}

// In float16 a GPU truncates by one instruction, also to subnormal numbers. The part that is cut off is compared with
// the draw.
__device__ __forceinline__ void round_ordinary(const VectorDraws<8>& draws, const float (&values)[8],
                                               Vector<Float16>& to) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint32_t truncated = Float16Format::truncate(values[k]);
    const float rest = magnitude(values[k] - Float16Format::widen(truncated));
    const bool up = draw_value<float>(draws[k]) * Float16Format::draw_unit(values[k]) < rest;
    to.value[k].bits = static_cast<uint16_t>(truncated + (up ? 1u : 0u));
  }
}

// Rounds those of the values that are in the mask. With stochastic rounding make_draws() makes their draws. A value
// that is not in the mask must be what `to` holds already: then rounding does not change it, unless it is NaN.
template <class S, class T, int kVectors, int kCount, class MakeDraws>
__device__ __forceinline__ void narrow(bool stochastic, MakeDraws make_draws, const T (&values)[kCount], uint32_t mask,
                                       Vector<S> (&to)[kVectors]) {
  if constexpr (!Storage<S>::kRounds) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) element(to, k) = values[k];
  } else {
    VectorDraws<kCount> draws;
    if (stochastic) {
      draws = make_draws();
      if (are_ordinary<S>(values)) return round_ordinary(draws, values, to[0]);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const S rounded =
          stochastic ? Storage<S>::store_stochastic(values[k], draws[k]) : Storage<S>::store_nearest(values[k]);
      to[0].value[k] = select((mask >> k & 1u) != 0, rounded, to[0].value[k]);
    }
  }
}

}  // namespace csgd
