// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::calibrated_adamw_, the step of CalibratedAdamW.
#include "bindings.h"
#include "python_function.h"
#include "step_operator.h"

namespace csgd {
namespace {

// step.h says more of the other arguments.
#define CSGD_ADAMW_ARGUMENTS(POSITIONAL, KEYWORD)         \
  CSGD_STEP_PARAMS(POSITIONAL)                            \
  POSITIONAL("Tensor(m!)[]", at::TensorList, exp_avgs)    \
  POSITIONAL("Tensor(v!)[]", at::TensorList, exp_avg_sqs) \
  CSGD_STEP_STATE(POSITIONAL)                             \
  KEYWORD("float[]", at::ArrayRef<double>, betas)         \
  KEYWORD("float", double, eps)                           \
  CSGD_STEP_OPTIONS(KEYWORD)
CSGD_DEFINE_ARGUMENTS(AdamWArgs, CSGD_ADAMW_ARGUMENTS);

struct AdamWStep {
  using Args = AdamWArgs;
  using Options = AdamWOptions;
  static constexpr const char* kName = "calibrated_adamw_";

  static StepArgs common(const AdamWArgs& a) {
    return {a, {{"exp_avg", a.exp_avgs, true, ""}, {"exp_avg_sq", a.exp_avg_sqs, true, ""}}};
  }

  static void check(const AdamWArgs& a) {
    TORCH_CHECK_VALUE(a.betas.size() == 2, "betas must be two numbers, got ", a.betas.size());
    for (const double beta : a.betas) {
      TORCH_CHECK_VALUE(beta >= 0 && beta < 1, "betas must be two numbers in [0, 1), got ", beta, " among them");
    }
    check_not_negative(a.eps, "eps");
  }

  static AdamWOptions options(const AdamWArgs& a) {
    AdamWOptions o{};
    o.beta1 = a.betas[0];
    o.beta2 = a.betas[1];
    o.eps = a.eps;
    return o;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) { StepOperator<AdamWStep>::define(m); }

void add_adamw(pybind11::module_& m) { PythonFunction<AdamWArgs, void>::add(m, AdamWStep::kName); }

}  // namespace csgd
