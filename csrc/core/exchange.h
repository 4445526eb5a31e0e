// SPDX-License-Identifier: Apache-2.0
// Gradients as codes -1, 0, +1 of a bound T, packed into words, added up and decoded, element by element; and the plain
// structs of these calls. docs/exchange.md has the proofs. Value is a number or, on a CPU, a vector of numbers.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "params.h"
#include "philox.h"
#include "storage.h"

namespace csgd {

constexpr uint32_t kCodeRadix = 3;       // codes are packed as -1, 0, +1 plus 1
constexpr int kCodesPerWord = 20;        // 3^20 < 2^32
constexpr int kMostPlaces = 32;          // digits in a word, of any radix
constexpr uint32_t kAllDraws = 0xFFFF;   // the complement of a draw u is the draw of 1 - U
constexpr int kDigitPositionShift = 40;  // digit k of U is the draw at this coordinate's position + (k << 40)

// A gradient to encode.
struct EncodeCall {
  const void* grad;     // numel elements of the tensor's dtype
  uint8_t* codes;       // out: numel codes, plus 1
  const double* bound;  // T, one number
  int64_t numel;
  uint64_t seed;
  uint32_t index;  // tells the draws of this gradient and pair of processes from those of others
  uint32_t step;
  uint32_t antithetic;  // kAllDraws where this process takes 1 - U for U, else 0
  int64_t chunk;        // on a GPU: elements that a block takes; set by the launcher
};

// Rows of digits in words. Digit j of word w is the row's digit j * words + w; absent ones are 0.
struct PackCall {
  const void* digits;  // uint8_t or, where the radix is more than 2^8, uint32_t; those of all rows, one after another
  uint32_t* words;     // out: rows * words
  int64_t numel;       // digits there are: the last rows may have fewer than the others, or none
  int64_t row;         // digits of a row
  int64_t words_per_row;
  int64_t rows;
  uint32_t radix;
  int places;  // digits of a word
};

// The codes of one shard from all ranks, to be added up.
struct AddCall {
  const uint32_t* codes;  // ranks * code_words
  int64_t code_words;     // words that hold a rank's codes
  int64_t ranks;
  PackCall sums;  // one row. On a CPU `digits` is scratch memory; on a GPU it is not used.
};

// The sums of codes of all shards, of which a gradient takes those from `first` on.
struct DecodeCall {
  const uint32_t* words;  // those of all shards, one after another
  const double* unit;     // T divided by the number of ranks, one number
  void* grad;             // out: numel elements of the tensor's dtype
  int64_t numel;
  int64_t first;
  int64_t shard;  // sums of a shard
  int64_t words_per_shard;
  int64_t ranks;
  uint32_t radix;
};

// The code of g is sign(g) where U < p for p = |g| / T, and U uniform with the draws as digits of base 2^16. In units
// of T / 2^16 the first digit u decides: U < p where |g| >= u + 1, and not where |g| <= u. No division is needed.
// Where g is negative 1 - U stands for U, so that codes fall as U grows; of a pair of processes that have the same U
// the second takes 1 - U for it, and its codes rise: antithetic variates, whose sum varies less.
//
// In float32 the products are rounded. But rounding keeps the order, and |g| is a float32: where |g| is above (below)
// the rounded product, it is above (below) the product itself. Where it is neither, code_decided() multiplies exactly.
struct CodeUnits {
  float low, high;  // T / 2^16, both; or numbers below and above it, where that is not a float32
};

// No bound, or one that says nothing: no code but 0.
CSGD_HOST_DEVICE bool codes_are_zero(double bound) { return !(bound > 0.0 && bound <= 0x1.fffffffffffffp1023); }

CSGD_HOST_DEVICE CodeUnits code_units(double bound) {
  const double exact = bound * (1.0 / kDrawRange);
  const float unit = static_cast<float>(exact);
  if (static_cast<double>(unit) == exact) return {unit, unit};
  return {0.0f, bit_cast<float>(FloatBits<float>::kInfinity)};  // a T below 2^-110: float32 decides nothing
}

// |g| and u, the first digit, as float32. `above`: U < p for certain; `decided`: that, or U >= p for certain.
template <class Value, class Mask>
CSGD_HOST_DEVICE void compare_in_float(const CodeUnits& units, Value size, Value u, Mask& above, Mask& decided) {
  above = size > (u + 1.0f) * units.high;
  decided = (size < u * units.low) | above;
}

// The digit of the U, or 1 - U, with which g is compared.
template <class Value, class Draw>
CSGD_HOST_DEVICE Draw own_digit(const EncodeCall& call, Value g, Draw draw) {
  const auto negative = cast_bits<uint32_t>(cast_bits<int32_t>(g) >> 31);
  return draw ^ (negative & kAllDraws) ^ call.antithetic;
}

// sign(g) + 1 in the mask, else 1; int32.
template <class Value, class Mask>
CSGD_HOST_DEVICE auto signed_code(Value g, Mask above) {
  const auto sign = (cast_bits<int32_t>(g) >> 31) | 1;
  return select(above, sign, decltype(sign)(0)) + 1;
}

// Whether U < |g| / T: the long division of |g| by T, compared with the digits of U as it goes. T has at most 24
// significant bits, u + 1 at most 17; what is left of |g| is a multiple of the last place of |g| or T, and below T. So
// every product and difference is a double. `digit` gives the digits of U, from the first on.
template <class Digit>
CSGD_HOST_DEVICE bool code_decided(double size, double bound, Digit digit) {
  for (int64_t level = 0;; ++level) {
    const double scaled = size * kDrawRange, u = digit(level);
    if (scaled >= (u + 1.0) * bound) return true;
    if (!(scaled > u * bound)) return false;  // NaN, too
    size = scaled - u * bound;
  }
}

// The code of one coordinate, plus 1, by all the digits that it takes; `first` is the first draw.
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

// floor(value / divisor), exactly, for integers 0 <= value < 2^32 and 1 <= divisor <= 2^32, as doubles, given 1 /
// divisor. (value + 1/2) / divisor is at least 1 / (2 divisor) away from any integer, and the errors of the roundings
// are below 2^-19 / divisor; so after 1/2 is taken off, the nearest integer is the floor.
template <class Value>
CSGD_HOST_DEVICE Value divided(Value value, double inverse) {
  constexpr double kNearest = 0x1.8p52;  // its last place is worth 1, and so is that of smaller numbers close by
  return (((value + 0.5) * inverse - 0.5) + kNearest) - kNearest;
}

// The lowest digit of a word; the others move down.
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
  int64_t left;  // sums from this one on that lie in the same place of consecutive words
};

CSGD_HOST_DEVICE SumPlace sum_place(const DecodeCall& call, int64_t position) {
  const int64_t shard = position / call.shard, in_shard = position % call.shard;
  const int64_t place = in_shard / call.words_per_shard, word = in_shard % call.words_per_shard;
  const int64_t left = call.words_per_shard - word, of_shard = call.shard - in_shard;
  return {shard * call.words_per_shard + word, static_cast<int>(place), left < of_shard ? left : of_shard};
}

}  // namespace csgd
