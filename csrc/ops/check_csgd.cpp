// SPDX-License-Identifier: Apache-2.0
// The argument checks of csgd_. They run before anything is changed, and say which parameter is wrong, how, and
// what was expected. csgd_cuda/checks.py says the same for the pure-PyTorch reference.
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>

#include "csgd.h"

namespace csgd {
namespace {

void check_finite(double value, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " must be a finite number, got ", value);
}

void check_options(const CsgdArgs& a) {
  // Schedulers take lr a rounding error below 0, and the momentum to 0 under nesterov: CSGD's constructor refuses
  // such options, a step does not.
  check_finite(a.lr, "lr");
  check_finite(a.momentum, "momentum");
  check_finite(a.dampening, "dampening");
  check_finite(a.weight_decay, "weight_decay");
  check_not_negative(a.calibration, "calibration");
  if (a.lipschitz) check_not_negative(*a.lipschitz, "lipschitz");
  TORCH_CHECK_VALUE(a.bound_decay >= 0 && a.bound_decay <= 1, "bound_decay must be in [0, 1], got ", a.bound_decay);
  TORCH_CHECK_VALUE(a.rounding == "stochastic" || a.rounding == "nearest",
                    "rounding must be 'stochastic' or 'nearest', got '", a.rounding, "'");
}

void check_list_lengths(const CsgdArgs& a) {
  const auto length = [&](size_t got, bool used, const char* name, const char* when_unused) {
    const size_t expected = used ? a.params.size() : 0;
    TORCH_CHECK_VALUE(got == expected, name, " must have ", expected, " entries",
                      used ? ", one for each parameter" : when_unused, ", got ", got);
  };
  length(a.grads.size(), true, "grads", "");
  length(a.momentum_buffers.size(), a.momentum != 0, "momentum_buffers", " when momentum is 0");
  length(a.steps.size(), true, "steps", "");
  length(a.lipschitz_bounds.size(), !a.lipschitz, "lipschitz_bounds", " when lipschitz is fixed");
  length(a.indices.size(), true, "indices", "");
}

// One strided tensor that belongs to the whole call.
void check_usable(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
}

void check_changeable(const at::Tensor& t, int64_t index, const char* name) {
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), "parameter ", index, ": ", name,
                    " is an inference tensor, which can be changed inside torch.inference_mode() only: clone() it");
}

void check_param(const at::Tensor& p, int64_t index, c10::Device device) {
  TORCH_CHECK_VALUE(index >= 0 && index <= 0xFFFFFFFF, "indices: ", index, " is not a parameter index (0 ... 2^32-1)");
  TORCH_CHECK_VALUE(p.layout() == at::kStrided, "parameter ", index, " has layout ", p.layout(),
                    "; CSGD needs dense (strided) parameters");
  TORCH_CHECK_TYPE(!p.is_complex(), "parameter ", index, " is complex (", p.scalar_type(),
                   "); CSGD does not support complex parameters: pass torch.view_as_real(parameter) instead");
  const auto dtype = p.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "parameter ", index, " has dtype ", dtype, "; CSGD supports float32, float64, bfloat16 and float16");
  TORCH_CHECK_VALUE(p.device() == device, "parameter ", index, " is on ", p.device(), ", expected ", device,
                    ", the device of the call's first parameter");
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(p), "parameter ", index,
                    " may overlap itself in memory (an expanded tensor?): clone() it before optimizing it");
  check_changeable(p, index, "the parameter");
}

constexpr const char* kHowToConvertState =
    " (if the parameter was converted, optimizer.load_state_dict(optimizer.state_dict()) converts the state)";
constexpr const char* kHowToConvertGradient = " (a param.grad_dtype of another dtype is not supported)";

// A tensor of the parameter's own shape and dtype: its gradient or its momentum buffer.
void check_companion(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name, const char* advice) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "parameter ", index, ": ", name, " is sparse (", t.layout(),
                   "), CSGD needs a dense one: use sparse=False in the layer, or ", name, ".to_dense()");
  TORCH_CHECK_VALUE(t.sizes() == p.sizes(), "parameter ", index, ": ", name, " has shape ", t.sizes(), ", expected ",
                    p.sizes(), " as the parameter");
  TORCH_CHECK_TYPE(t.scalar_type() == p.scalar_type(), "parameter ", index, ": ", name, " has dtype ", t.scalar_type(),
                   ", expected ", p.scalar_type(), " as the parameter", advice);
  TORCH_CHECK_VALUE(t.device() == p.device(), "parameter ", index, ": ", name, " is on ", t.device(), ", expected ",
                    p.device(), " as the parameter");
}

// A scalar that the step reads or writes in place.
void check_scalar(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.numel() == 1 && t.scalar_type() == dtype && t.device() == p.device(), "parameter ", index, ": ",
                    name, " must be one ", dtype, " on ", p.device(), ", got ", t.numel(), " x ", t.scalar_type(),
                    " on ", t.device(), kHowToConvertState);
  check_changeable(t, index, name);
}

