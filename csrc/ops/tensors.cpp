// SPDX-License-Identifier: Apache-2.0
#include "tensors.h"

#include <c10/util/strides.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <optional>

namespace csgd {
namespace {

std::optional<DType> find_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return std::nullopt;
  }
}

bool lies_in_order(const at::Tensor& t, at::IntArrayRef order) {
  for (int64_t k = 0; k < t.dim(); ++k) {
    if (t.size(k) > 1 && t.stride(k) != order[static_cast<size_t>(k)]) return false;
  }
  return true;
}

}  // namespace

bool is_supported(at::ScalarType dtype) { return find_dtype(dtype).has_value(); }

DType dtype_of(const at::Tensor& t) {
  const std::optional<DType> dtype = find_dtype(t.scalar_type());
  TORCH_CHECK_TYPE(dtype.has_value(), "csgd_cuda has no kernels for ", t.scalar_type());
  return *dtype;
}

void check_finite(double value, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " must be a finite number, got ", value);
}

void check_not_negative(double value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), name, " must be a finite number >= 0, got ", value);
}

void check_calibration(double calibration, std::optional<double> lipschitz, double bound_decay,
                       std::string_view rounding) {
  check_not_negative(calibration, "calibration");
  if (lipschitz) check_not_negative(*lipschitz, "lipschitz");
  TORCH_CHECK_VALUE(bound_decay >= 0 && bound_decay <= 1, "bound_decay must be in [0, 1], got ", bound_decay);
  TORCH_CHECK_VALUE(rounding == "stochastic" || rounding == "nearest",
                    "rounding must be 'stochastic' or 'nearest', got '", rounding, "'");
}

void check_changeable(const at::Tensor& t, int64_t index, const char* name) {
  TORCH_CHECK_VALUE(is_changeable(t), "parameter ", index, ": ", name,
                    " is an inference tensor, which can be changed inside torch.inference_mode() only: clone() it");
}

void check_unshared(const at::TensorList& tensors, const char* name) {
  // A hash table with open addressing, since all tensors of each step are looked up here.
  size_t size = 16;
  while (size < 2 * tensors.size()) size *= 2;
  std::vector<const void*> seen(size, nullptr);
  for (const at::Tensor& t : tensors) {
    const void* tensor = t.unsafeGetTensorImpl();
    size_t place = std::hash<const void*>()(tensor) / alignof(std::max_align_t) % size;
    while (seen[place] != nullptr && seen[place] != tensor) place = (place + 1) % size;
    TORCH_CHECK_VALUE(seen[place] == nullptr, name,
                      " must be a tensor of its own for each parameter; one is given twice");
    seen[place] = tensor;
  }
}

// Elements are separate if each dimension, sorted by stride, steps over all smaller ones.
bool separate_elements(const at::Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t k = 0; k < t.dim(); ++k) {
    if (t.size(k) > 1) dims.emplace_back(t.stride(k), t.size(k));
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= extent) return false;
    extent += stride * (size - 1);
  }
  return true;
}

at::TensorList list_of(const std::optional<at::Tensor>& t) { return t ? at::TensorList(*t) : at::TensorList(); }

void bump_versions(std::initializer_list<at::TensorList> changed) {
  for (const at::TensorList& list : changed) {
    for (const at::Tensor& t : list) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    }
  }
}

at::DimVector memory_order(const at::Tensor& t) {
  if (t.is_non_overlapping_and_dense()) return at::DimVector(t.strides());
  return c10::contiguous_strides(t.sizes());
}

const at::Tensor& OrderedCopies::in_order(const at::Tensor& tensor, at::IntArrayRef order, bool changed) {
  if (lies_in_order(tensor, order) || tensor.numel() == 0) return tensor;
  at::Tensor copy = tensor.new_empty_strided(tensor.sizes(), order).copy_(tensor);
  return copies_.emplace_back(Copy{changed ? tensor : at::Tensor(), std::move(copy)}).copy;
}

void OrderedCopies::bring_back() {
  for (const auto& [changed, copy] : copies_) {
    if (changed.defined()) changed.copy_(copy);
  }
}

}  // namespace csgd
