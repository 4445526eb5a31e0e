// SPDX-License-Identifier: Apache-2.0
// The argument checks of hard_threshold_. csgd_cuda/thresholding.py checks the same for the reference.
#include <c10/core/InferenceMode.h>

#include "csgd.h"
#include "hard_threshold.h"

namespace csgd {
namespace {

bool fits(const at::Tensor& t, const at::Tensor& param, at::IntArrayRef sizes, at::ScalarType dtype) {
  return t.layout() == at::kStrided && t.sizes() == sizes && t.scalar_type() == dtype && t.device() == param.device();
}

void check_changeable(const at::Tensor& t, size_t i, const char* name) {
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), "parameter ", i, ": ", name,
                    " is an inference tensor, which can be changed inside torch.inference_mode() only: clone() it");
}

void check_param(const at::Tensor& p, size_t i, const HardThresholdArgs& a) {
  const auto dtype = p.scalar_type();
  TORCH_CHECK_VALUE(p.layout() == at::kStrided, "parameter ", i, " has layout ", p.layout(),
                    "; hard_threshold_ needs dense (strided) parameters");
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "parameter ", i, " has dtype ", dtype,
                   "; hard_threshold_ supports float32, float64, bfloat16 and float16");
  TORCH_CHECK_VALUE(p.device() == a.params[0].device(), "parameter ", i, " is on ", p.device(), ", expected ",
                    a.params[0].device(), ", the device of the call's first parameter");
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(p), "parameter ", i,
                    " may overlap itself in memory (an expanded tensor?): clone() it");
  check_changeable(p, i, "the parameter");
  if (a.structure == "filter") {
    TORCH_CHECK_VALUE(p.dim() >= 2, "parameter ", i, " has shape ", p.sizes(),
                      ": structure 'filter' needs two dimensions or more, of which the first counts the filters");
  }
  if (a.structure == "2:4") {
    TORCH_CHECK_VALUE(p.dim() >= 2 && p.size(1) % 4 == 0, "parameter ", i, " has shape ", p.sizes(),
                      ": structure '2:4' needs a dimension 1 that is divisible by 4");
  }
}

void check_companions(const HardThresholdArgs& a, size_t i) {
  const at::Tensor& p = a.params[i];
  if (!a.momentum_buffers.empty()) {
    const at::Tensor& m = a.momentum_buffers[i];
    TORCH_CHECK_VALUE(fits(m, p, p.sizes(), p.scalar_type()), "parameter ", i, ": momentum_buffer has shape ",
                      m.sizes(), ", dtype ", m.scalar_type(), " on ", m.device(), "; expected those of the parameter");
    TORCH_CHECK_VALUE(m.numel() == 0 || separate_elements(m), "parameter ", i,
                      ": momentum_buffer may overlap itself in memory");
    check_changeable(m, i, "momentum_buffer");
  }
  if (!a.masks.empty()) {
    const at::Tensor& m = a.masks[i];
    const at::IntArrayRef sizes = a.structure == "filter" ? p.sizes().slice(0, 1) : p.sizes();
    TORCH_CHECK_VALUE(fits(m, p, sizes, at::kBool), "parameter ", i, ": mask has shape ", m.sizes(), ", dtype ",
                      m.scalar_type(), " on ", m.device(), "; expected shape ", sizes, ", dtype Bool on ", p.device());
    TORCH_CHECK_VALUE(m.numel() == 0 || separate_elements(m), "parameter ", i, ": mask may overlap itself in memory");
    check_changeable(m, i, "mask");
  }
}

void check_keeps(const HardThresholdArgs& a) {
  if (!a.keeps) {
    TORCH_CHECK_VALUE(!a.masks.empty(), "keeps must be given where there are no masks to apply");
    return;
  }
  const size_t expected = a.structure == "2:4" ? 0 : a.across ? 1 : a.params.size();
  TORCH_CHECK_VALUE(a.keeps->size() == expected, "keeps must have ", expected, " entries, got ", a.keeps->size());
  for (const int64_t keep : *a.keeps) TORCH_CHECK_VALUE(keep >= 0, "keeps must be >= 0, got ", keep);
}

}  // namespace

void check_hard_threshold(const HardThresholdArgs& a) {
  TORCH_CHECK_VALUE(a.structure == "element" || a.structure == "filter" || a.structure == "2:4",
                    "structure must be 'element', 'filter' or '2:4', got '", a.structure, "'");
  if (a.params.empty()) return;
  const auto length = [&](size_t got, const char* name) {
    TORCH_CHECK_VALUE(got == 0 || got == a.params.size(), name, " must be empty or have ", a.params.size(),
                      " entries, one for each parameter, got ", got);
  };
  length(a.momentum_buffers.size(), "momentum_buffers");
  length(a.masks.size(), "masks");
  check_keeps(a);
  for (size_t i = 0; i < a.params.size(); ++i) {
    check_param(a.params[i], i, a);
    check_companions(a, i);
    const bool alike = (a.params[i].scalar_type() == at::kDouble) == (a.params[0].scalar_type() == at::kDouble);
    TORCH_CHECK_TYPE(!a.across || a.structure != "element" || alike, "parameter ", i, " has dtype ",
                     a.params[i].scalar_type(), " and parameter 0 ", a.params[0].scalar_type(),
                     ": across tensors all must be float64 or none");
  }
  if (!a.found_inf) return;
  TORCH_CHECK_VALUE(fits(*a.found_inf, a.params[0], a.found_inf->sizes(), at::kFloat) && a.found_inf->numel() == 1,
                    "found_inf must be one Float on ", a.params[0].device(), ", the device of the parameters");
}

}  // namespace csgd
