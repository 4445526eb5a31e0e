// SPDX-License-Identifier: Apache-2.0
// A tile is the elements that a CPU loop processes at a time. This file has the vectors that hold them, their draws,
// loads and stores, for the loops of one instruction set (step_tile.h, calibrate_grad_tile.h, exchange_tile.h), which
// CSGD_ISA names.
#pragma once

#ifndef CSGD_ISA
#error "define CSGD_ISA, the namespace of the instruction set, before including tile.h"
#endif

#include "../core/update_rule.h"

namespace csgd {
namespace CSGD_ISA {

constexpr int kTile = 128;
constexpr int kAhead = 512;  // elements that memory is prefetched ahead
constexpr int kLine = 64;    // bytes of a cache line

template <class S>
constexpr int kLanes = CSGD_VECTOR_BYTES / sizeof(typename Storage<S>::Opmath);
// As many opmath values as fill a register, and the vectors that go with them lane by lane.
template <class S>
using Values = Vector<typename Storage<S>::Opmath, kLanes<S>>;
template <class S>
using Patterns = Vector<uint32_t, kLanes<S>>;  // 16 bits in each: draws, or numbers as stored
template <class S>
using Mask = typename Values<S>::Mask;

// The sums to which all tiles add, lane by lane.
template <class S>
struct Totals {
  Mask<S> largest_bits;  // max |d| over finite d
  Mask<S> moved;         // coordinates that moved, as a negative number
};

// The draws of one stream for a tensor in one step.
class StreamDraws {
 public:
  // `keys`, those of the seed, must outlive this. The blocks around `position` are made at less expense.
  StreamDraws(const RoundKeys& keys, uint64_t seed, Stream stream, uint32_t index, uint32_t step, int64_t position)
      : keys_(keys),
        seed_(seed),
        stream_(stream),
        index_(index),
        step_(step),
        second_(second_word(stream, block_of(position))),
        series_(series(second_)) {}

  // Writes those of the `count` elements from `position` on, a multiple of kDrawsPerCall, and of a few more, up to a
  // multiple of kTile. Their blocks must have the same upper half.
  __attribute__((noinline)) void draw(int64_t position, int count, uint16_t* draws) const {
    const uint64_t block = block_of(position);
    const uint32_t second = second_word(stream_, block);
    if (second == second_) {
      draw(series_, static_cast<uint32_t>(block), count, draws);
    } else {
      draw(series(second), static_cast<uint32_t>(block), count, draws);
    }
  }

  // Writes those of any blocks, a multiple of Words::kLanes of them, in their order.
  void draw_blocks(const uint64_t* blocks, int count, uint16_t* draws) const {
    for (int j = 0; j < count; j += Words::kLanes) {
      uint32_t first[Words::kLanes], second[Words::kLanes];
      for (int k = 0; k < Words::kLanes; ++k) {
        first[k] = static_cast<uint32_t>(blocks[j + k]);
        second[k] = second_word(stream_, blocks[j + k]);
      }
      const PhiloxWords<Words> counter = {
          {Words::blocks_at(first), Words::blocks_at(second), Words(index_), Words(step_)}};
      store_draws(philox4x32_10(counter, keys_), draws + j * kDrawsPerCall);
    }
  }

 private:
  CSGD_HOST_DEVICE void draw(const PhiloxWords<Words>& series, uint32_t block, int count, uint16_t* draws) const {
    for (int j = 0; j < count; j += Words::kLanes * kDrawsPerCall, block += Words::kLanes) {
      const auto begun = after_three_rounds(series, Words::blocks_from(block), keys_);
      store_draws(philox_rounds_from(3, begun, keys_), draws + j);
    }
  }

  PhiloxWords<Words> series(uint32_t second) const {
    const Philox4x32 numbers = philox_series(second, index_, step_, seed_);
    return {{Words(numbers.word[0]), Words(numbers.word[1]), Words(numbers.word[2]), Words(numbers.word[3])}};
  }

