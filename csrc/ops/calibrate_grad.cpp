// SPDX-License-Identifier: Apache-2.0
// The checks and the packing of calibrate_grad. csgd_cuda/gradient.py checks the same for the reference.
#include "calibrate_grad.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

#include "csgd.h"
#include "dtype.h"

namespace csgd {
namespace {

void check_options(const CalibrateGradArgs& a) {
  check_not_negative(a.calibration, "calibration");
  if (a.lipschitz) check_not_negative(*a.lipschitz, "lipschitz");
  TORCH_CHECK_VALUE(a.bound_decay >= 0 && a.bound_decay <= 1, "bound_decay must be in [0, 1], got ", a.bound_decay);
  TORCH_CHECK_VALUE(a.rounding == "stochastic" || a.rounding == "nearest",
                    "rounding must be 'stochastic' or 'nearest', got '", a.rounding, "'");
  TORCH_CHECK_VALUE(a.rank >= 0 && a.rank < kMostRanks, "rank must be in 0 ... ", kMostRanks - 1, ", got ", a.rank);
  TORCH_CHECK_VALUE(a.lipschitz.has_value() != a.lipschitz_bound.has_value(),
                    "lipschitz_bound must be given where lipschitz is not, and only there");
}

// A tensor that is read or changed in place beside the gradient.
void check_state(const at::Tensor& t, const at::Tensor& grad, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.device() == grad.device() && t.is_contiguous(), name,
                    " must be a contiguous ", dtype, " tensor on ", grad.device(), ", the device of the gradient, got ",
                    t.scalar_type(), " on ", t.device());
  TORCH_CHECK_VALUE(!t.is_inference() || c10::InferenceMode::is_enabled(), name,
                    " is an inference tensor, which can be changed inside torch.inference_mode() only");
}

// The channels' dimension of the gradient, from 0 on; -1 with a bound for all.
int64_t channel_dim_of(const CalibrateGradArgs& a) {
  if (!a.lipschitz_bound || a.lipschitz_bound->dim() == 0) return -1;
  const int64_t dims = a.grad.dim();
  TORCH_CHECK_VALUE(a.channel_dim >= -dims && a.channel_dim < dims, "channel_dim ", a.channel_dim,
                    " is not a dimension of the gradient, which has shape ", a.grad.sizes());
  return a.channel_dim < 0 ? a.channel_dim + dims : a.channel_dim;
}

// The strides in whose order the elements of a gradient count; those of the result, too.
std::vector<int64_t> memory_order(const at::Tensor& grad) {
  if (grad.is_non_overlapping_and_dense()) return grad.strides().vec();
  return at::empty(grad.sizes(), at::TensorOptions().device(at::kMeta)).strides().vec();  // row-major
}

}  // namespace

void check_calibrate_grad(const CalibrateGradArgs& a) {
  check_options(a);
  TORCH_CHECK_TYPE(a.grad.layout() == at::kStrided, "the gradient is sparse (", a.grad.layout(),
                   "), calibrate_grad needs a dense one");
  const auto dtype = a.grad.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "the gradient has dtype ", dtype,
                   "; calibrate_grad supports float32, float64, bfloat16 and float16");
  check_state(a.index, a.grad, "index", at::kLong);
  check_state(a.step, a.grad, "step", at::kLong);
  TORCH_CHECK_VALUE(a.index.numel() == 1 && a.step.numel() == 1, "index and step must have one element each, got ",
                    a.index.numel(), " and ", a.step.numel());
  const int64_t channel_dim = channel_dim_of(a);
  const int64_t channels = channel_dim < 0 ? 1 : a.grad.size(channel_dim);
  if (a.lipschitz_bound) {
    check_state(*a.lipschitz_bound, a.grad, "lipschitz_bound", at::kDouble);
    TORCH_CHECK_VALUE(a.lipschitz_bound->dim() <= 1 && a.lipschitz_bound->numel() == channels,
                      "lipschitz_bound has shape ", a.lipschitz_bound->sizes(), ", expected ", channels,
                      " entries, one for each channel of the gradient of shape ", a.grad.sizes());
  }
  if (a.tally) {
    check_state(*a.tally, a.grad, "tally", at::kLong);
    TORCH_CHECK_VALUE(a.tally->numel() == kCalibrationTallyWords + channels, "tally must have ",
                      kCalibrationTallyWords + channels, " entries, ", kCalibrationTallyWords,
                      " and one for each channel, got ", a.tally->numel());
  }
}

at::Tensor run_calibrate_grad(const CalibrateGradArgs& a, RunCalibrateGrad run) {
  check_calibrate_grad(a);
  const at::NoGradGuard no_grad;  // for the copy of what is not dense
  const std::vector<int64_t> strides = memory_order(a.grad);
  at::Tensor out = at::empty_strided(a.grad.sizes(), strides, a.grad.options());
  const bool dense = a.grad.is_non_overlapping_and_dense();
  const at::Tensor grad = dense ? a.grad : at::empty_like(out).copy_(a.grad);
  const int64_t channel_dim = channel_dim_of(a);
  CalibrateGradCall call{};
  call.grad = grad.const_data_ptr();
  call.out = out.data_ptr();
  call.index = a.index.const_data_ptr<int64_t>();
  call.step = a.step.data_ptr<int64_t>();
  call.bounds = a.lipschitz_bound ? a.lipschitz_bound->data_ptr<double>() : nullptr;
  if (a.tally) call.tally = reinterpret_cast<CalibrationTally*>(a.tally->data_ptr<int64_t>());
  call.numel = grad.numel();
  call.channels = channel_dim < 0 ? 1 : grad.size(channel_dim);
  call.inner = channel_dim < 0 ? 1 : std::max<int64_t>(strides[static_cast<size_t>(channel_dim)], 1);
  call.calibration = a.calibration;
  call.lipschitz = a.lipschitz.value_or(0.0);
  call.bound_decay = a.bound_decay;
  call.seed = static_cast<uint64_t>(a.seed);
  call.rank = static_cast<uint32_t>(a.rank);
  call.stochastic_rounding = a.rounding == "stochastic";
  run(dtype_of(grad), call, grad.device());
  for (const at::Tensor* changed :
       {&a.step, a.lipschitz_bound ? &*a.lipschitz_bound : nullptr, a.tally ? &*a.tally : nullptr}) {
    if (changed != nullptr && !changed->is_inference()) changed->unsafeGetTensorImpl()->bump_version();
  }
  return out;
}

void calibrate_grad_nowhere(DType, const CalibrateGradCall&, c10::Device device) {
  TORCH_CHECK(false, "calibrate_grad has no kernel for tensors on ", device,
              " in this build; see csgd_cuda.show_config()");
}

}  // namespace csgd
