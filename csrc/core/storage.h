// SPDX-License-Identifier: Apache-2.0
// How a number is held in memory and how it is rounded there: float, double, BFloat16, Float16.
//
// Storage<S>::Opmath is the type the arithmetic runs in. load() is exact. store_nearest() rounds to nearest
// even; store_stochastic() truncates the magnitude to the storage grid and takes one step up when the 16-bit
// draw is below the discarded fraction times 2^16, so that the mean of the stored value is the value itself.
// A stored NaN is the canonical quiet NaN: processors disagree about sign and payload.
// All functions are free of branches on data, so that compilers vectorise loops over them.
#pragma once

#include "host_device.h"

namespace csgd {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class S>
struct Storage;

// float32 and float64 are stored as computed: there is nothing to round.
template <class S>
struct ExactStorage {
  using Opmath = S;
  static constexpr bool kRounds = false;
  static CSGD_HOST_DEVICE S load(S value) { return value; }
  static CSGD_HOST_DEVICE S store_nearest(S value) { return value; }
  static CSGD_HOST_DEVICE S store_stochastic(S value, uint32_t) { return value; }
  static CSGD_HOST_DEVICE S select(bool condition, S yes, S no) { return condition ? yes : no; }
  static CSGD_HOST_DEVICE void write(S* to, S value) { *to = value; }
};

template <>
struct Storage<float> : ExactStorage<float> {
  using Bits = int32_t;  // signed: vector units compare those
  static constexpr Bits kInfinityBits = 0x7F800000;
  static constexpr Bits kMagnitudeMask = 0x7FFFFFFF;
  // 2^23, whose last place is worth 1: the bits of 2^23 + k, for 0 <= k < 2^23, are kIntegers + k.
  static constexpr Bits kIntegers = 0x4B000000;
};

template <>
struct Storage<double> : ExactStorage<double> {
  using Bits = int64_t;
  static constexpr Bits kInfinityBits = 0x7FF0000000000000;
  static constexpr Bits kMagnitudeMask = 0x7FFFFFFFFFFFFFFF;
  static constexpr Bits kIntegers = 0x4330000000000000;  // 2^52, likewise
};

// The two 16-bit formats: computed in float32.
template <class S>
struct RoundedStorage {
  using Opmath = float;
  static constexpr bool kRounds = true;
  // With masks: compilers take ?: between two computed values for an invitation to branch.
  static CSGD_HOST_DEVICE S select(bool condition, S yes, S no) {
    const uint32_t mask = 0u - static_cast<uint32_t>(condition);
    return {static_cast<uint16_t>((yes.bits & mask) | (no.bits & ~mask))};
  }
  // By its member: GCC does not vectorise the assignment of a struct.
  static CSGD_HOST_DEVICE void write(S* to, S value) { to->bits = value.bits; }
};

template <>
struct Storage<BFloat16> : RoundedStorage<BFloat16> {
  static CSGD_HOST_DEVICE float load(BFloat16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
  }

  static CSGD_HOST_DEVICE BFloat16 store_nearest(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
  }

  static CSGD_HOST_DEVICE BFloat16 store_stochastic(float value, uint32_t draw) {
    // bfloat16 is the upper half of float32, subnormals included: the lower half is the fraction times 2^16.
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t truncated = bits >> 16;
    const uint32_t rounded = truncated + (draw < (bits & 0xFFFFu) ? 1u : 0u);
    const bool beyond_largest = (bits & 0x7FFFFFFFu) > 0x7F7F0000u;  // Inf and NaN, too
    return select(beyond_largest, store_nearest(value), {static_cast<uint16_t>(rounded)});
  }
};

template <>
struct Storage<Float16> : RoundedStorage<Float16> {
  static constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14 as float32 bits
  static constexpr uint32_t kLargest = 0x477FE000u;         // 65504
  static constexpr uint32_t kBiasDifference = 112u << 23;   // exponent bias 127 against 15

  static CSGD_HOST_DEVICE float load(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    const uint32_t normal = (magnitude << 13) + kBiasDifference;
    const uint32_t special = (magnitude << 13) | 0x7F800000u;  // Inf and NaN
    // Through an integer conversion, since a processor set to flush subnormals would lose them otherwise.
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return bit_cast<float>(sign | (magnitude >= 0x7C00u ? special : finite));
  }

  static CSGD_HOST_DEVICE Float16 store_nearest(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - kBiasDifference + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose last place is worth 2^-24, makes the addition itself round to the subnormal grid.
    const float shifted = bit_cast<float>(magnitude < kSmallestNormal ? magnitude : 0u) + 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3F000000u;
    const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
    const uint32_t in_range = magnitude >= 0x47800000u ? 0x7C00u : finite;  // from 65536 on: Inf
    const bool is_nan = magnitude > 0x7F800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7E00u : (in_range | ((bits >> 16) & 0x8000u)))};
  }

  static CSGD_HOST_DEVICE Float16 store_stochastic(float value, uint32_t draw) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal_up = draw < ((magnitude & 0x1FFFu) << 3) ? 1u : 0u;
    const uint32_t normal = ((magnitude - kBiasDifference) >> 13) + normal_up;
    // Below 2^-14 the grid is 2^-24: in units of it, truncation and fraction are exact in float32.
    const float units = bit_cast<float>(magnitude < kSmallestNormal ? magnitude : 0u) * 0x1p24f;
    const int32_t truncated = static_cast<int32_t>(units);
    const float fraction = (units - static_cast<float>(truncated)) * 65536.0f;
    const uint32_t subnormal_up = static_cast<float>(static_cast<int32_t>(draw)) < fraction ? 1u : 0u;
    const uint32_t subnormal = static_cast<uint32_t>(truncated) + subnormal_up;
    const uint32_t rounded = (magnitude < kSmallestNormal ? subnormal : normal) | ((bits >> 16) & 0x8000u);
    return select(magnitude > kLargest, store_nearest(value), {static_cast<uint16_t>(rounded)});
  }
};

}  // namespace csgd
