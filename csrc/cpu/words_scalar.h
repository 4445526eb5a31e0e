// SPDX-License-Identifier: Apache-2.0
// Philox on any processor, one counter at a time.
#pragma once

#include "../core/philox.h"
#include "vector.h"

namespace csgd {
namespace CSGD_ISA {

struct Words {
  static constexpr int kLanes = 1;
  uint32_t word;

  Words() = default;
  explicit Words(uint32_t value) : word(value) {}
  static Words blocks_from(uint32_t first) { return Words(first); }
  static Words blocks_at(const uint32_t* blocks) { return Words(*blocks); }
};

struct RoundKeys : PhiloxRoundKeys {
  explicit RoundKeys(uint64_t seed) : PhiloxRoundKeys(philox_round_keys(seed)) {}
};

static inline Words operator^(Words a, Words b) { return Words(a.word ^ b.word); }
static inline Words operator^(Words a, uint32_t b) { return Words(a.word ^ b); }
static inline void multiply(uint32_t factor, Words a, Words* high, Words* low) {
  csgd::multiply(factor, a.word, &high->word, &low->word);
}

// The eight draws of a block: the low halves of its words, then their high halves.
static inline void store_draws(const PhiloxWords<Words>& bits, uint16_t* draws) {
  for (int w = 0; w < 4; ++w) {
    draws[w] = static_cast<uint16_t>(bits.word[w].word);
    draws[w + 4] = static_cast<uint16_t>(bits.word[w].word >> 16);
  }
}

}  // namespace CSGD_ISA
}  // namespace csgd
