// SPDX-License-Identifier: Apache-2.0
// AVX2: Philox with 8 counters at a time, and instructions for some functions of vector.h.
#pragma once

#include "../core/philox.h"
#include "../core/update_rule.h"
#include "vector.h"

namespace csgd {
namespace CSGD_ISA {

// Each word is in the lower half of a 64-bit lane, where the multiplier reads it; the upper half may hold anything.
// There are two vectors, so that the processor works on one while the other waits for its multiplication.
struct Words {
  static constexpr int kLanes = 8;
  __m256i word[2];

  Words() = default;
  explicit Words(uint32_t value)
      : word{_mm256_set1_epi32(static_cast<int>(value)), _mm256_set1_epi32(static_cast<int>(value))} {}
  Words(__m256i a, __m256i b) : word{a, b} {}
  Words(const Words& other) : word{other.word[0], other.word[1]} {}  // GCC would copy it by 16 bytes
  Words& operator=(const Words& other) = default;

  // The blocks first ... first + 7, in an order in which store_draws() can write them one after another.
  static Words blocks_from(uint32_t first) {
    const __m256i start = _mm256_set1_epi32(static_cast<int>(first));
    return Words(_mm256_add_epi32(start, _mm256_setr_epi32(0, 0, 2, 0, 1, 0, 3, 0)),
                 _mm256_add_epi32(start, _mm256_setr_epi32(4, 0, 6, 0, 5, 0, 7, 0)));
  }

  // Any 8 blocks, in the same order.
  static Words blocks_at(const uint32_t* blocks) { return Words(four_at(blocks), four_at(blocks + 4)); }

 private:
  static __m256i four_at(const uint32_t* blocks) {
    const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks));
    return _mm256_permute4x64_epi64(_mm256_cvtepu32_epi64(four), _MM_SHUFFLE(3, 1, 2, 0));
  }
};

static inline Words operator^(Words a, Words b) {
  return Words(_mm256_xor_si256(a.word[0], b.word[0]), _mm256_xor_si256(a.word[1], b.word[1]));
}
static inline Words operator^(Words a, uint32_t b) { return a ^ Words(b); }

// The key words of all rounds, each in all lanes.
struct RoundKeys {
  __m256i word[10][2];

  explicit RoundKeys(uint64_t seed) {
    for (int round = 0; round < 10; ++round) {
      for (int half = 0; half < 2; ++half) word[round][half] = Words(csgd::round_key(seed, round, half)).word[0];
    }
  }
};
static inline Words round_key(const RoundKeys& keys, int round, int half) {
  return Words(keys.word[round][half], keys.word[round][half]);
}

static inline void multiply(uint32_t factor, Words a, Words* high, Words* low) {
  const __m256i f = _mm256_set1_epi32(static_cast<int>(factor));
  for (int k = 0; k < 2; ++k) {
    low->word[k] = _mm256_mul_epu32(a.word[k], f);
    high->word[k] = _mm256_srli_epi64(low->word[k], 32);
  }
}

// Of each 128 bits the words 0 and 2 of a, then those of b.
static inline __m256i even_words(__m256i a, __m256i b) {
  const __m256 both = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _MM_SHUFFLE(2, 0, 2, 0));
  return _mm256_castps_si256(both);
}

// The draws of 8 blocks, 8 for each: the low halves of its four words, then their high halves.
static inline void store_draws(const PhiloxWords<Words>& bits, uint16_t* draws) {
  const __m256i halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  for (int k = 0; k < 2; ++k) {
    // Each 128-bit lane belongs to two blocks, a and b. Words 0 of a and b, then their words 1; likewise words 2 and 3.
    const __m256i w01 = _mm256_shuffle_epi8(even_words(bits.word[0].word[k], bits.word[1].word[k]), halves);
    const __m256i w23 = _mm256_shuffle_epi8(even_words(bits.word[2].word[k], bits.word[3].word[k]), halves);
    // Now the low halves of words 0 and 1 of a are side by side, then the high ones; then those of b.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(draws + 32 * k), _mm256_unpacklo_epi32(w01, w23));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(draws + 32 * k + 16), _mm256_unpackhi_epi32(w01, w23));
  }
}

