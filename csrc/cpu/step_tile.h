// SPDX-License-Identifier: Apache-2.0
// The loop of a step over one chunk, in tiles. loops_*.cpp include it once for each instruction set. Before that they
// define CSGD_ISA, the name of the instruction set; CSGD_VECTOR_BYTES, the width of its registers; and Words.
#include <utility>

#include "../core/adamw.h"
#include "../core/sgd.h"
#include "shard_draws.h"
#include "step_cpu.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// The sums to which the tiles of a chunk add, lane by lane.
template <class S>
struct StepTotals {
  Mask<S> largest;  // max ordered_bits(d)
  Mask<S> still;    // coordinates that did not move, as a negative number
};

// The draws of a chunk: of its calibration, and of the rounding of its parameter and buffers.
template <int kBuffers>
class ChunkDraws {
 public:
  ChunkDraws(uint64_t seed, const StepShard& tensor, uint32_t step, int64_t begin)
      : ChunkDraws(seed, tensor, step, begin, std::make_integer_sequence<int, kBuffers>{}) {}

  // Those of `count` elements from `first` on, as StreamDraws::draw().
  void calibration(int64_t first, int count, uint16_t* draws) const { draw(calibration_, first, count, draws); }
  void param(int64_t first, int count, uint16_t* draws) const { draw(param_, first, count, draws); }
  void buffer(int b, int64_t first, int count, uint16_t* draws) const { draw(buffers_[b], first, count, draws); }

 private:
  template <int... b>
  ChunkDraws(uint64_t seed, const StepShard& tensor, uint32_t step, int64_t begin, std::integer_sequence<int, b...>)
      : keys_(seed),
        layout_(tensor.layout),
        calibration_(keys_, seed, kCalibrationStream, tensor.index, step, begin),
        param_(keys_, seed, kParamStream, tensor.index, step, begin),
        buffers_{StreamDraws(keys_, seed, buffer_stream(b), tensor.index, step, begin)...} {}

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
  StreamDraws calibration_, param_;
  StreamDraws buffers_[kBuffers];
};

// The arrays of a tensor.
template <class S, int kBuffers>
struct Arrays {
  S* param;
  const S* grad;
  S* buffers[kBuffers];

