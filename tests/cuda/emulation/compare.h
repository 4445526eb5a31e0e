// SPDX-License-Identifier: Apache-2.0
// What the programs share that compare a kernel with its CPU loop: which cases run, buffers for any dtype, data that
// resemble gradients, equality.
//
// A program is KERNEL_against_cpu_loop.cpp, compiled once for all faults, and KERNEL_kernels.cpp with the kernels'
// source.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "csrc/core/params.h"
#include "csrc/core/storage.h"

namespace csgd {

// Random numbers by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the generators of <random> take longer than the
// kernels where nothing is optimized.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    state_ += 0x9E3779B97F4A7C15;
    uint64_t z = state_;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }

  // Most values are small, a few large, as those of gradients are: the cube of about a normal one, which is the sum of
  // four uniform ones, 16 bits each.
  double heavy_tailed() {
    const uint64_t bits = (*this)();
    double sum = 0;
    for (int k = 0; k < 4; ++k) sum += static_cast<double>(bits >> 16 * k & 0xFFFF);
    const double x = (sum * 0x1p-16 - 2.0) * 1.7320508;  // of variance 1
    return x * x * x;
  }

 private:
  uint64_t state_;
};

// Whether the program has the kernels for a dtype; compiled.h defines it.
bool is_compiled(DType dtype);

// Whether a case is to run: all, or those that the program's arguments name.
inline bool is_chosen(const char* name, int argc, char** argv) {
  bool chosen = argc < 2;
  for (int k = 1; k < argc; ++k) chosen = chosen || std::strcmp(name, argv[k]) == 0;
  return chosen;
}

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

using Buffer = std::vector<double>;  // of doubles for the alignment; holds any dtype

// The first element, behind the `offset` elements that misalign the data.
inline void* data_of(Buffer& buffer, DType dtype, int offset) {
  return reinterpret_cast<char*>(buffer.data()) + offset * size_of(dtype);
}

template <class S, class F>
void fill(Buffer& to, int64_t numel, int offset, F next_value) {
  to.assign(static_cast<size_t>((numel + offset) * sizeof(S) / sizeof(double) + 2), 0.0);
  S* out = reinterpret_cast<S*>(to.data()) + offset;
  for (int64_t i = 0; i < numel; ++i) {
    out[i] = Storage<S>::store_nearest(static_cast<typename Storage<S>::Opmath>(next_value()));
  }
}

// `numel` values from next_value(), rounded to the dtype; zeros around them.
template <class F>
void fill(DType dtype, Buffer& to, int64_t numel, int offset, F next_value) {
  switch (dtype) {
    case DType::kFloat32: return fill<float>(to, numel, offset, next_value);
    case DType::kFloat64: return fill<double>(to, numel, offset, next_value);
    case DType::kBFloat16: return fill<BFloat16>(to, numel, offset, next_value);
    case DType::kFloat16: return fill<Float16>(to, numel, offset, next_value);
  }
}

// Makes all NaN one: processors disagree about the sign and payload of those that arithmetic makes.
template <class S>
void unite_nans(Buffer& buffer) {
  auto* values = reinterpret_cast<S*>(buffer.data());
  for (size_t i = 0; i < buffer.size() * sizeof(double) / sizeof(S); ++i) {
    if (values[i] != values[i]) values[i] = std::numeric_limits<S>::quiet_NaN();
  }
}

inline void unite_nans(DType dtype, Buffer& buffer) {  // those of 16 bits are stored as one
  if (dtype == DType::kFloat32) unite_nans<float>(buffer);
  if (dtype == DType::kFloat64) unite_nans<double>(buffer);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace csgd
