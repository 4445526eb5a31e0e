// SPDX-License-Identifier: Apache-2.0
// How a number is held in memory and how it is rounded when it is stored: float, double, BFloat16, Float16.
//
// Storage<S>::Opmath is the type of the arithmetic. Converted to it, a stored number has zeros in its lowest kEmptyBits
// bits. The two 16-bit formats are described by operations on 32-bit words, or on vectors of these, whose lower half
// holds the stored bits. widen() is exact. round_nearest() rounds to nearest even. round_stochastic() truncates the
// magnitude to the storage grid and goes one step up when the 16-bit draw is below the discarded fraction times 2^16;
// so the mean of the stored value is the value itself. A NaN is stored as the canonical quiet NaN, since processors
// disagree about sign and payload.
#pragma once

#include <stdexcept>

#include "lanes.h"
#include "params.h"

namespace csgd {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class S>
struct Storage;

// float32 and float64 are stored as they are computed, without rounding.
template <class S>
struct ExactStorage {
  using Opmath = S;
  static constexpr bool kRounds = false;
  static constexpr int kEmptyBits = 0;
  static CSGD_HOST_DEVICE S load(S value) { return value; }
  static CSGD_HOST_DEVICE S store_nearest(S value) { return value; }
  static CSGD_HOST_DEVICE S store_stochastic(S value, uint32_t) { return value; }
};

template <>
struct Storage<float> : ExactStorage<float> {};

template <>
struct Storage<double> : ExactStorage<double> {};

// Whether |value| is above the largest finite number of a 16-bit format, or value is NaN.
template <class Format, class Value>
CSGD_HOST_DEVICE auto beyond_finite(Value value) {
  return cast_bits<int32_t>(cast_bits<uint32_t>(value) & 0x7FFFFFFFu) > Format::kLargest;
}

template <class Format, class Value, class Words>
CSGD_HOST_DEVICE auto round_stochastic(Value value, Words draw) {
  return select(beyond_finite<Format>(value), Format::round_nearest(value),
                Format::round_stochastic_finite(value, draw));
}

// The two 16-bit formats, whose arithmetic is in float32: one number at a time, by the functions of Format.
template <class S, class FormatOfS>
struct RoundedStorage {
  using Format = FormatOfS;
  using Opmath = float;
  static constexpr bool kRounds = true;
  static constexpr int kEmptyBits = Format::kEmptyBits;
  static CSGD_HOST_DEVICE float load(S value) { return Format::widen(uint32_t{value.bits}); }
  static CSGD_HOST_DEVICE S store_nearest(float value) { return {static_cast<uint16_t>(Format::round_nearest(value))}; }
  static CSGD_HOST_DEVICE S store_stochastic(float value, uint32_t draw) {
    // A branch, unlike round_stochastic(): a GPU's thread would need registers for both.
    const uint32_t bits =
        beyond_finite<Format>(value) ? Format::round_nearest(value) : Format::round_stochastic_finite(value, draw);
    return {static_cast<uint16_t>(bits)};
  }
};

// In the functions below Value is float or a vector of floats, Words is uint32_t or a vector of these. value == value
// says that it is not NaN.
struct BFloat16Format {
  static constexpr int kEmptyBits = 16;

  template <class Words>
  static CSGD_HOST_DEVICE auto widen(Words bits) {
    return cast_bits<float>(bits << 16);
  }

  template <class Value>
  static CSGD_HOST_DEVICE auto round_nearest(Value value) {
    const auto bits = cast_bits<uint32_t>(value);
    const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return select(value == value, rounded, 0x7FC0u);
  }

  static constexpr int32_t kLargest = 0x7F7F0000;  // as float32 bits

  // bfloat16 is the upper half of float32, also for subnormal numbers. The lower half is the discarded fraction times
  // 2^16; adding 2^16 - 1 - draw carries into the upper half exactly where the draw is below it.
  template <class Words>
  static CSGD_HOST_DEVICE auto stochastic_addend(Words draw) {
    return 0xFFFFu - draw;
  }

  // For |value| up to the largest finite number.
  template <class Value, class Words>
  static CSGD_HOST_DEVICE auto round_stochastic_finite(Value value, Words draw) {
    return (cast_bits<uint32_t>(value) + stochastic_addend(draw)) >> 16;
  }
};

struct Float16Format {
  static constexpr int kEmptyBits = 13;
  static constexpr int32_t kSmallestNormal = 0x38800000;   // 2^-14 as float32 bits
  static constexpr int32_t kLargest = 0x477FE000;          // 65504
  static constexpr uint32_t kBiasDifference = 112u << 23;  // exponent bias 127 against 15