  static uint64_t block_of(int64_t position) { return static_cast<uint64_t>(position) / kDrawsPerCall; }

  const RoundKeys& keys_;
  uint64_t seed_;
  Stream stream_;
  uint32_t index_;
  uint32_t step_;
  uint32_t second_;
  PhiloxWords<Words> series_;
};

// How the elements of a tile lie in vectors side by side: one after another, or, in two vectors each, the ones at even
// places and then those at odd places. Two numbers of 16 bits lie in one word, from which instructions on words take
// them apart.
enum class Order { kSame, kEvenOdd };

// `count` vectors of 16-bit patterns, for instance draws.
template <class S, Order kOrder, int kCount>
CSGD_HOST_DEVICE void load_patterns(const void* from, Patterns<S> (&to)[kCount]) {
  const unsigned char* bytes = static_cast<const unsigned char*>(from);
  if constexpr (kOrder == Order::kSame) {
    CSGD_UNROLL
    for (int k = 0; k < kCount; ++k) to[k] = zero_extend(Vector<uint16_t, kLanes<S>>::load(bytes + k * 2 * kLanes<S>));
  } else {
    CSGD_UNROLL
    for (int k = 0; k < kCount; k += 2) {
      const auto words = Patterns<S>::load(bytes + k * 2 * kLanes<S>);
      to[k] = words & 0xFFFFu;
      to[k + 1] = words >> 16;
    }
  }
}

template <class S, Order kOrder, int kCount>
CSGD_HOST_DEVICE void store_patterns(S* to, const Patterns<S> (&patterns)[kCount]) {
  if constexpr (kOrder == Order::kSame) {
    CSGD_UNROLL
    for (int k = 0; k < kCount; ++k) narrow(patterns[k]).store(to + k * kLanes<S>);
  } else {
    CSGD_UNROLL
    for (int k = 0; k < kCount; k += 2) (patterns[k] | (patterns[k + 1] << 16)).store(to + k * kLanes<S>);
  }
}

template <class S, Order kOrder = Order::kSame, int kCount>
CSGD_HOST_DEVICE void load(const S* from, Values<S> (&to)[kCount]) {
  if constexpr (!Storage<S>::kRounds) {
    CSGD_UNROLL
    for (int k = 0; k < kCount; ++k) to[k] = Values<S>::load(from + k * kLanes<S>);
  } else if constexpr (kOrder == Order::kSame) {
    using Halves = Vector<uint16_t, kLanes<S>>;
    CSGD_UNROLL
    for (int k = 0; k < kCount; ++k) to[k] = widen<typename Storage<S>::Format>(Halves::load(from + k * kLanes<S>));
  } else {
    CSGD_UNROLL
    for (int k = 0; k < kCount; k += 2) {
      const auto words = Patterns<S>::load(from + k * kLanes<S>);
      to[k] = Storage<S>::Format::widen(words);  // which ignores the upper half
      to[k + 1] = Storage<S>::Format::widen(words >> 16);
    }
  }
}

template <class S>
CSGD_HOST_DEVICE Values<S> load(const S* from) {
  Values<S> one[1];
  load(from, one);
  return one[0];
}

template <class S>
CSGD_HOST_DEVICE Patterns<S> load_patterns(const void* from) {
  Patterns<S> one[1];
  load_patterns<S, Order::kSame>(from, one);
  return one[0];
}

// The bits of the largest magnitude in each lane; NaN has the largest of all.
template <class S, int kCount>
CSGD_HOST_DEVICE Mask<S> largest_magnitude(const Values<S> (&values)[kCount]) {
  Mask<S> largest = magnitude_bits(values[0]);
  CSGD_UNROLL
  for (int k = 1; k < kCount; ++k) largest = greater(largest, magnitude_bits(values[k]));
  return largest;
}

// Rounds as `round` does, and stores; with kKeeps not where the mask `keep` says so.
template <class S, Order kOrder, bool kKeeps, int kCount, class Round>
CSGD_HOST_DEVICE void store_rounded(S* to, const Values<S> (&values)[kCount], const Mask<S>* keep, Round round) {
  Patterns<S> stored[kCount], rounded[kCount];
  if (kKeeps) load_patterns<S, kOrder>(to, stored);
  CSGD_UNROLL
  for (int k = 0; k < kCount; ++k) {
    rounded[k] = round(values[k], k);
    if (kKeeps) rounded[k] = select(keep[k], stored[k], rounded[k]);
  }
  store_patterns<S, kOrder>(to, rounded);
}

// Rounds by the draws where a number may be beyond the largest finite one, which is rare.
template <class S, Order kOrder, bool kKeeps, int kCount>
__attribute__((noinline, cold)) static void store_beyond_finite(S* to, const Values<S> (&values)[kCount],
                                                                const uint16_t* draws, const Mask<S>* keep) {
  Patterns<S> of_draws[kCount];
  load_patterns<S, kOrder>(draws, of_draws);
  store_rounded<S, kOrder, kKeeps>(to, values, keep, [&](Values<S> value, int k) {
    return round_stochastic<typename Storage<S>::Format>(value, of_draws[k]);
  });
}

// Stores vectors of values side by side, rounded by the draws with kStochastic, else to nearest; with kKeeps not where
// the mask `keep` says so. `old`: the values that are stored already, with kKeeps.
template <class S, bool kStochastic, bool kKeeps, Order kOrder = Order::kSame, int kCount>
CSGD_HOST_DEVICE void store(S* to, const Values<S> (&values)[kCount], const uint16_t* draws, const Mask<S>* keep,
                            const Values<S>* old) {
  if constexpr (Storage<S>::kRounds && !kStochastic) {
    store_rounded<S, kOrder, kKeeps>(to, values, keep,
                                     [](Values<S> value, int) { return Storage<S>::Format::round_nearest(value); });
  } else {
    Values<S> kept[kCount];
    CSGD_UNROLL
    for (int k = 0; k < kCount; ++k) kept[k] = kKeeps ? select(keep[k], old[k], values[k]) : values[k];
    if constexpr (!Storage<S>::kRounds) {
      CSGD_UNROLL
      for (int k = 0; k < kCount; ++k) kept[k].store(to + k * kLanes<S>);
    } else {
      const auto largest = cast_bits<float>(largest_magnitude<S>(kept));
      if (!all(largest <= Values<S>(bit_cast<float>(Storage<S>::Format::kLargest)))) {
        // Copies, so that the arrays themselves need not lie in memory.
        Values<S> copies[kCount];
        Mask<S> keep_copies[kCount];
        CSGD_UNROLL
        for (int k = 0; k < kCount; ++k) {
          copies[k] = values[k];
          if (kKeeps) keep_copies[k] = keep[k];
        }
        return store_beyond_finite<S, kOrder, kKeeps>(to, copies, draws, keep_copies);
      }
      // Those of `old` lie on the grid: rounding does not change them.
      if constexpr (kOrder == Order::kSame) {
        using Halves = Vector<uint16_t, kLanes<S>>;
        CSGD_UNROLL
        for (int k = 0; k < kCount; ++k) {
          const int at = k * kLanes<S>;
          round_finite<typename Storage<S>::Format>(kept[k], Halves::load(draws + at)).store(to + at);
        }
      } else {
        Patterns<S> of_draws[kCount], rounded[kCount];
        load_patterns<S, kOrder>(draws, of_draws);
        CSGD_UNROLL
        for (int k = 0; k < kCount; ++k) {
          rounded[k] = Storage<S>::Format::round_stochastic_finite(kept[k], of_draws[k]);
        }
        store_patterns<S, kOrder>(to, rounded);
      }
    }
  }
}

// Prefetches memory kAhead elements ahead. Past the end of an array this does nothing, so GCC's warning is of no use.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Warray-bounds"
#endif
template <class S>
CSGD_HOST_DEVICE void prefetch_ahead(const S* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address + kAhead);
#else
  (void)address;
#endif
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace CSGD_ISA
}  // namespace csgd