// Instructions that GCC does not find by itself.
CSGD_HOST_DEVICE Vector<float, 8> lesser(Vector<float, 8> a, Vector<float, 8> b) {
  return Vector<float, 8>::of(_mm256_min_ps(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<double, 4> lesser(Vector<double, 4> a, Vector<double, 4> b) {
  return Vector<double, 4>::of(_mm256_min_pd(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<float, 8> greater(Vector<float, 8> a, Vector<float, 8> b) {
  return Vector<float, 8>::of(_mm256_max_ps(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<double, 4> greater(Vector<double, 4> a, Vector<double, 4> b) {
  return Vector<double, 4>::of(_mm256_max_pd(a.raw, b.raw));
}
CSGD_HOST_DEVICE Vector<int32_t, 8> greater(Vector<int32_t, 8> a, Vector<int32_t, 8> b) {
  return Vector<int32_t, 8>::of((Vector<int32_t, 8>::Raw)_mm256_max_epi32((__m256i)a.raw, (__m256i)b.raw));
}
CSGD_HOST_DEVICE Vector<float, 8> round_up(Vector<float, 8> x) { return Vector<float, 8>::of(_mm256_ceil_ps(x.raw)); }
CSGD_HOST_DEVICE Vector<double, 4> round_up(Vector<double, 4> x) {
  return Vector<double, 4>::of(_mm256_ceil_pd(x.raw));
}
CSGD_HOST_DEVICE Vector<float, 8> square_root(Vector<float, 8> x) {
  return Vector<float, 8>::of(_mm256_sqrt_ps(x.raw));
}
CSGD_HOST_DEVICE Vector<double, 4> square_root(Vector<double, 4> x) {
  return Vector<double, 4>::of(_mm256_sqrt_pd(x.raw));
}
CSGD_HOST_DEVICE Vector<int32_t, 8> integer_above(Vector<float, 8> x) { return convert<int32_t>(round_up(x)); }
CSGD_HOST_DEVICE Vector<uint32_t, 8> zero_extend(Vector<uint16_t, 8> from) {
  return Vector<uint32_t, 8>::of((Vector<uint32_t, 8>::Raw)_mm256_cvtepu16_epi32((__m128i)from.raw));
}
// Words below 2^16.
CSGD_HOST_DEVICE Vector<uint16_t, 8> narrow(Vector<uint32_t, 8> from) {
  const __m256i words = (__m256i)from.raw;
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  return Vector<uint16_t, 8>::of((Vector<uint16_t, 8>::Raw)halves);
}
template <>
CSGD_HOST_DEVICE Vector<float, 8> widen<Float16Format>(Vector<uint16_t, 8> stored) {
  return Vector<float, 8>::of(_mm256_cvtph_ps((__m128i)stored.raw));
}
template <>
CSGD_HOST_DEVICE Vector<uint16_t, 8> round_finite<Float16Format>(Vector<float, 8> value, Vector<uint16_t, 8> draws) {
  using Halves = Vector<uint16_t, 8>;
  // The processor truncates to the grid, subnormal numbers included. What it discards is compared with the draw.
  const auto truncated = Halves::of((Halves::Raw)_mm256_cvtps_ph(value.raw, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  const auto discarded = cast_bits<float>(magnitude_bits(value - widen<Float16Format>(truncated)));
  const auto drawn = convert<float>(cast_bits<int32_t>(zero_extend(draws))) * Float16Format::draw_unit(value);
  const __m256i up = (__m256i)(drawn < discarded).raw;  // -1 where the magnitude goes one step up
  const __m128i up16 = _mm_packs_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  return Halves::of(truncated.raw - (Halves::Raw)up16);
}
CSGD_HOST_DEVICE bool all(Vector<int32_t, 8> mask) { return _mm256_movemask_epi8((__m256i)mask.raw) == -1; }
CSGD_HOST_DEVICE bool all(Vector<int64_t, 4> mask) { return _mm256_movemask_epi8((__m256i)mask.raw) == -1; }
CSGD_HOST_DEVICE bool any(Vector<int32_t, 8> mask) { return !_mm256_testz_si256((__m256i)mask.raw, (__m256i)mask.raw); }
CSGD_HOST_DEVICE bool any(Vector<int64_t, 4> mask) { return !_mm256_testz_si256((__m256i)mask.raw, (__m256i)mask.raw); }

}  // namespace CSGD_ISA
}  // namespace csgd
