// SPDX-License-Identifier: Apache-2.0
// Philox with 8 counters at a time, in AVX2.
#pragma once

#include "../core/philox.h"

namespace csgd {
namespace CSGD_ISA {

struct Words {
  static constexpr int kLanes = 8;
  __m256i word;

  Words() = default;
  explicit Words(uint32_t value) : word(_mm256_set1_epi32(static_cast<int>(value))) {}
  explicit Words(__m256i value) : word(value) {}

  // The blocks first ... first + 7, in an order that lets store_draws() write them one after another.
  static Words blocks_from(uint32_t first) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return Words(_mm256_add_epi32(Words(first).word, order));
  }
};

static inline Words operator^(Words a, Words b) { return Words(_mm256_xor_si256(a.word, b.word)); }
static inline Words operator^(Words a, uint32_t b) { return a ^ Words(b); }

// The multiplier takes every other word: once the even ones, once the odd ones.
static inline void multiply(uint32_t factor, Words a, Words* high, Words* low) {
  const __m256i f = Words(factor).word;
  const __m256i even = _mm256_mul_epu32(a.word, f);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.word, 32), f);
  *high = Words(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  *low = Words(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}

// The draws of 8 blocks, 8 to a block: the low halves of its four words, then their high halves.
static inline void store_draws(const PhiloxWords<Words>& bits, uint16_t* draws) {
  const __m256i low01 = _mm256_unpacklo_epi32(bits.word[0].word, bits.word[1].word);
  const __m256i high01 = _mm256_unpackhi_epi32(bits.word[0].word, bits.word[1].word);
  const __m256i low23 = _mm256_unpacklo_epi32(bits.word[2].word, bits.word[3].word);
  const __m256i high23 = _mm256_unpackhi_epi32(bits.word[2].word, bits.word[3].word);
  // Each 128-bit lane of these holds one block, whose 16-bit halves are then sorted.
  const __m256i blocks[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                             _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(draws + 16 * k), _mm256_shuffle_epi8(blocks[k], halves));
  }
}

}  // namespace CSGD_ISA
}  // namespace csgd
