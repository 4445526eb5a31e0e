// SPDX-License-Identifier: Apache-2.0
// Included by KERNEL_kernels.cpp. With CSGD_STORAGE=float (double, BFloat16, Float16) only the kernels for that storage
// type are compiled, and only cases of that dtype run: enough to show a fault that was planted in the kernels' source,
// in a fraction of the time.
#pragma once

#include "compare.h"
#include "csrc/core/adamw.h"
#include "csrc/core/sgd.h"

namespace csgd {

#ifdef CSGD_STORAGE
template <class S>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
inline constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::kFloat16;

bool is_compiled(DType dtype) { return dtype == kDTypeOf<CSGD_STORAGE>; }

// The kernels' source calls these in place of with_storage() and with_direction(): so it has one kernel for all options
// of a direction, which decides while running, as that of shards does.
template <class F>
auto with_compiled_storage(DType, F f) {
  return f(CSGD_STORAGE{});
}
template <class Rule, class T, class F>
auto with_any_direction(const typename Rule::Options&, F f) {
  return f(Tag<typename Rule::template AnyDirection<T>>{});
}
#define with_storage with_compiled_storage
#define with_direction with_any_direction
#else
bool is_compiled(DType) { return true; }
#endif

}  // namespace csgd
