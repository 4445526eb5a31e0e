// SPDX-License-Identifier: Apache-2.0
// What the operators have in common: dtypes, checks of tensors and options, and memory order.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/params.h"

namespace csgd {

// float32, float64, bfloat16 and float16.
bool is_supported(at::ScalarType dtype);

// The dtype of a tensor, which must be a supported one, as the loops and kernels name it.
DType dtype_of(const at::Tensor& t);

void check_finite(double value, const char* name);

// The options of any calibration.
void check_calibration(double calibration, std::optional<double> lipschitz, double bound_decay,
                       std::string_view rounding);

// An inference tensor can be changed inside torch.inference_mode() only.
bool is_changeable(const at::Tensor& t);

// Raises where it is not; the message names the parameter, and what of it this tensor is.
void check_changeable(const at::Tensor& t, int64_t index, const char* name);

// Raises where one tensor is given twice: a step or bound that two parameters share would be advanced twice, or once
// too early.
void check_unshared(const at::TensorList& tensors, const char* name);

// True where no two elements can share memory.
bool separate_elements(const at::Tensor& t);

// Tells autograd that a tensor was changed in place.
void bump_version(const at::Tensor& t);

// The strides in whose order the elements of a tensor count: its own where it is dense, else row-major ones.
at::DimVector memory_order(const at::Tensor& t);

// Copies of tensors that do not lie in memory in the order in which their elements count.
class OrderedCopies {
 public:
  // `tensor` itself where it lies in memory in this order, else a copy that does. Where `changed`, bring_back() copies
  // the copy back.
  at::Tensor in_order(const at::Tensor& tensor, at::IntArrayRef order, bool changed);

  void bring_back();

 private:
  std::vector<at::Tensor> unchanged_;
  std::vector<std::pair<at::Tensor, at::Tensor>> changed_;  // tensor, copy
};

}  // namespace csgd
