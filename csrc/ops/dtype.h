// SPDX-License-Identifier: Apache-2.0
// torch's dtypes as those of the loops and kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "../core/params.h"

namespace csgd {

// Of a tensor that was checked to have one of the four.
inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

}  // namespace csgd
