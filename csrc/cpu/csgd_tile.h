// SPDX-License-Identifier: Apache-2.0
// The loop of csgd_ over one chunk, in tiles. csgd_cpu_*.cpp include it once for each instruction set. Before that they
// define CSGD_ISA, the name of the instruction set; CSGD_VECTOR_BYTES, the width of its registers; and Words.
#include "csgd_cpu.h"
#include "shard_draws.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// The sums to which the tiles of a chunk add, lane by lane.
template <class S>
struct StepTotals {
  Mask<S> largest;  // max ordered_bits(d)
  Mask<S> still;    // coordinates that did not move, as a negative number
};

// The draws of a chunk, of all its streams.
class ChunkDraws {
 public:
  ChunkDraws(uint64_t seed, const CsgdShard& tensor, uint32_t step, int64_t begin)
      : keys_(seed),
        layout_(tensor.layout),
        calibration_(keys_, seed, kCalibrationStream, tensor.index, step, begin),
        param_(keys_, seed, kParamStream, tensor.index, step, begin),
        buffer_(keys_, seed, kMomentumStream, tensor.index, step, begin) {}

  // Those of `count` elements from `first` on, as StreamDraws::draw().
  void calibration(int64_t first, int count, uint16_t* draws) const { draw(calibration_, first, count, draws); }
  void param(int64_t first, int count, uint16_t* draws) const { draw(param_, first, count, draws); }
  void buffer(int64_t first, int count, uint16_t* draws) const { draw(buffer_, first, count, draws); }

 private:
  void draw(const StreamDraws& stream, int64_t first, int count, uint16_t* draws) const {
    if (layout_.run_length == 0) {
      stream.draw(first, count, draws);
    } else {
      for (int done = 0; done < count; done += kTile) {
        draw_shard_tile(stream, layout_, first + done, count - done < kTile ? count - done : kTile, draws + done);
      }
    }
  }

  RoundKeys keys_;
  const ShardLayout& layout_;
  StreamDraws calibration_, param_, buffer_;
};

// Elements of a tile. Numbers of 16 bits take so many instructions that what is done once for a tile should be rare.
// With wider ones memory would wait while the draws of a longer tile are made.
template <class S>
constexpr int kStepTile = (Storage<S>::kRounds ? 8 : 8 / static_cast<int>(sizeof(S))) * kTile;
constexpr int kGroup = 4;  // vectors that are in registers from the gradient to the new parameter
template <class S>
constexpr int kGroupElements = kGroup * kLanes<S>;
template <class S>
constexpr Order kStepOrder = std::is_same_v<S, BFloat16> ? Order::kEvenOdd : Order::kSame;

// Steps the `count` elements of a tile from `position` on, a multiple of kGroupElements, all of which can be read and
// written. Memory is prefetched a little ahead: one array before the draws are made, the others in the loop. This way
// memory is busy during all of the arithmetic. Without draws there is so little of it that the processor's own
// prefetching is faster.
//
// kCalibrates: false where T = 0. Then every draw is below n = 2^16, so that none is needed, and d * (2^16 / n) is d.
template <class S, class Direction, bool kStochastic, bool kCalibrates>
CSGD_HOST_DEVICE void step_tile(const ChunkDraws& tensor_draws, const StepScalars<typename Storage<S>::Opmath>& scalars,
                                int64_t position, int count, S* param, const S* grad, S* buffer,
                                StepTotals<S>* totals) {
  using T = typename Storage<S>::Opmath;
  constexpr Direction direction{};
  constexpr int kPerLine = kLine / static_cast<int>(sizeof(S));
  constexpr Order kOrder = kStepOrder<S>;
  constexpr bool kPrefetches = kCalibrates || kStochastic;
  alignas(64) uint16_t draws[kStepTile<S>], buffer_rounding[kStepTile<S>], rounding[kStepTile<S>];

  CSGD_UNROLL
  for (int i = 0; i < (kPrefetches ? count : 0); i += kPerLine) prefetch_ahead(grad + i);
  if (kCalibrates) tensor_draws.calibration(position, count, draws);
  if (direction.has_buffer() && kStochastic) tensor_draws.buffer(position, count, buffer_rounding);
  const bool guard = may_underflow(scalars.scale);
  const bool usual = !scalars.first && !guard;
  StepTotals<S> sums = *totals;
  bool has_rounding = false;
  for (int i = 0; i < count; i += kGroupElements<S>) {
    CSGD_UNROLL
    for (int j = 0; j < (kPrefetches ? kGroupElements<S> : 0); j += kPerLine) {
      prefetch_ahead(param + i + j);
      if (direction.has_buffer()) prefetch_ahead(buffer + i + j);
    }
    Values<S> d[kGroup], theta[kGroup], state[kGroup], x[kGroup];
    const auto find_directions = [&](bool first, bool guarded) {
      StepScalars<T> s = scalars;
      s.first = first;
      load<S, kOrder>(grad + i, d);
      if (direction.reads_param()) load<S, kOrder>(param + i, theta);
      if (direction.has_buffer()) load<S, kOrder>(buffer + i, state);
      CSGD_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        d[k] = direction(s, d[k], theta[k], state[k]);
        x[k] = magnitude(d[k]) * scalars.scale;
        if (guarded) x[k] = greater(least_product(d[k]), x[k]);  // x where it is NaN
      }
    };
    if (usual) {  // constants on this path: one test for a group
      find_directions(false, false);
    } else {
      find_directions(scalars.first, guard);
    }
    if (direction.has_buffer()) {
      store<S, kStochastic, false, kOrder>(buffer + i, state, buffer_rounding + i, nullptr, nullptr);
    }
    CSGD_UNROLL
    for (int k = 0; k < kGroup; ++k) sums.largest = greater(sums.largest, ordered_bits(d[k]));
    Mask<S> still[kGroup];
    if (kCalibrates) {
      Patterns<S> of_draws[kGroup];
      load_patterns<S, kOrder>(draws + i, of_draws);
      Mask<S> of_group(0);
      CSGD_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        still[k] = stays(of_draws[k], x[k]);
        of_group = of_group + still[k];
      }
      sums.still = sums.still + of_group;
      if (all(of_group == Mask<S>(-kGroup))) continue;  // the parameter's memory is not touched
    }
    if (kStochastic && !has_rounding) {
      tensor_draws.param(position, count, rounding);
      has_rounding = true;
    }
    load<S, kOrder>(param + i, theta);
    Values<S> moved[kGroup];
    CSGD_UNROLL
    for (int k = 0; k < kGroup; ++k) {
      Values<S> estimate = d[k];
      if (kCalibrates) estimate = estimate * inverse_probability(moving_draws_of(x[k]));
      moved[k] = moved_value(theta[k], scalars.lr, estimate);
    }
    store<S, kStochastic, kCalibrates, kOrder>(param + i, moved, rounding + i, still, theta);
  }
  *totals = sums;
}