  template <class Words>
  static CSGD_HOST_DEVICE auto widen(Words bits) {
#if defined(__CUDA_ARCH__)
    float value;  // one instruction instead of ten
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
#else
    const auto sign = (bits & 0x8000u) << 16;
    const auto magnitude = bits & 0x7FFFu;
    const auto normal = (magnitude << 13) + kBiasDifference;
    const auto special = (magnitude << 13) | 0x7F800000u;  // Inf and NaN
    // By an integer conversion, since a processor that is set to flush subnormal floats would make them 0.
    const auto units = cast_bits<int32_t>(magnitude);
    const auto subnormal = cast_bits<uint32_t>(convert<float>(units) * 0x1p-24f);
    const auto finite = select(units < 0x0400, subnormal, normal);
    return cast_bits<float>(sign | select(units > 0x7BFF, special, finite));
#endif
  }

  // Rounds towards zero; for |value| <= 65504.
  static CSGD_HOST_DEVICE uint32_t truncate(float value) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rz.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = cast_bits<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - kBiasDifference) >> 13;
    const uint32_t subnormal = static_cast<uint32_t>(cast_bits<float>(magnitude) * 0x1p24f);
    const bool is_subnormal = cast_bits<int32_t>(magnitude) < kSmallestNormal;
    return (is_subnormal ? subnormal : normal) | (bits >> 16 & 0x8000u);
#endif
  }

  // 2^-16 times the distance between two neighbouring float16 numbers around |value|.
  template <class Value>
  static CSGD_HOST_DEVICE auto draw_unit(Value value) {
    const auto exponent = cast_bits<int32_t>(value) & 0x7F800000;
    return cast_bits<float>(greater(exponent, decltype(exponent)(kSmallestNormal)) - (26 << 23));
  }

  template <class Value>
  static CSGD_HOST_DEVICE auto round_nearest(Value value) {
    const auto bits = cast_bits<uint32_t>(value);
    const auto magnitude = bits & 0x7FFFFFFFu;
    const auto is_subnormal = cast_bits<int32_t>(magnitude) < kSmallestNormal;
    const auto normal = (magnitude - kBiasDifference + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // The last place of 0.5 is worth 2^-24, so the addition itself rounds to the grid of the subnormal numbers.
    const auto shifted = cast_bits<float>(select(is_subnormal, magnitude, 0u)) + 0.5f;
    const auto subnormal = cast_bits<uint32_t>(shifted) - 0x3F000000u;
    const auto finite = select(is_subnormal, subnormal, normal);
    // Magnitudes from 65536 on become Inf.
    const auto in_range = select(cast_bits<int32_t>(magnitude) > 0x477FFFFF, 0x7C00u, finite);
    return select(value == value, in_range | ((bits >> 16) & 0x8000u), 0x7E00u);
  }

  // For |value| up to the largest finite number.
  template <class Value, class Words>
  static CSGD_HOST_DEVICE auto round_stochastic_finite(Value value, Words draw) {
    const auto bits = cast_bits<uint32_t>(value);
    const auto magnitude = bits & 0x7FFFFFFFu;
    const auto is_subnormal = cast_bits<int32_t>(magnitude) < kSmallestNormal;
    const auto normal = (magnitude - kBiasDifference) << 3;  // the lower half holds the discarded fraction
    // Below 2^-14 the grid is 2^-24; here, too, the lower half becomes the fraction. It is rounded up, which changes no
    // comparison with a draw.
    const auto scaled = cast_bits<float>(select(is_subnormal, magnitude, 0u)) * 0x1p40f;
    const auto subnormal = cast_bits<uint32_t>(integer_above(scaled));
    // As in bfloat16, the sum carries exactly where the draw is below the fraction.
    const auto rounded = (select(is_subnormal, subnormal, normal) + (0xFFFFu - draw)) >> 16;
    return rounded | ((bits >> 16) & 0x8000u);
  }
};

template <>
struct Storage<BFloat16> : RoundedStorage<BFloat16, BFloat16Format> {};

template <>
struct Storage<Float16> : RoundedStorage<Float16, Float16Format> {};

// Calls f with a zero of the type in which elements of this dtype are stored. So a dtype that is known only when
// running becomes the template argument of a loop or kernel.
template <class F>
auto with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat16: return f(Float16{});
  }
  throw std::invalid_argument("csgd_cuda: unknown dtype");
}

}  // namespace csgd
