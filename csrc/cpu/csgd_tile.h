// SPDX-License-Identifier: Apache-2.0
// The loop over one chunk, in tiles of 256 elements. Included once per instruction set by csgd_cpu_*.cpp, which
// name it with CSGD_ISA and bring its Words; plain loops over small arrays, which the compiler turns into vectors.
#ifndef CSGD_ISA
#error "define CSGD_ISA, the namespace of the instruction set, before including csgd_tile.h"
#endif

#include "../core/update_rule.h"
#include "csgd_cpu.h"

namespace csgd {
namespace CSGD_ISA {

constexpr int kTile = 256;         // enough calls of Philox side by side to hide how long one takes
constexpr int kAhead = 2 * kTile;  // elements, how far ahead memory is asked for
constexpr int kBlocks = kTile / kDrawsPerCall;

// The draws of a tile; `position`, of its first element, is a multiple of kTile, so that the blocks share their upper
// half.
static inline void draw_tile(uint64_t seed, Stream stream, const CsgdTensor& tensor, uint32_t step, int64_t position,
                             uint16_t* draws) {
  const uint64_t block = static_cast<uint64_t>(position) / kDrawsPerCall;
  const uint32_t high = static_cast<uint32_t>(block >> 32);
  for (int j = 0; j < kBlocks; j += Words::kLanes) {
    const Words low = Words::blocks_from(static_cast<uint32_t>(block) + static_cast<uint32_t>(j));
    store_draws(draw_words(seed, stream, low, high, tensor.index, step), draws + j * kDrawsPerCall);
  }
}

// Stores a tile of values, rounded as the options ask; with kMasked only those with keep[i] != 0.
template <bool kMasked, class S, class T>
static inline void store_tile(const CsgdOptions& options, Stream stream, const CsgdTensor& tensor, uint32_t step,
                              int64_t position, const T* values, const int32_t* keep, S* out) {
  if (Storage<S>::kRounds && options.stochastic_rounding) {
    uint16_t draws[kTile];
    draw_tile(options.seed, stream, tensor, step, position, draws);
    for (int i = 0; i < kTile; ++i) {
      const S rounded = Storage<S>::store_stochastic(values[i], draws[i]);
      Storage<S>::write(out + i, kMasked ? Storage<S>::select(keep[i] != 0, rounded, out[i]) : rounded);
    }
  } else {
    for (int i = 0; i < kTile; ++i) {
      const S rounded = Storage<S>::store_nearest(values[i]);
      Storage<S>::write(out + i, kMasked ? Storage<S>::select(keep[i] != 0, rounded, out[i]) : rounded);
    }
  }
}

// Asks for the memory of a tile that comes soon: three streams at once are more than the hardware foresees. Past the
// end of a tensor it does nothing.
static inline void prefetch_tile(const void* tile, size_t bytes) {
#if defined(__GNUC__)
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(tile) + i);
#else
  (void)tile, (void)bytes;
#endif
}

// Steps a tile, of which the first `count` elements count; all of it can be read and written.
template <class S, class Parts>
static inline void step_tile(const CsgdOptions& options, const CsgdTensor& tensor,
                             const StepScalars<typename Storage<S>::Opmath>& scalars, int64_t position, int count,
                             S* param, const S* grad, S* momentum_buffer, ChunkResult* result) {
  using T = typename Storage<S>::Opmath;
  using Bits = typename Storage<T>::Bits;
  constexpr Parts parts{};
  T d[kTile], momentum[kTile], n[kTile];
  uint16_t draws[kTile];
  int32_t move[kTile];

  for (int i = 0; i < kTile; ++i) {
    const T theta = parts.weight_decay ? Storage<S>::load(param[i]) : T(0);
    momentum[i] = parts.momentum ? Storage<S>::load(momentum_buffer[i]) : T(0);
    d[i] = direction(parts, scalars, Storage<S>::load(grad[i]), theta, momentum[i]);
  }
  Bits largest = 0;
  for (int i = 0; i < kTile; ++i) {  // padding has d = 0
    const Bits bits = finite_magnitude_bits(d[i]);
    largest = largest < bits ? bits : largest;
  }
  if (result->largest_bits < largest) result->largest_bits = largest;

  // With T = 0 every draw is below n = 2^16, so none is needed.
  const bool all_move = !(scalars.scale < bit_cast<T>(Storage<T>::kInfinityBits));
  if (all_move) {
    for (int i = 0; i < kTile; ++i) draws[i] = 0;
  } else {
    draw_tile(options.seed, kCalibrationStream, tensor, scalars.step, position, draws);
  }
  int32_t moved = 0;
  for (int i = 0; i < kTile; ++i) {
    n[i] = moving_draws(d[i], scalars.scale);
    move[i] = static_cast<int32_t>(moves(draws[i], n[i])) & static_cast<int32_t>(i < count);
    moved += move[i];
  }
  result->moved += moved;

  if (parts.momentum) {
    store_tile<false>(options, kMomentumStream, tensor, scalars.step, position, momentum, nullptr, momentum_buffer);
  }
  if (moved == 0) return;  // the parameter's memory is not touched
  T theta[kTile];
  for (int i = 0; i < kTile; ++i) theta[i] = moved_value(Storage<S>::load(param[i]), scalars.lr, d[i], n[i]);
  store_tile<true>(options, kParamStream, tensor, scalars.step, position, theta, move, param);
}

// The elements of a tensor that do not fill a tile go through the same code in padded copies.
template <class S, class Parts>
static inline void step_tail(const CsgdOptions& options, const CsgdTensor& tensor,
                             const StepScalars<typename Storage<S>::Opmath>& scalars, int64_t position, int count,
                             S* param, const S* grad, S* momentum_buffer, ChunkResult* result) {
  S padded_param[kTile] = {}, padded_grad[kTile] = {}, padded_momentum[kTile] = {};
  for (int i = 0; i < count; ++i) {
    padded_param[i] = param[i];
    padded_grad[i] = grad[i];
    if (Parts::momentum) padded_momentum[i] = momentum_buffer[i];
  }
  const int64_t moved_before = result->moved;
  step_tile<S, Parts>(options, tensor, scalars, position, count, padded_param, padded_grad, padded_momentum, result);
  const bool moved = result->moved != moved_before;
  for (int i = 0; i < count; ++i) {
    if (moved) param[i] = padded_param[i];
    if (Parts::momentum) momentum_buffer[i] = padded_momentum[i];
  }
}

template <class S, class Parts>
static ChunkResult step_chunk(const CsgdOptions& options, const CsgdTensor& tensor, int64_t begin, int64_t end) {
  const auto scalars = step_scalars<typename Storage<S>::Opmath>(options, tensor);
  S* param = static_cast<S*>(tensor.param);
  const S* grad = static_cast<const S*>(tensor.grad);
  S* momentum_buffer = Parts::momentum ? static_cast<S*>(tensor.momentum_buffer) : param;
  ChunkResult result;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t left = end - i;
    if (left >= kTile) {
      prefetch_tile(grad + i + kAhead, kTile * sizeof(S));
      prefetch_tile(param + i + kAhead, kTile * sizeof(S));
      if (Parts::momentum) prefetch_tile(momentum_buffer + i + kAhead, kTile * sizeof(S));
      step_tile<S, Parts>(options, tensor, scalars, i, kTile, param + i, grad + i, momentum_buffer + i, &result);
    } else {
      step_tail<S, Parts>(options, tensor, scalars, i, static_cast<int>(left), param + i, grad + i, momentum_buffer + i,
                          &result);
    }
  }
  return result;
}

