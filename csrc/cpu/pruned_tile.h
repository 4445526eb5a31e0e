// SPDX-License-Identifier: Apache-2.0
// What the step of a pruned parameter does beside the step itself, for the loops of one instruction set.
#pragma once

#include "../core/magnitude_key.h"
#include "csgd_cpu.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// As compilers know to read it in vectors.
static inline const uint8_t* bytes_of(const bool* mask) { return reinterpret_cast<const uint8_t*>(mask); }

constexpr int64_t kStretch = 4 * kTile;  // elements that are stepped between two looks at masks and digits

// Gradients, 0 where the mask is false: `masked`, which this fills.
template <class S>
static inline const S* masked_grads(const S* grad, const bool* mask, int64_t count, S* masked) {
  const uint8_t* alive = bytes_of(mask);
  for (int64_t k = 0; k < count; ++k) masked[k] = choose_bits(alive[k], grad[k], S{});
  return masked;
}

// The first digits of the keys of one chunk. Most are one of a few: rows taken in turns spare each the wait for what
// was written just before.
struct DigitCounts {
  static constexpr int kRows = 4;
  static constexpr int kDead = kBins / 2;  // behind the digits of what is alive, less kBins / 2
  static_assert(kCpuChunk / kRows < 1 << 16, "counters of 16 bits hold a chunk");
  uint16_t rows[kRows][kDead + 1];

  void clear() { memset(rows, 0, sizeof(rows)); }

  // Counts the digits of `count` elements, at most kStretch; there are as many as fill the last tile.
  template <class S>
  void add(const S* param, const bool* mask, int64_t count) {
    alignas(64) uint16_t digits[kStretch];
    for (int64_t i = 0; i < count; i += kLanes<S>) {
      convert<uint16_t>(first_digit_below_half(load(param + i))).store(digits + i);
    }
    if (mask != nullptr) {
      const uint8_t* alive = bytes_of(mask);
      for (int64_t k = 0; k < count; ++k) digits[k] = choose_bits(alive[k], digits[k], static_cast<uint16_t>(kDead));
    }
    for (int64_t k = 0; k < count; ++k) ++rows[k % kRows][digits[k]];
  }

  // Chunks of other threads may be adding theirs.
  void add_to(int64_t* histogram) const {
    for (int digit = 0; digit <= kDead; ++digit) {
      int64_t count = 0;
      for (int row = 0; row < kRows; ++row) count += rows[row][digit];
      if (count == 0) continue;
      __atomic_fetch_add(histogram + (digit == kDead ? 0 : kBins / 2 + digit), count, __ATOMIC_RELAXED);
    }
  }
};

}  // namespace CSGD_ISA
}  // namespace csgd
