// SPDX-License-Identifier: Apache-2.0
// The loop of csgd_ over one chunk, in tiles. csgd_cpu_*.cpp include it once for each instruction set. Before that they
// define CSGD_ISA, the name of the instruction set; CSGD_VECTOR_BYTES, the width of its registers; and Words.
#include "csgd_cpu.h"
#include "shard_draws.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// The draws of the kTile elements from `first` on, which is a multiple of kTile.
static inline void draw_elements(uint64_t seed, Stream stream, const CsgdShard& tensor, uint32_t step, int64_t first,
                                 uint16_t* draws) {
  if (tensor.layout.run_length == 0) {
    draw_tile(seed, stream, tensor.index, step, first, draws);
  } else {
    draw_shard_tile(seed, stream, tensor, step, first, draws);
  }
}

// Steps one tile, all of which can be read and written. Memory is prefetched a little ahead: one array before the draws
// are made, one in each loop. Three streams are more than the hardware prefetches by itself, and this way memory is
// busy during all of the arithmetic. A prefetch past the end of a tensor does nothing.
template <class S, class Parts, bool kStochastic>
static inline void step_tile(const CsgdOptions& options, const CsgdShard& tensor,
                             const StepScalars<typename Storage<S>::Opmath>& scalars, int64_t position, S* param,
                             const S* grad, S* momentum_buffer, Totals<S>* totals) {
  using T = typename Storage<S>::Opmath;
  constexpr Parts parts{};
  alignas(64) T d[kTile], n[kTile];  // n = 0 where the coordinate does not move
  alignas(64) uint16_t draws[kTile], rounding[kTile];

  for (int i = 0; i < kTile; i += kLine / static_cast<int>(sizeof(S))) prefetch(grad + i + kAhead);
  // With T = 0 every draw is below n = 2^16, so none is needed.
  if (scalars.scale < bit_cast<T>(FloatBits<T>::kInfinity)) {
    draw_elements(options.seed, kCalibrationStream, tensor, scalars.step, position, draws);
  } else {
    memset(draws, 0, sizeof(draws));
  }
  if (parts.momentum && kStochastic)
    draw_elements(options.seed, kMomentumStream, tensor, scalars.step, position, rounding);
  Mask<S> moved = 0;
  for (int i = 0; i < kTile; i += kLanes<S>) {
    if (parts.weight_decay) prefetch(param + i + kAhead);
    if (parts.momentum) prefetch(momentum_buffer + i + kAhead);
    const Values<S> theta = parts.weight_decay ? load(param + i) : Values<S>(0);
    Values<S> momentum = parts.momentum ? load(momentum_buffer + i) : Values<S>(0);
    const Values<S> d_i = direction(parts, scalars, load(grad + i), theta, momentum);
    if (parts.momentum) store<S, kStochastic, false>(momentum_buffer + i, momentum, rounding + i, {});
    totals->largest_bits = greater(totals->largest_bits, finite_magnitude_bits(d_i));
    const Values<S> n_i = moving_draws(d_i, scalars.scale);
    const Mask<S> move = moves(load_patterns<S>(draws + i), n_i);
    moved = moved + move;
    d_i.store(d + i);
    select(move, n_i, Values<S>(0)).store(n + i);
  }
  totals->moved = totals->moved + moved;
  if (!any(moved)) return;  // then the parameter's memory is not touched
  if (kStochastic) draw_elements(options.seed, kParamStream, tensor, scalars.step, position, rounding);
  for (int i = 0; i < kTile; i += kLanes<S>) {
    if (!parts.weight_decay) prefetch(param + i + kAhead);
    const Values<S> n_i = Values<S>::load(n + i);
    const Values<S> inverse = inverse_probability(n_i);
    const Values<S> theta = moved_value(load(param + i), scalars.lr, Values<S>::load(d + i), inverse);
    store<S, kStochastic, true>(param + i, theta, rounding + i, n_i != Values<S>(0));
  }
}

// Adds `totals` to the result of a chunk of `count` elements. Elements of padding may have been counted as moving, so
// at most `count` are added.
template <class S>
static inline void add_totals(const Totals<S>& totals, int64_t count, ChunkResult* result) {
  int64_t moved = 0;
  for (int k = 0; k < kLanes<S>; ++k) {
    const int64_t largest = totals.largest_bits.raw[k];
    if (result->largest_bits < largest) result->largest_bits = largest;
    moved -= totals.moved.raw[k];
  }
  result->moved += moved < count ? moved : count;
}

template <class S, class Parts, bool kStochastic>
static ChunkResult step_chunk(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin, int64_t end) {
  const auto scalars = step_scalars<typename Storage<S>::Opmath>(options, tensor);
  S* param = static_cast<S*>(tensor.param);
  const S* grad = static_cast<const S*>(tensor.grad);
  S* momentum_buffer = Parts::momentum ? static_cast<S*>(tensor.momentum_buffer) : param;
  ChunkResult result;
  Totals<S> totals{0, 0};
  const int64_t tiles_end = end - (end - begin) % kTile;
  for (int64_t i = begin; i < tiles_end; i += kTile) {
    step_tile<S, Parts, kStochastic>(options, tensor, scalars, i, param + i, grad + i, momentum_buffer + i, &totals);
  }
  add_totals<S>(totals, end - begin, &result);
  if (tiles_end < end) {
    // The elements that do not fill a tile go through the same code in padded copies. If the padding moves (T = 0, or a
    // factor that makes all of d NaN), so does every element.
    const int64_t i = tiles_end, rest = end - tiles_end;
    const size_t bytes = static_cast<size_t>(rest) * sizeof(S);
    S padded_param[kTile] = {}, padded_grad[kTile] = {}, padded_momentum[kTile] = {};
    memcpy(padded_param, param + i, bytes);
    memcpy(padded_grad, grad + i, bytes);
    if (Parts::momentum) memcpy(padded_momentum, momentum_buffer + i, bytes);
    Totals<S> tail{0, 0};
    step_tile<S, Parts, kStochastic>(options, tensor, scalars, i, padded_param, padded_grad, padded_momentum, &tail);
    if (any(tail.moved)) memcpy(param + i, padded_param, bytes);
    if (Parts::momentum) memcpy(momentum_buffer + i, padded_momentum, bytes);
    add_totals<S>(tail, rest, &result);
  }
  return result;
}

// From options to template arguments, one after the other.
template <class S, class Parts>
static ChunkResult step_chunk_rounding(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin,
                                       int64_t end) {
  return Storage<S>::kRounds && options.stochastic_rounding
             ? step_chunk<S, Parts, Storage<S>::kRounds>(options, tensor, begin, end)
             : step_chunk<S, Parts, false>(options, tensor, begin, end);
}

template <class S>
static ChunkResult step_chunk_any(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin, int64_t end) {
  return with_static_parts(
      options, [&](auto parts) { return step_chunk_rounding<S, decltype(parts)>(options, tensor, begin, end); });
}

ChunkFunction chunk_function(DType dtype) {
  return with_storage(dtype, [](auto tag) -> ChunkFunction { return step_chunk_any<decltype(tag)>; });
}

}  // namespace CSGD_ISA
}  // namespace csgd
