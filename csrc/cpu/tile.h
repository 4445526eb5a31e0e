// SPDX-License-Identifier: Apache-2.0
// A tile is the elements that a CPU loop processes at a time. This file has the vectors that hold them, their draws,
// loads and stores, for the loops of one instruction set (csgd_tile.h, calibrate_grad_tile.h, exchange_tile.h), which
// CSGD_ISA names.
#pragma once

#ifndef CSGD_ISA
#error "define CSGD_ISA, the namespace of the instruction set, before including tile.h"
#endif

#include "../core/update_rule.h"

namespace csgd {
namespace CSGD_ISA {

constexpr int kTile = 128;  // so small that a processor overlaps the arithmetic of one tile with the draws of the next
constexpr int kAhead = 4 * kTile;  // elements that memory is prefetched ahead
constexpr int kLine = 64;          // bytes of a cache line
constexpr int kBlocks = kTile / kDrawsPerCall;

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

// The draws of a tile. `position`, of its first element, is a multiple of kTile, so all blocks have the same upper
// half.
static inline void draw_tile(uint64_t seed, Stream stream, uint32_t index, uint32_t step, int64_t position,
                             uint16_t* draws) {
  const uint64_t block = static_cast<uint64_t>(position) / kDrawsPerCall;
  const uint32_t high = static_cast<uint32_t>(block >> 32);
  for (int j = 0; j < kBlocks; j += Words::kLanes) {
    const Words low = Words::blocks_from(static_cast<uint32_t>(block) + static_cast<uint32_t>(j));
    store_draws(draw_words(seed, stream, low, high, index, step), draws + j * kDrawsPerCall);
  }
}

template <class S>
static inline Patterns<S> load_patterns(const void* from) {
  return zero_extend(Vector<uint16_t, kLanes<S>>::load(from));
}

template <class S>
static inline Values<S> load(const S* from) {
  if constexpr (Storage<S>::kRounds) {
    return Storage<S>::Format::widen(load_patterns<S>(from));
  } else {
    return Values<S>::load(from);
  }
}

// Stores values, rounded by the draws with kStochastic, else to nearest; with kMasked only those in the mask.
template <class S, bool kStochastic, bool kMasked>
static inline void store(S* to, Values<S> values, const uint16_t* draws, Mask<S> mask) {
  if constexpr (!Storage<S>::kRounds) {
    (kMasked ? select(mask, values, Values<S>::load(to)) : values).store(to);
  } else {
    Patterns<S> rounded;
    if constexpr (kStochastic) {
      rounded = Storage<S>::Format::round_stochastic(values, load_patterns<S>(draws));
    } else {
      rounded = Storage<S>::Format::round_nearest(values);
    }
    if (kMasked) rounded = select(mask, rounded, load_patterns<S>(to));
    convert<uint16_t>(rounded).store(to);
  }
}

static inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

}  // namespace CSGD_ISA
}  // namespace csgd
