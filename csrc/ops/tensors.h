// SPDX-License-Identifier: Apache-2.0
// What the operators share: dtypes, checks of tensors and options, and memory order.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/DimVector.h>

#include <deque>
#include <initializer_list>
#include <optional>
#include <string_view>

#include "../core/params.h"

namespace csgd {

// Whether it is float32, float64, bfloat16 or float16.
bool is_supported(at::ScalarType dtype);

// The dtype of a tensor as the loops and kernels name it. Raises TypeError for one that is not supported.
DType dtype_of(const at::Tensor& t);

void check_finite(double value, const char* name);
void check_not_negative(double value, const char* name);

// Checks the options that every calibration has.
void check_calibration(double calibration, std::optional<double> lipschitz, double bound_decay,
                       std::string_view rounding);

// Whether a tensor can be changed: an inference tensor only inside torch.inference_mode().
inline bool is_changeable(const at::Tensor& t) { return !t.is_inference() || c10::InferenceMode::is_enabled(); }

// Raises ValueError where it cannot be changed. The message names the parameter, and says what this tensor is of it.
void check_changeable(const at::Tensor& t, int64_t index, const char* name);

// Raises ValueError where a tensor is given twice: a step or bound that two parameters share would be advanced twice,
// or too early.
void check_unshared(const at::TensorList& tensors, const char* name);

// True where no two elements can share memory.
bool separate_elements(const at::Tensor& t);

// The tensor as a list of one; an empty list where there is none.
at::TensorList list_of(const std::optional<at::Tensor>& t);

// Tells autograd that the tensors of all these lists were changed in place.
void bump_versions(std::initializer_list<at::TensorList> changed);

// The strides that give the order in which the elements of a tensor count: its own where it is dense, else row-major.
at::DimVector memory_order(const at::Tensor& t);

// Copies of the tensors whose elements do not lie in memory in the order in which they count.
class OrderedCopies {
 public:
  // Returns `tensor` itself where it lies in memory in this order, else a copy that does, which this object owns. With
  // `changed`, bring_back() writes the copy to the tensor.
  const at::Tensor& in_order(const at::Tensor& tensor, at::IntArrayRef order, bool changed);

  void bring_back();

 private:
  struct Copy {
    at::Tensor changed;  // undefined where the copy was only read
    at::Tensor copy;
  };
  std::deque<Copy> copies_;  // references to its elements stay valid as it grows
};

}  // namespace csgd
