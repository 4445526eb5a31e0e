// SPDX-License-Identifier: Apache-2.0
// What one thread does with eight elements: the parts of a step, and the step of eight consecutive elements.
#pragma once

#include <cmath>

#include "../core/shard.h"
#include "../core/update_rule.h"
#include "blocks.cuh"
#include "rounding.cuh"
#include "vectors.cuh"

namespace csgd {

// Loads and stores eight consecutive elements. Beyond `count` zeros are loaded and nothing is stored. `wide`: by
// 16-byte accesses, which need all eight elements and an aligned address.
template <class S>
__device__ __forceinline__ void load8(const S* from, int count, bool wide, S (&to)[kPerThread]) {
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
__device__ __forceinline__ void store8(S* to, int count, bool wide, const S (&from)[kPerThread]) {
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

// integers() plus the draw in one half of a word. `half` selects bytes for __byte_perm: two of the word, and above them
// the upper two of 2^23; together they are the bits of the sum.
constexpr unsigned kLowHalf = 0x7610, kHighHalf = 0x7632;

template <class T>
__device__ __forceinline__ T half_above(uint32_t word, unsigned half) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return bit_cast<float>(__byte_perm(word, FloatBits<float>::kIntegers, half));
  } else {
    return bit_cast<double>(FloatBits<double>::kIntegers | __byte_perm(word, 0, half));
  }
}

// The same for element k of the eight that one Philox call serves.
template <class T>
__device__ __forceinline__ T draw_above(const Philox4x32& bits, int k) {
  return half_above<T>(bits.word[k & 3], k < 4 ? kLowHalf : kHighHalf);
}

// Raises the partial's maximum to the largest finite |d|. Nearly always all eight are finite.
template <class T>
__device__ __forceinline__ void note_largest(const T (&d)[kPerThread], Partial<T>& partial) {
  const auto note = [&](typename FloatBits<T>::Type bits) {
    partial.largest_bits = bits > partial.largest_bits ? bits : partial.largest_bits;
  };
  T largest = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) largest = std::fmax(largest, std::fabs(d[k]));  // NaN is ignored
  if (largest < bit_cast<T>(FloatBits<T>::kInfinity)) {
    note(bit_cast<typename FloatBits<T>::Type>(largest));
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) note(finite_magnitude_bits(d[k]));
  }
}

// Computes the direction d of eight elements, and above = integers() + n. Returns which elements move, a bit for each.
// `momentum` becomes the new one, unrounded. draw(k): integers() plus the calibration draw of element k.
template <class T, class Parts, class Draw>
__device__ __forceinline__ uint32_t decide8(const Parts& parts, const StepScalars<T>& scalars, Draw draw,
                                            const T (&grad)[kPerThread], const T (&param)[kPerThread],
                                            T (&momentum)[kPerThread], T (&d)[kPerThread], T (&above)[kPerThread],
                                            Partial<T>& partial) {
  uint32_t move = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    d[k] = direction(parts, scalars, grad[k], param[k], momentum[k]);
    above[k] = round_up_above(limited_product(d[k], scalars.scale));
    move |= (draw(k) < above[k] ? 1u : 0u) << k;
  }
  note_largest(d, partial);
  return move;
}

// Computes the new values, unrounded, of those of eight elements that move.
template <class T>
__device__ __forceinline__ void move8(const StepScalars<T>& scalars, const T (&d)[kPerThread],
                                      const T (&above)[kPerThread], uint32_t move, T (&param)[kPerThread]) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const T moved = moved_value(param[k], scalars.lr, d[k], inverse_probability_above(above[k]));
    param[k] = select((move >> k & 1u) != 0, moved, param[k]);
  }
}

// Steps `count` (1 ... 8) elements from `position`, a multiple of 8, on. `wide`: 16-byte accesses may be used. Tensor:
// CsgdTensor or CsgdShard, whose draws differ.
template <class S, class T, class Parts, class Header, class Tensor>
__device__ __forceinline__ void step8(const Header& header, const Parts& parts, const Tensor& tensor,
                                      const StepScalars<T>& scalars, int64_t position, int count, bool wide,
                                      Partial<T>& partial) {
  const bool stochastic = header.options.stochastic_rounding;
  S* param_at = static_cast<S*>(tensor.param) + position;
  S* momentum_at = static_cast<S*>(tensor.momentum_buffer) + position;
  const auto draws_of = [&](Stream stream) { return draw_eight(header.keys, stream, tensor, position, scalars.step); };

  // All loads that do not depend on the draws are started before the first is needed.
  S grad[kPerThread], param[kPerThread] = {}, momentum_buffer[kPerThread] = {};
  load8(static_cast<const S*>(tensor.grad) + position, count, wide, grad);
  if (parts.momentum) load8(momentum_at, count, wide, momentum_buffer);
  if (parts.weight_decay) load8(param_at, count, wide, param);
  const Philox4x32 bits = draws_of(kCalibrationStream);
  const auto draw = [&](int k) { return draw_above<T>(bits, k); };
  T g[kPerThread], theta[kPerThread], momentum[kPerThread], d[kPerThread], above[kPerThread];
  widen8(grad, g);
  widen8(param, theta);
  widen8(momentum_buffer, momentum);
  uint32_t move = decide8(parts, scalars, draw, g, theta, momentum, d, above, partial);
  move &= (1u << count) - 1u;  // the zeros beyond the tensor's end move when T = 0
  partial.moved += __popc(move);

  if (parts.momentum) {
    round8(stochastic, [&] { return draws_of(kMomentumStream); }, momentum, 0xFFu, momentum_buffer);
    store8(momentum_at, count, wide, momentum_buffer);
  }
  if (move != 0) {  // if none moves, the parameter's memory is not touched
    if (!parts.weight_decay) load8(param_at, count, wide, param);
    widen8(param, theta);
    move8(scalars, d, above, move, theta);
    round8(stochastic, [&] { return draws_of(kParamStream); }, theta, move, param);
    store8(param_at, count, wide, param);
  }
}

}  // namespace csgd
