// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::csgd_, the step of CSGD.
#include "bindings.h"
#include "python_function.h"
#include "step_operator.h"

namespace csgd {
namespace {

// Without momentum, momentum_buffers is empty. step.h says more of the other arguments.
#define CSGD_ARGUMENTS(POSITIONAL, KEYWORD)                    \
  CSGD_STEP_PARAMS(POSITIONAL)                                 \
  POSITIONAL("Tensor(m!)[]", at::TensorList, momentum_buffers) \
  CSGD_STEP_STATE(POSITIONAL)                                  \
  KEYWORD("float", double, momentum)                           \
  KEYWORD("float", double, dampening)                          \
  KEYWORD("bool", bool, nesterov)                              \
  KEYWORD("bool", bool, fresh_momentum)                        \
  CSGD_STEP_OPTIONS(KEYWORD)
CSGD_DEFINE_ARGUMENTS(CsgdArgs, CSGD_ARGUMENTS);

struct CsgdStep {
  using Args = CsgdArgs;
  using Options = SgdOptions;
  static constexpr const char* kName = "csgd_";

  static StepArgs common(const CsgdArgs& a) {
    return {a, {{"momentum_buffer", a.momentum_buffers, a.momentum != 0, " when momentum is 0"}}};
  }

  // Schedulers may set the momentum to 0 together with nesterov, which the constructor of CSGD refuses.
  static void check(const CsgdArgs& a) {
    check_finite(a.momentum, "momentum");
    check_finite(a.dampening, "dampening");
  }

  static SgdOptions options(const CsgdArgs& a) {
    SgdOptions o{};
    o.momentum = a.momentum;
    o.one_minus_dampening = 1.0 - a.dampening;
    o.nesterov = a.nesterov;
    o.fresh_momentum = a.fresh_momentum;
    return o;
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) { StepOperator<CsgdStep>::define(m); }

void add_csgd(pybind11::module_& m) { PythonFunction<CsgdArgs, void>::add(m, CsgdStep::kName); }

}  // namespace csgd
