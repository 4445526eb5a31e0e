// SPDX-License-Identifier: Apache-2.0
// What the comparisons of a kernel with its CPU loop share: buffers for any dtype, gradient-like data, equality.
#pragma once

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../../csrc/core/params.h"
#include "../../../csrc/core/storage.h"

namespace csgd {

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

// Makes all NaN one: processors disagree about their signs and payloads.
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

// Most values small, a few large, as those of gradients.
inline double heavy_tailed(std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const double x = normal(random);
  return x * x * x;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace csgd
