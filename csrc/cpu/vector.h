// SPDX-License-Identifier: Apache-2.0
// Several numbers side by side, in the vector extension of GCC and Clang, which works on any processor with the
// registers it has. This file defines for vectors what csrc/core/lanes.h defines for plain numbers.
#ifndef CSGD_ISA
#error "define CSGD_ISA, the namespace of the instruction set, and CSGD_VECTOR_BYTES before including vector.h"
#endif

#include "../core/storage.h"

namespace csgd {
namespace CSGD_ISA {

// The integer of kBytes bytes. A comparison gives a vector of these: all bits are set where it holds, else none.
template <int kBytes>
struct MaskLane;
template <>
struct MaskLane<1> {
  using Type = int8_t;
};
template <>
struct MaskLane<2> {
  using Type = int16_t;
};
template <>
struct MaskLane<4> {
  using Type = int32_t;
};
template <>
struct MaskLane<8> {
  using Type = int64_t;
};

template <class T, int kLanes>
struct Vector {
  typedef T Raw __attribute__((vector_size(kLanes * sizeof(T))));
  using Mask = Vector<typename MaskLane<sizeof(T)>::Type, kLanes>;
  Raw raw;

  Vector() = default;
  CSGD_HOST_DEVICE Vector(T value) : raw(value - Raw{}) {}  // the value in all lanes; value + 0 would turn -0 into 0
  static CSGD_HOST_DEVICE Vector of(Raw raw) {
    Vector v;
    v.raw = raw;
    return v;
  }

  static CSGD_HOST_DEVICE Vector load(const void* from) {
    Vector v;
    memcpy(&v.raw, from, sizeof(v.raw));
    return v;
  }
  CSGD_HOST_DEVICE void store(void* to) const { memcpy(to, &raw, sizeof(raw)); }

  friend CSGD_HOST_DEVICE Vector operator+(Vector a, Vector b) { return of(a.raw + b.raw); }
  friend CSGD_HOST_DEVICE Vector operator-(Vector a, Vector b) { return of(a.raw - b.raw); }
  friend CSGD_HOST_DEVICE Vector operator*(Vector a, Vector b) { return of(a.raw * b.raw); }
  friend CSGD_HOST_DEVICE Vector operator/(Vector a, Vector b) { return of(a.raw / b.raw); }
  friend CSGD_HOST_DEVICE Vector operator&(Vector a, Vector b) { return of(a.raw & b.raw); }
  friend CSGD_HOST_DEVICE Vector operator|(Vector a, Vector b) { return of(a.raw | b.raw); }
  friend CSGD_HOST_DEVICE Vector operator^(Vector a, Vector b) { return of(a.raw ^ b.raw); }
  friend CSGD_HOST_DEVICE Vector operator<<(Vector a, int places) { return of(a.raw << places); }
  friend CSGD_HOST_DEVICE Vector operator>>(Vector a, int places) { return of(a.raw >> places); }
  friend CSGD_HOST_DEVICE Mask operator<(Vector a, Vector b) { return Mask::of(a.raw < b.raw); }
  friend CSGD_HOST_DEVICE Mask operator>(Vector a, Vector b) { return Mask::of(a.raw > b.raw); }
  friend CSGD_HOST_DEVICE Mask operator<=(Vector a, Vector b) { return Mask::of(a.raw <= b.raw); }
  friend CSGD_HOST_DEVICE Mask operator==(Vector a, Vector b) { return Mask::of(a.raw == b.raw); }
  friend CSGD_HOST_DEVICE Mask operator!=(Vector a, Vector b) { return Mask::of(a.raw != b.raw); }
  friend CSGD_HOST_DEVICE Vector select(Mask condition, Vector yes, Vector no) {
    return of(condition.raw ? yes.raw : no.raw);
  }
};

template <class To, class From, int kLanes>
CSGD_HOST_DEVICE Vector<To, kLanes> cast_bits(Vector<From, kLanes> from) {
  using Raw = typename Vector<To, kLanes>::Raw;
  return Vector<To, kLanes>::of(reinterpret_cast<Raw>(from.raw));
}

template <class To, class From, int kLanes>
CSGD_HOST_DEVICE Vector<To, kLanes> convert(Vector<From, kLanes> from) {
  return Vector<To, kLanes>::of(__builtin_convertvector(from.raw, typename Vector<To, kLanes>::Raw));
}

// words_*.h overload the functions below for the registers of an instruction set where compilers do not find the right
// instruction.

template <class T, int kLanes>
CSGD_HOST_DEVICE Vector<T, kLanes> lesser(Vector<T, kLanes> a, Vector<T, kLanes> b) {
  return select(a < b, a, b);
}

template <class T, int kLanes>
CSGD_HOST_DEVICE Vector<T, kLanes> greater(Vector<T, kLanes> a, Vector<T, kLanes> b) {
  return select(a > b, a, b);
}

template <class T, int kLanes>
CSGD_HOST_DEVICE Vector<T, kLanes> square_root(Vector<T, kLanes> x) {
  for (int k = 0; k < kLanes; ++k) x.raw[k] = csgd::square_root(x.raw[k]);
  return x;
}

template <int kLanes>
CSGD_HOST_DEVICE Vector<uint32_t, kLanes> zero_extend(Vector<uint16_t, kLanes> from) {
  return convert<uint32_t>(from);
}

// Words below 2^16 as half as wide ones.
template <int kLanes>
CSGD_HOST_DEVICE Vector<uint16_t, kLanes> narrow(Vector<uint32_t, kLanes> from) {
  return convert<uint16_t>(from);
}

// Numbers of a 16-bit format as floats.
template <class Format, int kLanes>
CSGD_HOST_DEVICE Vector<float, kLanes> widen(Vector<uint16_t, kLanes> stored) {
  return Format::widen(zero_extend(stored));
}

// Format::round_stochastic_finite(), in halves of words.
template <class Format, int kLanes>
CSGD_HOST_DEVICE Vector<uint16_t, kLanes> round_finite(Vector<float, kLanes> value, Vector<uint16_t, kLanes> draws) {
  return narrow(Format::round_stochastic_finite(value, zero_extend(draws)));
}

template <class T, int kLanes>
CSGD_HOST_DEVICE bool any(Vector<T, kLanes> mask) {
  T bits = 0;
  for (int k = 0; k < kLanes; ++k) bits |= mask.raw[k];
  return bits != 0;
}

template <class T, int kLanes>
CSGD_HOST_DEVICE bool all(Vector<T, kLanes> mask) {
  return !any(mask == Vector<T, kLanes>(0));
}

}  // namespace CSGD_ISA

template <class T, int kLanes>
struct LaneType<CSGD_ISA::Vector<T, kLanes>> {
  using Type = T;
};

}  // namespace csgd
