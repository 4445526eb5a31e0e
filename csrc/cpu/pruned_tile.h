// SPDX-License-Identifier: Apache-2.0
// What the step of a pruned parameter does beside the step itself, tile by tile, for the loops of one instruction set.
#pragma once

#include "../core/magnitude_key.h"
#include "csgd_cpu.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// The gradients of a tile, 0 where the mask is false.
template <class S>
static inline void masked_grads(const S* grad, const bool* mask, int count, S* masked) {
  for (int k = 0; k < count; ++k) masked[k] = mask[k] ? grad[k] : S{};
}

// The first digits of the keys of one chunk. Most are one of a few: rows taken in turns spare each the wait for what
// was written just before.
struct DigitCounts {
  static constexpr int kRows = 4;
  static constexpr int kDead = kBins / 2;  // behind the digits of what is alive, less kBins / 2
  static_assert(kCpuChunk / kRows < 1 << 16, "counters of 16 bits hold a chunk");
  uint16_t rows[kRows][kDead + 1];

  void clear() { memset(rows, 0, sizeof(rows)); }

  template <class S>
  void add_tile(const S* param, const bool* mask, int count) {
    alignas(64) uint16_t digits[kTile];
    for (int i = 0; i < kTile; i += kLanes<S>) {
      convert<uint16_t>(first_digit_below_half(load(param + i))).store(digits + i);
    }
    if (mask != nullptr) {
      for (int k = 0; k < count; ++k) digits[k] = mask[k] ? digits[k] : static_cast<uint16_t>(kDead);
    }
    for (int k = 0; k < count; ++k) ++rows[k % kRows][digits[k]];
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
