// SPDX-License-Identifier: Apache-2.0
// Philox with 16 counters at a time, in AVX-512.
#pragma once

#include "../core/philox.h"

namespace csgd {
namespace CSGD_ISA {

struct Words {
  static constexpr int kLanes = 16;
  __m512i word;

  Words() = default;
  explicit Words(uint32_t value) : word(_mm512_set1_epi32(static_cast<int>(value))) {}
  explicit Words(__m512i value) : word(value) {}

  // The blocks first ... first + 15, in an order that lets store_draws() write them one after another.
  static Words blocks_from(uint32_t first) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return Words(_mm512_add_epi32(Words(first).word, order));
  }
};

static inline Words operator^(Words a, Words b) { return Words(_mm512_xor_si512(a.word, b.word)); }
static inline Words operator^(Words a, uint32_t b) { return a ^ Words(b); }

// The multiplier takes every other word: once the even ones, once the odd ones.
static inline void multiply(uint32_t factor, Words a, Words* high, Words* low) {
  const __m512i f = Words(factor).word;
  const __m512i even = _mm512_mul_epu32(a.word, f);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.word, 32), f);
  *high = Words(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
  *low = Words(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
}

// The draws of 16 blocks, 8 to a block: the low halves of its four words, then their high halves.
static inline void store_draws(const PhiloxWords<Words>& bits, uint16_t* draws) {
  const __m512i low01 = _mm512_unpacklo_epi32(bits.word[0].word, bits.word[1].word);
  const __m512i high01 = _mm512_unpackhi_epi32(bits.word[0].word, bits.word[1].word);
  const __m512i low23 = _mm512_unpacklo_epi32(bits.word[2].word, bits.word[3].word);
  const __m512i high23 = _mm512_unpackhi_epi32(bits.word[2].word, bits.word[3].word);
  // Each 128-bit lane of these holds one block, whose 16-bit halves are then sorted.
  const __m512i blocks[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                             _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int k = 0; k < 4; ++k) {
    _mm512_storeu_si512(draws + 32 * k, _mm512_shuffle_epi8(blocks[k], halves));
  }
}

}  // namespace CSGD_ISA
}  // namespace csgd
