// SPDX-License-Identifier: Apache-2.0
// Converts from storage to opmath and, with rounding, back: eight elements of a thread at a time.
#pragma once

#include <type_traits>

#include "vectors.cuh"

namespace csgd {

template <class S, class T>
__device__ __forceinline__ void widen8(const S (&from)[kPerThread], T (&to)[kPerThread]) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) to[k] = Storage<S>::load(from[k]);
}

// Rounds those of eight opmath values that are in the mask. With stochastic rounding draw() makes the eight draws, one
// for each value.
template <class S, class T, class Draw>
__device__ __forceinline__ void round8(bool stochastic, Draw draw, const T (&values)[kPerThread], uint32_t mask,
                                       S (&to)[kPerThread]) {
  S rounded[kPerThread];
  if (Storage<S>::kRounds && stochastic) {
    const Philox4x32 bits = draw();
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) rounded[k] = Storage<S>::store_stochastic(values[k], draw_lane(bits, k));
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) rounded[k] = Storage<S>::store_nearest(values[k]);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) to[k] = select((mask >> k & 1u) != 0, rounded[k], to[k]);
}

// The same for a lane's vectors.
template <class S, class T>
__device__ __forceinline__ void widen(const LaneVectors<S>& from, T (&to)[kPerThread]) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // two elements of a word at a time, by half of the instructions
    const auto words = bit_cast<Vector<uint32_t>>(from[0]);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      to[2 * w] = bit_cast<float>(words.value[w] << 16);
      to[2 * w + 1] = bit_cast<float>(words.value[w] & 0xFFFF0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      to[k] = Storage<S>::load(from[k / Lanes<S>::kEach].value[k % Lanes<S>::kEach]);
    }
  }
}

// Whether none of eight values is NaN or beyond the largest number of the format.
template <class S>
__device__ __forceinline__ bool are_ordinary(const float (&values)[kPerThread]) {
  bool ordinary = true;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    ordinary &= magnitude(values[k]) <= bit_cast<float>(Storage<S>::Format::kLargest);
  }
  return ordinary;
}

// Rounds eight ordinary values stochastically.
__device__ __forceinline__ void round_ordinary(const Philox4x32& draws, const float (&values)[kPerThread],
                                               Vector<BFloat16>& to) {
  uint32_t sums[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    sums[k] = bit_cast<uint32_t>(values[k]) + BFloat16Format::stochastic_addend(draw_lane(draws, k));
  }
  Vector<uint32_t> words;
#pragma unroll
  for (int w = 0; w < 4; ++w) words.value[w] = __byte_perm(sums[2 * w], sums[2 * w + 1], 0x7632);  // the upper halves
  to = bit_cast<Vector<BFloat16>>(words);
}

// In float16 a GPU truncates by one instruction, also to subnormal numbers. The part that is cut off is compared with
// the draw.
__device__ __forceinline__ void round_ordinary(const Philox4x32& draws, const float (&values)[kPerThread],
                                               Vector<Float16>& to) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const uint32_t truncated = Float16Format::truncate(values[k]);
    const float rest = magnitude(values[k]) - magnitude(Float16Format::widen(truncated));
    const bool up = draw_value<float>(draw_lane(draws, k)) * Float16Format::draw_unit(values[k]) < rest;
    to.value[k].bits = static_cast<uint16_t>(truncated + (up ? 1u : 0u));
  }
}

// Rounds the lane's values that are in the mask. With stochastic rounding draw() makes the eight draws, one for each
// value. A value that is not in the mask is what `to` holds already, and rounding it does not change it.
template <class S, class T, class Draw>
__device__ __forceinline__ void narrow(bool stochastic, Draw draw, const T (&values)[kPerThread], uint32_t mask,
                                       LaneVectors<S>& to) {
  if constexpr (!Storage<S>::kRounds) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) to[k / Lanes<S>::kEach].value[k % Lanes<S>::kEach] = values[k];
  } else if (stochastic) {
    const Philox4x32 draws = draw();
    if (are_ordinary<S>(values)) return round_ordinary(draws, values, to[0]);
    round8(true, [&] { return draws; }, values, mask, to[0].value);
  } else {
    round8(false, draw, values, mask, to[0].value);
  }
}

}  // namespace csgd