template <class S, bool kWeightDecay>
static ChunkResult step_chunk_momentum(const CsgdOptions& options, const CsgdTensor& tensor, int64_t begin,
                                       int64_t end) {
  const RuntimeParts parts = runtime_parts(options);
  if (!parts.momentum) return step_chunk<S, StaticParts<kWeightDecay, false, false>>(options, tensor, begin, end);
  return parts.nesterov ? step_chunk<S, StaticParts<kWeightDecay, true, true>>(options, tensor, begin, end)
                        : step_chunk<S, StaticParts<kWeightDecay, true, false>>(options, tensor, begin, end);
}

template <class S>
static ChunkResult step_chunk_any(const CsgdOptions& options, const CsgdTensor& tensor, int64_t begin, int64_t end) {
  return options.weight_decay != 0 ? step_chunk_momentum<S, true>(options, tensor, begin, end)
                                   : step_chunk_momentum<S, false>(options, tensor, begin, end);
}

ChunkFunction chunk_function(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return step_chunk_any<float>;
    case DType::kFloat64: return step_chunk_any<double>;
    case DType::kBFloat16: return step_chunk_any<BFloat16>;
    case DType::kFloat16: return step_chunk_any<Float16>;
  }
  return nullptr;
}

}  // namespace CSGD_ISA
}  // namespace csgd