template <class S>
constexpr auto kNoBits = FloatBits<typename Storage<S>::Opmath>::kAboveInfinity;  // ordered_bits(0)

// Adds what was counted in `stepped` elements, `count` of which are not padding, to the result of their chunk. Padding
// may have been counted as moving.
template <class S>
static inline void add_totals(const StepTotals<S>& totals, int64_t stepped, int64_t count, ChunkResult* result) {
  int64_t moved = stepped;
  for (int k = 0; k < kLanes<S>; ++k) {
    const int64_t largest = totals.largest.raw[k] - kNoBits<S>;
    if (result->largest_bits < largest) result->largest_bits = largest;
    moved += totals.still.raw[k];
  }
  result->moved += moved < count ? moved : count;
}

template <class S, class Direction, bool kStochastic, bool kCalibrates>
static ChunkResult step_chunk(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin, int64_t end) {
  const auto scalars = step_scalars<typename Storage<S>::Opmath>(options, tensor);
  const ChunkDraws draws(options.seed, tensor, scalars.step, begin);
  constexpr bool kHasBuffer = Direction().has_buffer();
  S* param = static_cast<S*>(tensor.param);
  const S* grad = static_cast<const S*>(tensor.grad);
  S* buffer = kHasBuffer ? static_cast<S*>(tensor.momentum_buffer) : param;
  ChunkResult result;
  StepTotals<S> totals{kNoBits<S>, 0};
  const int64_t whole_end = end - (end - begin) % kGroupElements<S>;
  for (int64_t i = begin; i < whole_end; i += kStepTile<S>) {
    const int count = static_cast<int>(whole_end - i < kStepTile<S> ? whole_end - i : kStepTile<S>);
    step_tile<S, Direction, kStochastic, kCalibrates>(draws, scalars, i, count, param + i, grad + i, buffer + i,
                                                      &totals);
  }
  add_totals<S>(totals, whole_end - begin, whole_end - begin, &result);
  if (whole_end < end) {
    // The elements that do not fill a group go through the same code in padded copies. If the padding moves (T = 0, or
    // a factor that makes all of d NaN), so does every element.
    const int64_t i = whole_end, rest = end - whole_end;
    const size_t bytes = static_cast<size_t>(rest) * sizeof(S);
    S padded_param[kGroupElements<S>] = {}, padded_grad[kGroupElements<S>] = {}, padded_buffer[kGroupElements<S>] = {};
    memcpy(padded_param, param + i, bytes);
    memcpy(padded_grad, grad + i, bytes);
    if (kHasBuffer) memcpy(padded_buffer, buffer + i, bytes);
    StepTotals<S> tail{kNoBits<S>, 0};
    step_tile<S, Direction, kStochastic, kCalibrates>(draws, scalars, i, kGroupElements<S>, padded_param, padded_grad,
                                                      padded_buffer, &tail);
    const bool none_moved = all(tail.still == Mask<S>(-kGroup));
    if (!none_moved) memcpy(param + i, padded_param, bytes);
    if (kHasBuffer) memcpy(buffer + i, padded_buffer, bytes);
    add_totals<S>(tail, kGroupElements<S>, rest, &result);
  }
  return result;
}

// From options to template arguments, one after the other.
template <class S, class Direction, bool kStochastic>
static ChunkResult step_chunk_calibrating(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin,
                                          int64_t end) {
  using T = typename Storage<S>::Opmath;
  return step_scalars<T>(options, tensor).scale < bit_cast<T>(FloatBits<T>::kInfinity)
             ? step_chunk<S, Direction, kStochastic, true>(options, tensor, begin, end)
             : step_chunk<S, Direction, kStochastic, false>(options, tensor, begin, end);
}

template <class S, class Direction>
static ChunkResult step_chunk_rounding(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin,
                                       int64_t end) {
  return Storage<S>::kRounds && options.stochastic_rounding
             ? step_chunk_calibrating<S, Direction, Storage<S>::kRounds>(options, tensor, begin, end)
             : step_chunk_calibrating<S, Direction, false>(options, tensor, begin, end);
}

template <class S>
static ChunkResult step_chunk_any(const CsgdOptions& options, const CsgdShard& tensor, int64_t begin, int64_t end) {
  return with_static_parts(options, [&](auto parts) {
    return step_chunk_rounding<S, SgdDirection<decltype(parts)>>(options, tensor, begin, end);
  });
}

ChunkFunction chunk_function(DType dtype) {
  return with_storage(dtype, [](auto tag) -> ChunkFunction { return step_chunk_any<decltype(tag)>; });
}

}  // namespace CSGD_ISA
}  // namespace csgd
