// SPDX-License-Identifier: Apache-2.0
// The key of an element, by which magnitudes are ordered, and its first digit, which a step counts as it stores.
#pragma once

#include "lanes.h"

namespace csgd {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

template <class T>
struct KeyType;
template <>
struct KeyType<float> {
  using Type = uint32_t;
};
template <>
struct KeyType<double> {
  using Type = uint64_t;
};

// The bits of |value|, as an integer >= 0, of one number or of several side by side. NaN is above Inf, and all NaN are
// equal: the quiet NaN, which is one in 16 bits as well.
template <class Value>
CSGD_HOST_DEVICE auto ordered_magnitude(Value value) {
  using Bits = FloatBits<LaneOf<Value>>;
  const auto magnitude = cast_bits<typename Bits::Type>(value) & Bits::kMagnitude;
  constexpr typename Bits::Type kNaN = Bits::kInfinity | Bits::kInfinity >> 1;
  return select(magnitude > Bits::kInfinity, kNaN, magnitude);
}

// Of what is alive the highest bit is set. What was dropped for good is below 0.
template <class T>
CSGD_HOST_DEVICE typename KeyType<T>::Type key_of(T value, bool alive) {
  using Key = typename KeyType<T>::Type;
  const Key key = static_cast<Key>(ordered_magnitude(value)) | ~static_cast<Key>(FloatBits<T>::kMagnitude);
  return alive ? key : Key{0};
}

// The first digit of the keys of what is alive, less kBins / 2, for which their highest bit stands.
template <class Value>
CSGD_HOST_DEVICE auto first_digit_below_half(Value value) {
  return ordered_magnitude(value) >> (8 * static_cast<int>(sizeof(LaneOf<Value>)) - kDigitBits);
}

// The first digit of the key: the counts of a step are of this.
template <class T>
CSGD_HOST_DEVICE int first_digit(T value, bool alive) {
  return alive ? kBins / 2 + static_cast<int>(first_digit_below_half(value)) : 0;
}

}  // namespace csgd
