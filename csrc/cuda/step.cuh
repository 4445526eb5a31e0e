// SPDX-License-Identifier: Apache-2.0
// What one thread does in a step: it takes a vector of 16 bytes from the gradient to the new parameter.
#pragma once

#include "../core/update_rule.h"
#include "blocks.cuh"
#include "rounding.cuh"

namespace csgd {

// The elements of a tensor that a block takes, from `begin` on.
template <class S, int kBuffers>
struct BlockPart {
  int64_t begin;
  int count;
  S* param;
  const S* grad;
  S* buffers[kBuffers];  // of the direction's state

  // Tensor: BufferedTensor or StepShard.
  template <class Tensor>
  __device__ __forceinline__ BlockPart(const Tensor& tensor, int64_t from, int64_t chunk)
      : begin(from),
        count(static_cast<int>(from + chunk < tensor.numel ? chunk : tensor.numel - from)),
        param(static_cast<S*>(tensor.param) + from),
        grad(static_cast<const S*>(tensor.grad) + from) {
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) buffers[b] = static_cast<S*>(tensor.buffers[b]) + from;
  }
};

// Raises the partial's maximum to the largest finite |d|. Nearly always all are finite.
template <class T, int kCount>
__device__ __forceinline__ void note_largest(const T (&d)[kCount], Partial<T>& partial) {
  using Bits = typename FloatBits<T>::Type;
  const auto note = [&](Bits bits) {
    partial.largest_bits = bits > partial.largest_bits ? bits : partial.largest_bits;
  };
  const T largest = largest_magnitude(d);
  if (largest < bit_cast<T>(FloatBits<T>::kInfinity)) {
    note(bit_cast<Bits>(largest));
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) note(finite_magnitude_bits(d[k]));
  }
}

// above = integers() + n for each d. Whether a product may underflow is the same for all of a tensor.
template <class T, int kCount>
__device__ __forceinline__ void find_moving_draws(const T (&d)[kCount], T scale, T (&above)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) above[k] = round_up_above(limited_product(d[k], scale));
  if (!may_underflow(scale)) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) above[k] = larger(above[k], round_up_above(least_product(d[k])));
}

// Steps the elements of a vector: `count` of them, from element `offset` of the block's part on. With kWhole the vector
// is whole and lies at an aligned address in all arrays. Tensor: BufferedTensor or StepShard, whose draws differ.
//
// Loads that do not depend on the draws come first, so that all of them are on their way at the same time. Rounding
// comes before the draws that decide: fewer values are alive at a time, and a multiprocessor can hold more threads.
template <bool kWhole, class S, class T, class Direction, class Header, class Tensor, int kBuffers>
__device__ __forceinline__ void step_vector(const Header& header, const Direction& direction, const Tensor& tensor,
                                            const StepScalars<T>& scalars, const BlockPart<S, kBuffers>& part,
                                            int offset, int count, Partial<T>& partial) {
  constexpr int kCount = Vector<S>::kSize;
  const bool stochastic = header.options.stochastic_rounding;
  const auto draws_of = [&](Stream stream) {
    return vector_draws<kCount>(header.keys, stream, tensor, part.begin + offset, scalars.step);
  };
  const auto wide = [&](const void* array) { return kWhole || (count == kCount && aligned16(array)); };
  S* param_at = part.param + offset;

  Vector<S> stored_grad[1], stored_param[1] = {}, stored_buffers[kBuffers][1] = {};
  load(part.grad + offset, wide(part.grad), count, stored_grad);
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) {
    if (direction.has_buffers()) load(part.buffers[b] + offset, wide(part.buffers[b]), count, stored_buffers[b]);
  }
  if (direction.reads_param()) load(param_at, wide(part.param), count, stored_param);
  T grad[kCount], param[kCount], buffers[kBuffers][kCount], d[kCount], above[kCount];
  widen(stored_grad, grad);
  widen(stored_param, param);
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) widen(stored_buffers[b], buffers[b]);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    T of_element[kBuffers];
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) of_element[b] = buffers[b][k];
    d[k] = direction(grad[k] * scalars.grad_factor, param[k], of_element);
#pragma unroll
    for (int b = 0; b < kBuffers; ++b) buffers[b][k] = of_element[b];
  }
  note_largest(d, partial);
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) {
    if (!direction.has_buffers()) continue;
    narrow<S>(stochastic, [&] { return draws_of(buffer_stream(b)); }, buffers[b], ~0u, stored_buffers[b]);
    store(part.buffers[b] + offset, wide(part.buffers[b]), count, stored_buffers[b]);
  }

  const auto draws = draws_of(kCalibrationStream);
  find_moving_draws(d, scalars.scale, above);
  uint32_t move = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) move |= (draws.template above<T>(k) < above[k] ? 1u : 0u) << k;
  if (!kWhole) move &= (1u << count) - 1u;  // the zeros beyond the tensor's end move when T = 0
  partial.moved += __popc(move);
  if (move == 0) return;  // the parameter's memory is not touched

  // Registers are scarce: so d becomes the change before there are parameters, and with weight decay these are loaded a
  // second time, from the first-level cache.
  load(param_at, wide(part.param), count, stored_param);
#pragma unroll
  for (int k = 0; k < kCount; ++k) d[k] = change_of(scalars.lr, d[k] * inverse_probability_above(above[k]));
  widen(stored_param, param);
#pragma unroll
  for (int k = 0; k < kCount; ++k) param[k] = select((move >> k & 1u) != 0, param[k] - d[k], param[k]);
  narrow<S>(stochastic, [&] { return draws_of(kParamStream); }, param, move, stored_param);
  store(param_at, wide(part.param), count, stored_param);
}

// Steps all elements of the block's part: by whole vectors where all arrays allow that, then what is left of them.
template <class S, class T, class Direction, class Header, class Tensor, int kBuffers>
__device__ __forceinline__ void step_part(const Header& header, const Direction& direction, const Tensor& tensor,
                                          const StepScalars<T>& scalars, const BlockPart<S, kBuffers>& part,
                                          Partial<T>& partial) {
  constexpr int kCount = Vector<S>::kSize;
  bool aligned = aligned16(part.param) && aligned16(part.grad);
#pragma unroll
  for (int b = 0; b < kBuffers; ++b) {
    if (direction.has_buffers()) aligned = aligned && aligned16(part.buffers[b]);
  }
  const int whole_end = aligned ? part.count - part.count % kCount : 0;
  int i = static_cast<int>(threadIdx.x) * kCount;
#pragma unroll 1
  for (; i < whole_end; i += kThreads * kCount) {
    step_vector<true>(header, direction, tensor, scalars, part, i, kCount, partial);
  }
#pragma unroll 1
  for (; i < part.count; i += kThreads * kCount) {
    const int count = part.count - i < kCount ? part.count - i : kCount;
    step_vector<false>(header, direction, tensor, scalars, part, i, count, partial);
  }
}

}  // namespace csgd
