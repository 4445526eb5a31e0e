// SPDX-License-Identifier: Apache-2.0
// Operations on one number, or on several numbers side by side: those that the rule and the roundings need beyond + - *
// / and <. This file defines them for plain numbers, csrc/cpu/vector.h for vectors. So one body of code serves a GPU
// thread, a host test and a vector unit, and whether a CPU loop is vectorised is not left to the compiler.
#pragma once

#include <cmath>

#include "host_device.h"

namespace csgd {

// The type of one lane. Of a plain number it is its own type.
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

// The number of bits from the highest 1 on.
CSGD_HOST_DEVICE int bit_length(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(x));
#elif defined(__GNUC__)
  return x == 0 ? 0 : 64 - __builtin_clzll(x);
#else
  int length = 0;
  for (; x != 0; x >>= 1) ++length;
  return length;
#endif
}

// The unsigned integer of kBytes bytes.
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

// `yes` where `condition` is 1, `no` where it is 0. It selects by bits, which compilers turn into vector instructions
// where both operands lie in memory. A branch would be mispredicted every few elements.
template <class S>
CSGD_HOST_DEVICE S choose_bits(uint8_t condition, S yes, S no) {
  using Bits = typename BitsOfSize<sizeof(S)>::Type;
  const Bits all = static_cast<Bits>(Bits{0} - condition);
  return bit_cast<S>(static_cast<Bits>((bit_cast<Bits>(yes) & all) | (bit_cast<Bits>(no) & static_cast<Bits>(~all))));
}

// lesser: a where a < b, else b. greater: a where a > b, else b. If one of them is NaN, both return b.
template <class T>
CSGD_HOST_DEVICE T lesser(T a, T b) {
  return a < b ? a : b;
}

template <class T>
CSGD_HOST_DEVICE T greater(T a, T b) {
  return a > b ? a : b;
}

// The larger of two numbers, neither of which is NaN. A GPU has an instruction for this, but none for greater().
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

// The larger of two numbers, or NaN if one of them is NaN.
template <class T>
CSGD_HOST_DEVICE T larger_or_nan(T a, T b) {
  return a > b || a != a ? a : b;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
CSGD_HOST_DEVICE float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

// The square root, correctly rounded, as it is in IEEE 754.
template <class T>
CSGD_HOST_DEVICE T square_root(T x) {
  return std::sqrt(x);
}

// How float and double are laid out. The bits are signed integers, since vector units compare those.
template <class T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Type = int32_t;
  static constexpr Type kInfinity = 0x7F800000;
  static constexpr Type kMagnitude = 0x7FFFFFFF;      // all but the sign
  static constexpr Type kAboveInfinity = 0x00800000;  // 2^31 - kInfinity
  // The bits of 2^23, whose last place is worth 1: for 0 <= k < 2^23 the bits of 2^23 + k are kIntegers + k.
  static constexpr Type kIntegers = 0x4B000000;
};

template <>
struct FloatBits<double> {
  using Type = int64_t;
  static constexpr Type kInfinity = 0x7FF0000000000000;
  static constexpr Type kMagnitude = 0x7FFFFFFFFFFFFFFF;
  static constexpr Type kAboveInfinity = 0x0010000000000000;  // 2^63 - kInfinity
  static constexpr Type kIntegers = 0x4330000000000000;       // likewise of 2^52
};

// The number whose last place is worth 1 (2^23 in float32). Adding it to x rounds x to an integer, which the low bits
// of the sum then hold. This replaces conversions between floats and integers, which are slow on a GPU, and on a CPU
// before SSE4.1.
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

// The smallest integer >= x, for 0 <= x < 2^31, as an integer.
template <class Value>
CSGD_HOST_DEVICE auto integer_above(Value x) {
  const auto below = convert<int32_t>(x);
  return below + select(convert<float>(below) < x, decltype(below)(1), decltype(below)(0));
}

// integers() + round_up(x).
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
