// SPDX-License-Identifier: Apache-2.0
// Gradients as codes -1, 0, +1 of a bound T: encoded, packed into words, added up and decoded, element by element; and
// the plain structs of these calls. docs/exchange.md has the proofs. Value is a number or, on a CPU, a vector of
// numbers.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "params.h"
#include "philox.h"
#include "storage.h"

namespace csgd {

constexpr uint32_t kCodeRadix = 3;       // a code c is packed as the digit c + 1
constexpr int kCodesPerWord = 20;        // 3^20 < 2^32
constexpr int kMostPlaces = 32;          // digits in a word, of any radix
constexpr uint32_t kAllDraws = 0xFFFF;   // the complement of a draw u is the draw of 1 - U
constexpr int kDigitPositionShift = 40;  // digit k of U is the draw at the coordinate's position + (k << 40)

// A gradient to encode.
struct EncodeCall {
  const void* grad;     // numel elements of the tensor's dtype
  uint8_t* codes;       // out: numel codes, each plus 1
  const double* bound;  // T, one number
  int64_t numel;
  uint64_t seed;
  uint32_t index;  // makes the draws of this gradient and pair of processes differ from all others
  uint32_t step;
  uint32_t antithetic;  // kAllDraws where this process uses 1 - U in place of U, else 0
  int64_t chunk;        // on a GPU: elements that a block takes; set by the launcher
};

// Rows of digits, to be packed into words. Digit j of word w is the row's digit j * words_per_row + w; a digit beyond
// the row's end is 0.
struct PackCall {
  const void* digits;  // of all rows, one after another: uint8_t, or uint32_t where the radix exceeds 2^8
  uint32_t* words;     // out: rows * words
  int64_t numel;       // number of digits; the last rows may have fewer than the others, or none
  int64_t row;         // digits of a row
  int64_t words_per_row;
  int64_t rows;
  uint32_t radix;
  int places;  // digits of a word
};

// A row of words, to be taken apart into digits. Digit j of word w is the digit j * count + w.
struct UnpackCall {
  const uint32_t* words;
  void* digits;   // out: count * places of uint8_t, or uint32_t where the radix exceeds 2^8
  int64_t count;  // of words
  uint32_t radix;
  int places;
};

// The codes of one shard from all ranks, to be added up.
struct AddCall {
  const uint32_t* codes;  // ranks * code_words
  int64_t code_words;     // words that hold one rank's codes
  int64_t ranks;
  PackCall sums;  // one row. On a CPU `digits` is scratch memory; on a GPU it is not used.
};

// The sums of the codes of all shards. A gradient takes those from number `first` on.
struct DecodeCall {
  const uint32_t* words;  // of all shards, one after another
  const double* unit;     // T divided by the number of ranks, one number
  void* grad;             // out: numel elements of the tensor's dtype
  int64_t numel;
  int64_t first;
  int64_t shard;  // sums of a shard
  int64_t words_per_shard;
  int64_t ranks;
  uint32_t radix;
};

// The code of g is sign(g) where U < p, else 0. Here p = |g| / T, and U is uniform in [0, 1): its digits in base 2^16
// are draws. In units of T / 2^16 the first digit u decides nearly always: U < p where |g| >= u + 1, and U >= p where
// |g| <= u. This needs no division. Where g is negative, 1 - U takes the place of U, so that codes fall as U grows. The
// second process of a pair that shares U uses 1 - U, so that its codes rise as U grows: such antithetic variates have a
// sum of lower variance.
//
// In float32 the products are rounded. But rounding keeps the order of numbers, and |g| is a float32: where |g| is
// above (below) the rounded product, it is above (below) the exact product as well. Where it is neither, code_decided()
// multiplies exactly.
struct CodeUnits {
  float low, high;  // both are T / 2^16 if that is a float32, else numbers below and above it
};

// Without a finite bound above 0 every code is 0.
CSGD_HOST_DEVICE bool codes_are_zero(double bound) { return !(bound > 0.0 && bound <= 0x1.fffffffffffffp1023); }

CSGD_HOST_DEVICE CodeUnits code_units(double bound) {
  const double exact = bound * (1.0 / kDrawRange);
  const float unit = static_cast<float>(exact);
  if (static_cast<double>(unit) == exact) return {unit, unit};
  return {0.0f, bit_cast<float>(FloatBits<float>::kInfinity)};  // T is below 2^-110, where float32 decides nothing
}

// Compares |g| = `size` and the first digit u in float32. `above`: certainly U < p. `decided`: certainly U < p or
// certainly U >= p.
template <class Value, class Mask>
CSGD_HOST_DEVICE void compare_in_float(const CodeUnits& units, Value size, Value u, Mask& above, Mask& decided) {
  above = size > (u + 1.0f) * units.high;
  decided = (size < u * units.low) | above;
}

// The digit of U or of 1 - U with which g is compared.
template <class Value, class Draw>
CSGD_HOST_DEVICE Draw own_digit(const EncodeCall& call, Value g, Draw draw) {
  const auto negative = cast_bits<uint32_t>(cast_bits<int32_t>(g) >> 31);
  return draw ^ (negative & kAllDraws) ^ call.antithetic;
}

// sign(g) + 1 where the mask is set, else 1; as int32.
template <class Value, class Mask>
CSGD_HOST_DEVICE auto signed_code(Value g, Mask above) {
  const auto sign = (cast_bits<int32_t>(g) >> 31) | 1;
  return select(above, sign, decltype(sign)(0)) + 1;
}

// Whether U < |g| / T: a long division of |g| by T, whose digits are compared with those of U one by one. T has at most
// 24 significant bits and u + 1 at most 17. The remainder of |g| is below T, and a multiple of the last place of |g| or
// of T. So every product and difference is exact in float64. digit(k) is digit k of U, the first one being digit 0.
template <class Digit>
CSGD_HOST_DEVICE bool code_decided(double size, double bound, Digit digit) {
  for (int64_t level = 0;; ++level) {
    const double scaled = size * kDrawRange, u = digit(level);
    if (scaled >= (u + 1.0) * bound) return true;
    if (!(scaled > u * bound)) return false;  // also where |g| is NaN
    size = scaled - u * bound;
  }
}

// The code of one coordinate, plus 1, from as many digits of U as it takes; `first` is the first draw.
CSGD_HOST_DEVICE uint8_t exact_code(const EncodeCall& call, double bound, float g, int64_t position, uint32_t first) {
  const auto digit = [&](int64_t level) {
    if (level == 0) return static_cast<double>(own_digit(call, g, first));
    const uint64_t at = static_cast<uint64_t>(position + (level << kDigitPositionShift));
    const Philox4x32 bits = draw_block(call.seed, kExchangeStream, at / kDrawsPerCall, call.index, call.step);
    return static_cast<double>(own_digit(call, g, uint32_t{draw_lane(bits, static_cast<int>(at % kDrawsPerCall))}));
  };
  const float size = bit_cast<float>(bit_cast<int32_t>(g) & FloatBits<float>::kMagnitude);
  return static_cast<uint8_t>(signed_code(g, code_decided(static_cast<double>(size), bound, digit)));
}

// floor(value / divisor), exactly, for integers 0 <= value < 2^32 and 1 <= divisor <= 2^32, given as doubles, and
// inverse = 1 / divisor. (value + 1/2) / divisor differs from every integer by at least 1 / (2 divisor), and the
// rounding errors are below 2^-19 / divisor. So, after 1/2 is subtracted, the nearest integer is the floor.
template <class Value>
CSGD_HOST_DEVICE Value divided(Value value, double inverse) {
  constexpr double kNearest = 0x1.8p52;  // its last place is worth 1, as is that of smaller numbers near it
  return (((value + 0.5) * inverse - 0.5) + kNearest) - kNearest;
}

// Takes the lowest digit off a word; the other digits move down by one place.
template <class Value>
CSGD_HOST_DEVICE Value take_digit(Value& word, double radix, double inverse) {
  const Value quotient = divided(word, inverse);
  const Value digit = word - quotient * radix;
  word = quotient;
  return digit;
}

// 1 / radix^place.
CSGD_HOST_DEVICE double inverse_power(uint32_t radix, int place) {
  double power = 1.0;  // at most 2^32
  for (int k = 0; k < place; ++k) power *= radix;
  return 1.0 / power;
}

// with_storage() for the dtypes that are coded: all but float64.
template <class F>
auto with_coded_storage(DType dtype, F f) {
  return with_storage(dtype, [&](auto tag) -> decltype(f(float{})) {
    if constexpr (std::is_same_v<decltype(tag), double>) {
      throw std::invalid_argument("csgd_cuda: float64 gradients are not coded");
    } else {
      return f(tag);
    }
  });
}

// Where the sum of a coordinate lies.
struct SumPlace {
  int64_t word;
  int place;
  int64_t left;  // number of sums, from this one on, in the same place of consecutive words
};

CSGD_HOST_DEVICE SumPlace sum_place(const DecodeCall& call, int64_t position) {
  const int64_t shard = position / call.shard, in_shard = position % call.shard;
  const int64_t place = in_shard / call.words_per_shard, word = in_shard % call.words_per_shard;
  const int64_t left = call.words_per_shard - word, of_shard = call.shard - in_shard;
  return {shard * call.words_per_shard + word, static_cast<int>(place), left < of_shard ? left : of_shard};
}

}  // namespace csgd
