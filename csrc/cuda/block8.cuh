// SPDX-License-Identifier: Apache-2.0
// What one thread does: step eight consecutive elements, which one Philox call serves.
#pragma once

#include "../core/shard.h"
#include "../core/update_rule.h"
#include "blocks.cuh"
#include "pruned.cuh"

namespace csgd {

// 16 bytes, the widest access of one instruction.
template <class S>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(S);
  S value[kSize];
};

__device__ __forceinline__ bool aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Eight consecutive elements; beyond `count` zeros are read and nothing is written. `wide`: 16-byte accesses,
// for full blocks at aligned addresses.
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

// Rounds eight opmath values to storage, each with its own of the eight draws that `draw` makes where rounding is
// stochastic.
template <class S, class T, class Draw>
__device__ __forceinline__ void round8(bool stochastic, Draw draw, const T (&values)[kPerThread],
                                       S (&out)[kPerThread]) {
  if (Storage<S>::kRounds && stochastic) {
    const Philox4x32 bits = draw();
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = Storage<S>::store_stochastic(values[k], draw_lane(bits, k));
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = Storage<S>::store_nearest(values[k]);
  }
}

// Steps the `count` (1 ... 8) elements from `position`, a multiple of 8, on. `wide`: 16-byte accesses may be used.
// Tensor: CsgdTensor or CsgdShard, which draw differently, or CsgdPruned, for which `bins` may count.
template <class S, class T, class Tensor>
__device__ __forceinline__ void step8(const CsgdOptions& options, const Tensor& tensor, const StepScalars<T>& scalars,
                                      int64_t position, int count, bool wide, Partial<T>& partial, unsigned* bins) {
  const RuntimeParts parts = runtime_parts(options);
  S* param_at = static_cast<S*>(tensor.param) + position;
  S* momentum_at = static_cast<S*>(tensor.momentum_buffer) + position;
  const auto draw = [&](Stream stream) { return draw_eight(options.seed, stream, tensor, position, scalars.step); };

  // All loads that do not depend on the draws are in flight before the first is needed.
  S grad[kPerThread], param[kPerThread] = {}, momentum_buffer[kPerThread] = {};
  load8(static_cast<const S*>(tensor.grad) + position, count, wide, grad);
  if (parts.momentum) load8(momentum_at, count, wide, momentum_buffer);
  const bool reads_param = parts.weight_decay || (kIsPruned<Tensor> && bins != nullptr);
  if (reads_param) load8(param_at, count, wide, param);
  uint32_t alive = 0xFFu;  // one bit for each element
  if constexpr (kIsPruned<Tensor>) {
    alive = alive8(tensor.mask, position, count);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) grad[k] = select((alive >> k & 1u) != 0, grad[k], S{});
  }
  const Philox4x32 bits = draw(kCalibrationStream);

  T d[kPerThread], momentum[kPerThread];
  uint32_t move = 0;  // one bit for each element
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    momentum[k] = Storage<S>::load(momentum_buffer[k]);
    d[k] = direction(parts, scalars, Storage<S>::load(grad[k]), Storage<S>::load(param[k]), momentum[k]);
    const auto largest_bits = finite_magnitude_bits(d[k]);
    partial.largest_bits = largest_bits > partial.largest_bits ? largest_bits : partial.largest_bits;
    move |= (moves(draw_lane(bits, k), moving_draws(d[k], scalars.scale)) ? 1u : 0u) << k;
  }
  move &= (1u << count) - 1u;  // beyond the tensor's end d is 0, which moves when T = 0
  partial.moved += __popc(move);

  if (parts.momentum) {
    round8<S>(options.stochastic_rounding, [&] { return draw(kMomentumStream); }, momentum, momentum_buffer);
    store8(momentum_at, count, wide, momentum_buffer);
  }
  if (move != 0) {  // else the parameter's memory is not touched
    if (!reads_param) load8(param_at, count, wide, param);
    T theta[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const T n = moving_draws(d[k], scalars.scale);  // again: cheaper than eight registers kept until here
      theta[k] = moved_value(Storage<S>::load(param[k]), scalars.lr, d[k], n);
    }
    S stored[kPerThread];
    round8<S>(options.stochastic_rounding, [&] { return draw(kParamStream); }, theta, stored);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) param[k] = select((move >> k) & 1u, stored[k], param[k]);
    store8(param_at, count, wide, param);
  }
  if constexpr (kIsPruned<Tensor>) {
    if (bins != nullptr) count8(param, alive, count, bins);
  }
}

}  // namespace csgd
