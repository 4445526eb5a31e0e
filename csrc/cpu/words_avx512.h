// SPDX-License-Identifier: Apache-2.0
// AVX-512: Philox with 16 counters at a time, and instructions for some functions of vector.h.
#pragma once

#include "../core/philox.h"
#include "vector.h"

namespace csgd {
namespace CSGD_ISA {

// Each word is in the lower half of a 64-bit lane, where the multiplier reads it; the upper half may hold anything.
// There are two vectors, so that the processor works on one while the other waits for its multiplication.
struct Words {
  static constexpr int kLanes = 16;
  __m512i word[2];

  Words() = default;
  explicit Words(uint32_t value)
      : word{_mm512_set1_epi32(static_cast<int>(value)), _mm512_set1_epi32(static_cast<int>(value))} {}
  Words(__m512i a, __m512i b) : word{a, b} {}

  // The blocks first ... first + 15, in an order in which store_draws() can write them one after another.
  static Words blocks_from(uint32_t first) {
    const __m512i start = _mm512_set1_epi32(static_cast<int>(first));
    return Words(_mm512_add_epi32(start, _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)),
                 _mm512_add_epi32(start, _mm512_setr_epi64(8, 12, 9, 13, 10, 14, 11, 15)));
  }

  // Any 16 blocks, in the same order.
  static Words blocks_at(const uint32_t* blocks) { return Words(eight_at(blocks), eight_at(blocks + 8)); }

 private:
  static __m512i eight_at(const uint32_t* blocks) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_cvtepu32_epi64(eight));
  }
};

// Instructions take a number from memory for all lanes.
struct RoundKeys : PhiloxRoundKeys {
  explicit RoundKeys(uint64_t seed) : PhiloxRoundKeys(philox_round_keys(seed)) {}
};

static inline Words operator^(Words a, Words b) {
  return Words(_mm512_xor_si512(a.word[0], b.word[0]), _mm512_xor_si512(a.word[1], b.word[1]));
}
static inline Words operator^(Words a, uint32_t b) { return a ^ Words(b); }

static inline void multiply(uint32_t factor, Words a, Words* high, Words* low) {
  const __m512i f = _mm512_set1_epi32(static_cast<int>(factor));
  for (int k = 0; k < 2; ++k) {
    low->word[k] = _mm512_mul_epu32(a.word[k], f);
    high->word[k] = _mm512_srli_epi64(low->word[k], 32);
  }
}

// The draws of 16 blocks, 8 for each: the low halves of its four words, then their high halves.
static inline void store_draws(const PhiloxWords<Words>& bits, uint16_t* draws) {
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int k = 0; k < 2; ++k) {
    const __m512i w01 = _mm512_mask_shuffle_epi32(bits.word[0].word[k], 0xAAAA, bits.word[1].word[k], _MM_PERM_CCAA);
    const __m512i w23 = _mm512_mask_shuffle_epi32(bits.word[2].word[k], 0xAAAA, bits.word[3].word[k], _MM_PERM_CCAA);
    // Now each 128-bit lane holds the words of one block; the shuffles sort their 16-bit halves.
    _mm512_storeu_si512(draws + 64 * k, _mm512_shuffle_epi8(_mm512_unpacklo_epi64(w01, w23), halves));
    _mm512_storeu_si512(draws + 64 * k + 32, _mm512_shuffle_epi8(_mm512_unpackhi_epi64(w01, w23), halves));
  }
}

// Instructions that GCC does not find by itself.
CSGD_HOST_DEVICE Vector<float, 16> lesser(Vector<float, 16> a, Vector<float, 16> b) {
  return Vector<float, 16>::of(_mm512_min_ps(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<double, 8> lesser(Vector<double, 8> a, Vector<double, 8> b) {
  return Vector<double, 8>::of(_mm512_min_pd(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<float, 16> greater(Vector<float, 16> a, Vector<float, 16> b) {
  return Vector<float, 16>::of(_mm512_max_ps(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<double, 8> greater(Vector<double, 8> a, Vector<double, 8> b) {
  return Vector<double, 8>::of(_mm512_max_pd(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<int32_t, 16> greater(Vector<int32_t, 16> a, Vector<int32_t, 16> b) {
  return Vector<int32_t, 16>::of((Vector<int32_t, 16>::Raw)_mm512_max_epi32((__m512i)a.raw, (__m512i)b.raw));
}
CSGD_HOST_DEVICE Vector<float, 16> round_up(Vector<float, 16> x) {
  return Vector<float, 16>::of(_mm512_roundscale_ps(x.raw, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
CSGD_HOST_DEVICE Vector<double, 8> round_up(Vector<double, 8> x) {
  return Vector<double, 8>::of(_mm512_roundscale_pd(x.raw, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
CSGD_HOST_DEVICE Vector<float, 16> square_root(Vector<float, 16> x) {
  return Vector<float, 16>::of(_mm512_sqrt_ps(x.raw));
}
CSGD_HOST_DEVICE Vector<double, 8> square_root(Vector<double, 8> x) {
  return Vector<double, 8>::of(_mm512_sqrt_pd(x.raw));
}
CSGD_HOST_DEVICE Vector<int32_t, 16> integer_above(Vector<float, 16> x) { return convert<int32_t>(round_up(x)); }
CSGD_HOST_DEVICE Vector<uint32_t, 16> zero_extend(Vector<uint16_t, 16> from) {
  return Vector<uint32_t, 16>::of((Vector<uint32_t, 16>::Raw)_mm512_cvtepu16_epi32((__m256i)from.raw));
}
template <>
CSGD_HOST_DEVICE Vector<float, 16> widen<Float16Format>(Vector<uint16_t, 16> stored) {
  return Vector<float, 16>::of(_mm512_cvtph_ps((__m256i)stored.raw));
}
CSGD_HOST_DEVICE bool all(Vector<int32_t, 16> mask) { return _mm512_movepi32_mask((__m512i)mask.raw) == 0xFFFF; }
CSGD_HOST_DEVICE bool all(Vector<int64_t, 8> mask) { return _mm512_movepi64_mask((__m512i)mask.raw) == 0xFF; }
CSGD_HOST_DEVICE bool any(Vector<int32_t, 16> mask) {
  return _mm512_test_epi32_mask((__m512i)mask.raw, (__m512i)mask.raw) != 0;
}
CSGD_HOST_DEVICE bool any(Vector<int64_t, 8> mask) {
  return _mm512_test_epi32_mask((__m512i)mask.raw, (__m512i)mask.raw) != 0;
}

}  // namespace CSGD_ISA
}  // namespace csgd
