// SPDX-License-Identifier: Apache-2.0
// One number, or several side by side: the operations that the rule and the roundings need beyond + - * / and <, here
// for plain numbers. csrc/cpu/vector.h has them for vectors, so that one body of code serves a GPU thread, a host
// test and a vector unit, and none of them leaves it to the compiler whether a loop becomes vectors.
#pragma once

#include "host_device.h"

namespace csgd {

// The type of one lane: of a plain number its own.
template <class T>
struct LaneType {
  using Type = T;
};
template <class T>
using LaneOf = typename LaneType<T>::Type;

// The same bits as numbers of another type of the same size.
template <class To, class From>
CSGD_HOST_DEVICE To cast_bits(From from) {
  return bit_cast<To>(from);
}

// The same value in another type.
template <class To, class From>
CSGD_HOST_DEVICE To convert(From from) {
  return static_cast<To>(from);
}

template <class T>
CSGD_HOST_DEVICE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// The integer of so many bytes.
template <int kBytes>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using Type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using Type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using Type = uint64_t;
};

// `yes` where `condition` is 1, `no` where it is 0: by their bits, which compilers turn into vectors where both lie in
// memory. A branch would be mispredicted at every few elements.
template <class S>
CSGD_HOST_DEVICE S choose_bits(uint8_t condition, S yes, S no) {
  using Bits = typename BitsOfSize<sizeof(S)>::Type;
  const Bits all = static_cast<Bits>(Bits{0} - condition);
  return bit_cast<S>(static_cast<Bits>((bit_cast<Bits>(yes) & all) | (bit_cast<Bits>(no) & static_cast<Bits>(~all))));
}

// a where a < b (a > b), else b: where one of them is NaN, too.
template <class T>
CSGD_HOST_DEVICE T lesser(T a, T b) {
  return a < b ? a : b;
}

template <class T>
CSGD_HOST_DEVICE T greater(T a, T b) {
  return a > b ? a : b;
}

// The larger of two of which none is NaN: an instruction of a GPU, which greater() is not.
template <class T>
CSGD_HOST_DEVICE T larger(T a, T b) {
  return greater(a, b);
}
#if defined(__CUDA_ARCH__)
template <>
CSGD_HOST_DEVICE float larger(float a, float b) {
  return fmaxf(a, b);
}
#endif

// How float and double are laid out. Bits are signed: vector units compare those.
template <class T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Type = int32_t;
  static constexpr Type kInfinity = 0x7F800000;
  static constexpr Type kMagnitude = 0x7FFFFFFF;  // all but the sign
  // 2^23, whose last place is worth 1: the bits of 2^23 + k, for 0 <= k < 2^23, are kIntegers + k.
  static constexpr Type kIntegers = 0x4B000000;
};

template <>
struct FloatBits<double> {
  using Type = int64_t;
  static constexpr Type kInfinity = 0x7FF0000000000000;
  static constexpr Type kMagnitude = 0x7FFFFFFFFFFFFFFF;
  static constexpr Type kIntegers = 0x4330000000000000;  // 2^52, likewise
};

// The number whose last place is worth 1 (2^23 in float32). Adding it rounds to an integer, which its low bits then
// hold: conversions between floats and integers are slow on a GPU, and on a CPU before SSE4.1.
template <class T>
CSGD_HOST_DEVICE T integers() {
  return bit_cast<T>(FloatBits<T>::kIntegers);
}

// The smallest integer >= x, for 0 <= x <= 2^16.
template <class Value>
CSGD_HOST_DEVICE Value round_up(Value x) {
  using T = LaneOf<Value>;
  const Value rounded = (x + integers<T>()) - integers<T>();
  return rounded + select(rounded < x, Value(T(1)), Value(T(0)));
}

// integers() plus that.
template <class Value>
CSGD_HOST_DEVICE Value round_up_above(Value x) {
  return round_up(x) + integers<LaneOf<Value>>();
}
#if defined(__CUDA_ARCH__)
template <>
CSGD_HOST_DEVICE float round_up_above(float x) {
  return __fadd_ru(x, integers<float>());
}
template <>
CSGD_HOST_DEVICE double round_up_above(double x) {
  return __dadd_ru(x, integers<double>());
}
#endif

}  // namespace csgd
