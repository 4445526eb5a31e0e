// SPDX-License-Identifier: Apache-2.0
// Included by KERNEL_kernels.cpp. With CSGD_STORAGE=float (double, BFloat16, Float16) only the kernels for that storage
// type are compiled, and only cases of that dtype run: enough to show a fault that was planted in the kernels' source,
// in a fraction of the time.
#pragma once

#include <tuple>

#include "compare.h"

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

// The three other storage types. A template that is specialized for them before the source that defines it takes the
// place of the instances that the source would have.
template <size_t kNumber>
using LeftOut = std::tuple_element_t<(kNumber + 1 + static_cast<size_t>(kDTypeOf<CSGD_STORAGE>)) % 4,
                                     std::tuple<float, double, BFloat16, Float16>>;
#else
bool is_compiled(DType) { return true; }
#endif

}  // namespace csgd
