// SPDX-License-Identifier: Apache-2.0
// Makes one body of code compile for the host and for a GPU, with one arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

// setup.py undoes these flags; this is for any other way to compile.
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "leave out -ffast-math, -Ofast and their parts: they change the bits of a step and let it overlook NaN"
#endif

// Functions are forced inline on the host as well. The CPU loop is compiled once for each instruction set; if these
// functions had out-of-line copies, the linker could keep, say, the AVX-512 copy for every machine.
#if defined(__CUDACC__)
#define CSGD_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define CSGD_HOST_DEVICE inline __attribute__((always_inline))
#else
#define CSGD_HOST_DEVICE inline
#endif

// Before a loop over an array of vectors: unrolled, so that the array is held in registers.
#if defined(__clang__)
#define CSGD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CSGD_UNROLL _Pragma("GCC unroll 8")
#else
#define CSGD_UNROLL
#endif

namespace csgd {

// The bits of a value seen as another type of the same size (std::bit_cast is C++20).
template <class To, class From>
CSGD_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs two types of one size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace csgd
