// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::calibrate_grad: a gradient in, its calibration out. csgd_cuda.calibrate_grad documents it.
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "../core/params.h"
#include "../cpu/calibrate_grad_cpu.h"
#include "arguments.h"
#include "bindings.h"
#include "parallel.h"
#include "python_function.h"
#include "tensors.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/calibrate_grad_cuda.h"
#endif

namespace csgd {
namespace {

constexpr int64_t kMostRanks = 1 << 16;
constexpr int64_t kCalibrationTallyWords = sizeof(CalibrationTally) / sizeof(int64_t);

// `seed` has the bits of an unsigned 64-bit number.
#define CSGD_CALIBRATE_GRAD_ARGUMENTS(POSITIONAL, KEYWORD)                     \
  POSITIONAL("Tensor", const at::Tensor&, grad)                                \
  POSITIONAL("Tensor", const at::Tensor&, index)                               \
  POSITIONAL("Tensor(a!)", const at::Tensor&, step)                            \
  POSITIONAL("Tensor(b!)?", const std::optional<at::Tensor>&, lipschitz_bound) \
  POSITIONAL("Tensor(c!)?", const std::optional<at::Tensor>&, tally)           \
  KEYWORD("int", int64_t, channel_dim)                                         \
  KEYWORD("float", double, calibration)                                        \
  KEYWORD("float?", std::optional<double>, lipschitz)                          \
  KEYWORD("float", double, bound_decay)                                        \
  KEYWORD("str", std::string_view, rounding)                                   \
  KEYWORD("int", int64_t, seed)                                                \
  KEYWORD("int", int64_t, rank)
CSGD_DEFINE_ARGUMENTS(CalibrateGradArgs, CSGD_CALIBRATE_GRAD_ARGUMENTS);

// The checks. csgd_cuda/layers/functional.py has the same for the reference.

void check_options(const CalibrateGradArgs& a) {
  check_calibration(a.calibration, a.lipschitz, a.bound_decay, a.rounding);
  TORCH_CHECK_VALUE(a.rank >= 0 && a.rank < kMostRanks, "rank must be in 0 ... ", kMostRanks - 1, ", got ", a.rank);
  TORCH_CHECK_VALUE(a.lipschitz.has_value() != a.lipschitz_bound.has_value(),
                    "lipschitz_bound must be given where lipschitz is not, and only there");
}

// Checks a tensor beside the gradient that is read or changed in place.
void check_state(const at::Tensor& t, const at::Tensor& grad, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.device() == grad.device() && t.is_contiguous(), name,
                    " must be a contiguous ", dtype, " tensor on ", grad.device(), ", the device of the gradient, got ",
                    t.scalar_type(), " on ", t.device());
  TORCH_CHECK_VALUE(is_changeable(t), name,
                    " is an inference tensor, which can be changed inside torch.inference_mode() only");
}

// The dimension of the gradient that counts the channels, from 0 on; -1 where there is one bound for all elements.
int64_t channel_dim_of(const CalibrateGradArgs& a) {
  if (!a.lipschitz_bound || a.lipschitz_bound->dim() == 0) return -1;
  const int64_t dims = a.grad.dim();
  TORCH_CHECK_VALUE(a.channel_dim >= -dims && a.channel_dim < dims, "channel_dim ", a.channel_dim,
                    " is not a dimension of the gradient, which has shape ", a.grad.sizes());
  return a.channel_dim < 0 ? a.channel_dim + dims : a.channel_dim;
}

// Checks everything that can be wrong with the arguments, before anything is changed.
void check_all(const CalibrateGradArgs& a) {
  check_options(a);
  TORCH_CHECK_TYPE(a.grad.layout() == at::kStrided, "the gradient is sparse (", a.grad.layout(),
                   "), calibrate_grad needs a dense one");
  const auto dtype = a.grad.scalar_type();
  TORCH_CHECK_TYPE(is_supported(dtype), "the gradient has dtype ", dtype,
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

// On the CPU: torch's threads divide the gradient between them.
void run_cpu(DType dtype, const CalibrateGradCall& call, const at::Tensor&) {
  const auto channels = static_cast<size_t>(call.channels);
  std::vector<double> scales(channels);  // room for numbers of either type of opmath
  calibrate_grad_scales(dtype, call, scales.data());
  std::vector<int64_t> largest_bits(channels, 0);
  int64_t moved = 0;
  std::mutex results;
  const CalibrateGradFunction calibrate = calibrate_grad_function(dtype);
  const auto run_grains = [&](int64_t first, int64_t last) {
    std::vector<int64_t> own_largest(channels, 0);
    const int64_t own_moved = calibrate(call, scales.data(), first * kCalibrateGradGrain,
                                        std::min(last * kCalibrateGradGrain, call.numel), own_largest.data());
    const std::lock_guard<std::mutex> lock(results);
    moved += own_moved;
    for (size_t c = 0; c < channels; ++c) largest_bits[c] = std::max(largest_bits[c], own_largest[c]);
  };
  parallel_for(0, (call.numel + kCalibrateGradGrain - 1) / kCalibrateGradGrain, 2, run_grains);
  calibrate_grad_finish(dtype, call, moved, largest_bits.data());
}

#if CSGD_WITH_CUDA
// On CUDA: one launch, on torch's current stream.
void run_cuda(DType dtype, const CalibrateGradCall& given, const at::Tensor& grad) {
  const c10::cuda::CUDAGuard guard(grad.device());
  CalibrateGradCall call = given;
  at::Tensor own_tally;  // freed in stream order, after the kernel
  if (call.tally == nullptr) {
    own_tally = grad.new_zeros({kCalibrationTallyWords + call.channels}, at::kLong);
    call.tally = reinterpret_cast<CalibrationTally*>(own_tally.data_ptr<int64_t>());
  }
  C10_CUDA_CHECK(launch_calibrate_grad_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
}
#endif

void run_nowhere(DType, const CalibrateGradCall&, const at::Tensor& grad) {
  TORCH_CHECK(false, "calibrate_grad has no kernel for tensors on ", grad.device(),
              " in this build; see csgd_cuda.show_config()");
}

// The operator on one device: checks the arguments, packs them, runs; returns the calibrated gradient.
template <void (*run)(DType, const CalibrateGradCall&, const at::Tensor&)>
at::Tensor calibrate_grad(const CalibrateGradArgs& a) {
  check_all(a);
  const at::NoGradGuard no_grad;  // for the copy of a gradient that is not dense
  const at::DimVector order = memory_order(a.grad);
  OrderedCopies copies;
  const at::Tensor& grad = copies.in_order(a.grad, order, false);
  at::Tensor out = a.grad.new_empty_strided(a.grad.sizes(), order);
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
  call.inner = channel_dim < 0 ? 1 : std::max<int64_t>(order[static_cast<size_t>(channel_dim)], 1);
  call.calibration = a.calibration;
  call.lipschitz = a.lipschitz.value_or(0.0);
  call.bound_decay = a.bound_decay;
  call.seed = static_cast<uint64_t>(a.seed);
  call.rank = static_cast<uint32_t>(a.rank);
  call.stochastic_rounding = a.rounding == "stochastic";
  run(dtype_of(grad), call, grad);
  bump_versions({a.step, list_of(a.lipschitz_bound), list_of(a.tally)});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) {
  m.def(schema<CalibrateGradArgs>("calibrate_grad", "Tensor").c_str(),
        {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
}

// It has no gradient: csgd_cuda/layers/module.py raises an error where one would be needed.
TORCH_LIBRARY_IMPL(csgd_cuda, Autograd, m) { m.impl("calibrate_grad", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { m.impl("calibrate_grad", unboxed<CalibrateGradArgs, calibrate_grad<run_cpu>>); }

#if CSGD_WITH_CUDA
TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) {
  m.impl("calibrate_grad", unboxed<CalibrateGradArgs, calibrate_grad<run_cuda>>);
}
#endif

TORCH_LIBRARY_IMPL(csgd_cuda, CompositeExplicitAutograd, m) {
  m.impl("calibrate_grad", unboxed<CalibrateGradArgs, calibrate_grad<run_nowhere>>);
}

void add_calibrate_grad(pybind11::module_& m) {
  PythonFunction<CalibrateGradArgs, at::Tensor>::add(m, "calibrate_grad");
}

}  // namespace csgd