  // From element i on.
  Arrays from(int64_t i) const {
    Arrays rest = {param + i, grad + i, {}};
    for (int b = 0; b < kBuffers; ++b) rest.buffers[b] = buffers[b] + i;
    return rest;
  }
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
template <class S, bool kStochastic, bool kCalibrates, class Direction, int kBuffers>
CSGD_HOST_DEVICE void step_tile(const ChunkDraws<kBuffers>& tensor_draws, const Direction& direction,
                                const StepScalars<typename Storage<S>::Opmath>& scalars, int64_t position, int count,
                                const Arrays<S, kBuffers>& arrays, StepTotals<S>* totals) {
  constexpr int kPerLine = kLine / static_cast<int>(sizeof(S));
  constexpr Order kOrder = kStepOrder<S>;
  constexpr bool kPrefetches = kCalibrates || kStochastic;
  S* const param = arrays.param;
  alignas(64) uint16_t draws[kStepTile<S>], buffer_rounding[kBuffers][kStepTile<S>], rounding[kStepTile<S>];

  CSGD_UNROLL
  for (int i = 0; i < (kPrefetches ? count : 0); i += kPerLine) prefetch_ahead(arrays.grad + i);
  if (kCalibrates) tensor_draws.calibration(position, count, draws);
  CSGD_UNROLL
  for (int b = 0; b < kBuffers; ++b) {
    if (direction.has_buffers() && kStochastic) tensor_draws.buffer(b, position, count, buffer_rounding[b]);
  }
  const bool guard = may_underflow(scalars.scale);
  const bool usual = !direction.is_first() && !guard;
  StepTotals<S> sums = *totals;
  bool has_rounding = false;
  for (int i = 0; i < count; i += kGroupElements<S>) {
    CSGD_UNROLL
    for (int j = 0; j < (kPrefetches ? kGroupElements<S> : 0); j += kPerLine) {
      prefetch_ahead(param + i + j);
      CSGD_UNROLL
      for (int b = 0; b < kBuffers; ++b) {
        if (direction.has_buffers()) prefetch_ahead(arrays.buffers[b] + i + j);
      }
    }
    Values<S> d[kGroup], theta[kGroup] = {}, state[kBuffers][kGroup], x[kGroup];
    const auto find_directions = [&](const auto& of_step, bool guarded) {
      load<S, kOrder>(arrays.grad + i, d);
      if (of_step.reads_param()) load<S, kOrder>(param + i, theta);
      CSGD_UNROLL
      for (int b = 0; b < kBuffers; ++b) {
        if (of_step.has_buffers()) load<S, kOrder>(arrays.buffers[b] + i, state[b]);
      }
      CSGD_UNROLL
      for (int k = 0; k < kGroup; ++k) {
        Values<S> own_state[kBuffers];
        CSGD_UNROLL
        for (int b = 0; b < kBuffers; ++b) own_state[b] = state[b][k];
        d[k] = of_step(d[k] * scalars.grad_factor, theta[k], own_state);
        CSGD_UNROLL
        for (int b = 0; b < kBuffers; ++b) state[b][k] = own_state[b];
        x[k] = magnitude(d[k]) * scalars.scale;
        if (guarded) x[k] = greater(least_product(d[k]), x[k]);  // x where it is NaN
      }
    };
    if (usual) {  // constants on this path: one test for a group
      find_directions(direction.of_later_steps(), false);
    } else {
      find_directions(direction, guard);
    }
    CSGD_UNROLL
    for (int b = 0; b < kBuffers; ++b) {
      if (!direction.has_buffers()) continue;
      store<S, kStochastic, false, kOrder>(arrays.buffers[b] + i, state[b], buffer_rounding[b] + i, nullptr, nullptr);
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
      moved[k] = theta[k] - change_of(scalars.lr, estimate);
    }
    store<S, kStochastic, kCalibrates, kOrder>(param + i, moved, rounding + i, still, theta);
  }
  *totals = sums;
}

template <class S>
constexpr auto kNoBits = FloatBits<typename Storage<S>::Opmath>::kAboveInfinity;  // ordered_bits(0)

// Adds what was counted in `stepped` elements, `count` of which are not padding, to the result of their chunk. The
// others may have been counted as moving where all of these have.
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

// Direction and scalars are copies, so that the compiler knows that no store to a tensor changes them.
template <class S, class Rule, class Direction, bool kStochastic, bool kCalibrates>
static ChunkResult step_chunk(const typename Rule::Options& options, Direction direction,
                              StepScalars<typename Storage<S>::Opmath> scalars, const StepShard& tensor, int64_t begin,
                              int64_t end) {
  constexpr int kBuffers = Rule::kBuffers;
  const ChunkDraws<kBuffers> draws(options.seed, tensor, scalars.step, begin);
  Arrays<S, kBuffers> arrays = {static_cast<S*>(tensor.param), static_cast<const S*>(tensor.grad), {}};
  for (int b = 0; b < kBuffers; ++b) {
    arrays.buffers[b] = direction.has_buffers() ? static_cast<S*>(tensor.buffers[b]) : arrays.param;
  }
  ChunkResult result;
  StepTotals<S> totals{kNoBits<S>, 0};
  const int64_t whole_end = end - (end - begin) % kGroupElements<S>;
  for (int64_t i = begin; i < whole_end; i += kStepTile<S>) {
    const int count = static_cast<int>(whole_end - i < kStepTile<S> ? whole_end - i : kStepTile<S>);
    step_tile<S, kStochastic, kCalibrates>(draws, direction, scalars, i, count, arrays.from(i), &totals);
  }
  add_totals<S>(totals, whole_end - begin, whole_end - begin, &result);
  if (whole_end < end) {
    // The elements that do not fill a group go through the same code in copies, padded with zeros.
    const Arrays<S, kBuffers> rest = arrays.from(whole_end);
    const int64_t count = end - whole_end;
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    S param[kGroupElements<S>] = {}, grad[kGroupElements<S>] = {}, buffers[kBuffers][kGroupElements<S>] = {};
    Arrays<S, kBuffers> padded = {param, grad, {}};
    memcpy(param, rest.param, bytes);
    memcpy(grad, rest.grad, bytes);
    for (int b = 0; b < kBuffers; ++b) {
      padded.buffers[b] = buffers[b];
      if (direction.has_buffers()) memcpy(buffers[b], rest.buffers[b], bytes);
    }
    StepTotals<S> tail{kNoBits<S>, 0};
    step_tile<S, kStochastic, kCalibrates>(draws, direction, scalars, whole_end, kGroupElements<S>, padded, &tail);
    const bool none_moved = all(tail.still == Mask<S>(-kGroup));
    if (!none_moved) memcpy(rest.param, param, bytes);
    for (int b = 0; b < kBuffers; ++b) {
      if (direction.has_buffers()) memcpy(rest.buffers[b], buffers[b], bytes);
    }
    // The padding moves where T = 0, and with it every element; and where zeros make d NaN, as those of AdamW do
    // without eps. Then it has become NaN, and is left out of the count.
    const S zero = {};
    const bool is_nan = memcmp(&param[kGroupElements<S> - 1], &zero, sizeof(S)) != 0;
    add_totals<S>(tail, is_nan ? count : kGroupElements<S>, count, &result);
  }
  return result;
}

// From options to template arguments, one after the other.
template <class S, class Rule, class Direction, bool kStochastic>
static ChunkResult step_chunk_rounding(const typename Rule::Options& options, const StepShard& tensor, int64_t begin,
                                       int64_t end) {
  using T = typename Storage<S>::Opmath;
  const auto numbers = Rule::template option_scalars<T>(options);
  const Direction direction(options, numbers, Rule::template tensor_scalars<T>(options, *tensor.step));
  const auto scalars = step_scalars<T>(options, numbers, tensor);
  return scalars.scale < bit_cast<T>(FloatBits<T>::kInfinity)
             ? step_chunk<S, Rule, Direction, kStochastic, true>(options, direction, scalars, tensor, begin, end)
             : step_chunk<S, Rule, Direction, kStochastic, false>(options, direction, scalars, tensor, begin, end);
}

template <class S, class Rule>
static ChunkResult step_chunk_any(const typename Rule::Options& options, const StepShard& tensor, int64_t begin,
                                  int64_t end) {
  using T = typename Storage<S>::Opmath;
  const auto step = [&](auto tag) {
    using Direction = typename decltype(tag)::Type;
    return Storage<S>::kRounds && options.stochastic_rounding
               ? step_chunk_rounding<S, Rule, Direction, Storage<S>::kRounds>(options, tensor, begin, end)
               : step_chunk_rounding<S, Rule, Direction, false>(options, tensor, begin, end);
  };
  if constexpr (Rule::kCpuDecidesWhileRunning) {
    return step(Tag<typename Rule::template AnyDirection<T>>{});
  } else {
    return with_direction<Rule, T>(options, step);
  }
}

template <class Rule>
static ChunkFunction<typename Rule::Options> function_of(DType dtype) {
  return with_storage(
      dtype, [](auto tag) -> ChunkFunction<typename Rule::Options> { return step_chunk_any<decltype(tag), Rule>; });
}

ChunkFunction<SgdOptions> sgd_function(DType dtype) { return function_of<Sgd>(dtype); }
ChunkFunction<AdamWOptions> adamw_function(DType dtype) { return function_of<AdamW>(dtype); }

}  // namespace CSGD_ISA
}  // namespace csgd