// A step or bound that two parameters share would be advanced twice, or once too early.
void check_unshared(const at::TensorList& tensors, const char* name) {
  std::vector<const void*> seen;
  seen.reserve(tensors.size());
  for (const at::Tensor& t : tensors) seen.push_back(t.unsafeGetTensorImpl());
  std::sort(seen.begin(), seen.end());
  TORCH_CHECK_VALUE(std::adjacent_find(seen.begin(), seen.end()) == seen.end(), name,
                    " must be a tensor of its own for each parameter; one is given twice");
}

void check_tensors(const CsgdArgs& a) {
  for (size_t i = 0; i < a.params.size(); ++i) {
    const at::Tensor& p = a.params[i];
    const int64_t index = a.indices[i];
    check_param(p, index, a.params[0].device());
    check_companion(a.grads[i], p, index, "gradient", kHowToConvertGradient);
    if (!a.momentum_buffers.empty()) {
      check_companion(a.momentum_buffers[i], p, index, "momentum_buffer", kHowToConvertState);
      TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(a.momentum_buffers[i]), "parameter ", index,
                        ": momentum_buffer may overlap itself in memory");
      check_changeable(a.momentum_buffers[i], index, "momentum_buffer");
    }
    check_scalar(a.steps[i], p, index, "step", at::kLong);
    const auto opmath = p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (!a.lipschitz) check_scalar(a.lipschitz_bounds[i], p, index, "lipschitz_bound", opmath);
  }
}

void check_optional_tensors(const CsgdArgs& a) {
  const auto device = a.params[0].device();
  if (a.lr_tensor) {
    const at::Tensor& lr = *a.lr_tensor;
    check_usable(lr, "lr");
    TORCH_CHECK_VALUE(lr.numel() == 1, "lr must be a number or a tensor with one element, got ", lr.numel());
    TORCH_CHECK_TYPE(lr.scalar_type() == at::kFloat || lr.scalar_type() == at::kDouble,
                     "lr as a tensor must be float32 or float64, got ", lr.scalar_type());
    TORCH_CHECK_VALUE(lr.device() == device || lr.is_cpu(), "lr is a tensor on ", lr.device(), ", expected ", device,
                      " as the parameters, or the CPU");
    if (lr.is_cpu()) check_finite(lr.item<double>(), "lr");
  }
  const auto amp_scalar = [&](const std::optional<at::Tensor>& t, const char* name) {
    if (t) check_usable(*t, name);
    TORCH_CHECK_VALUE(!t || (t->numel() == 1 && t->scalar_type() == at::kFloat && t->device() == device), name,
                      " must be one Float on ", device, ", the device of the parameters");
  };
  amp_scalar(a.grad_scale, "grad_scale");
  amp_scalar(a.found_inf, "found_inf");
  if (a.tallies) {
    const auto [least, largest] = std::minmax_element(a.indices.begin(), a.indices.end());
    const int64_t needed = *largest - a.indices[0] + 1;
    TORCH_CHECK_VALUE(*least == a.indices[0], "indices: with tallies the first must be the smallest, got ",
                      a.indices[0], " and ", *least);
    const at::Tensor& t = *a.tallies;
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == kTallyWords && t.is_contiguous() && t.scalar_type() == at::kLong &&
                          t.device() == device && t.size(0) >= needed,
                      "tallies must be a contiguous Long tensor on ", device, " of shape (K, ", kTallyWords,
                      ") with K >= ", needed, ", a row for each parameter index from that of the first parameter on");
  }
}

// Runs that overlap would draw the same numbers twice.
void check_shards(const CsgdArgs& a) {
  if (a.shards.empty()) return;
  TORCH_CHECK_VALUE(a.shards.size() == a.params.size() * kShardNumbers, "shards must be empty or have ", kShardNumbers,
                    " numbers for each parameter, got ", a.shards.size(), " for ", a.params.size(), " parameters");
  for (size_t i = 0; i < a.params.size(); ++i) {
    const int64_t* n = a.shards.data() + i * kShardNumbers;
    const int64_t offset = n[0], length = n[1], stride = n[2], runs = n[3], group_stride = n[4];
    const bool whole = length == 0;
    TORCH_CHECK_VALUE(whole || (offset >= 0 && length > 0 && runs > 0 && (runs == 1 || stride >= length) &&
                                group_stride >= (runs - 1) * stride + length),
                      "parameter ", a.indices[i], ": shards has offset ", offset, ", run length ", length,
                      ", run stride ", stride, ", runs ", runs, ", group stride ", group_stride,
                      "; expected runs that do not overlap, and a run length of 0 for a whole parameter");
  }
}

}  // namespace

// Sorted by stride, each dimension steps over all smaller ones.
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

void check_not_negative(double value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), name, " must be a finite number >= 0, got ", value);
}

void check_csgd_args(const CsgdArgs& args) {
  check_options(args);
  check_list_lengths(args);
  if (args.params.empty()) return;
  check_tensors(args);
  check_shards(args);
  check_unshared(args.steps, "steps");
  check_unshared(args.lipschitz_bounds, "lipschitz_bounds");
  check_optional_tensors(args);
}

}  // namespace csgd
