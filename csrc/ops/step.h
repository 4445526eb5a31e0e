// SPDX-License-Identifier: Apache-2.0
// What the operators csgd_ and calibrated_adamw_ share: their arguments but those of a direction, the checks, and the
// packing into the plain structs of csrc/core. step_operator.h makes an operator of these.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../core/params.h"
#include "arguments.h"
#include "tensors.h"

namespace csgd {

constexpr int64_t kTallyWords = sizeof(StepTally) / sizeof(int64_t);
constexpr int64_t kShardNumbers = sizeof(ShardLayout) / sizeof(int64_t);

// The arguments that all steps have, in the lists of arguments.h. The buffers of a direction come behind `grads`, its
// options before those below. With a fixed Lipschitz constant, lipschitz_bounds is empty. `shards` has kShardNumbers
// numbers for each parameter, as in ShardLayout; it is empty where all parameters are whole. `seed` has the bits of an
// unsigned 64-bit number. With `check_only` nothing is changed: a caller that makes several calls checks them all
// before the first one. csgd_cuda.csgd_ documents the others.
#define CSGD_STEP_PARAMS(POSITIONAL)                 \
  POSITIONAL("Tensor(a!)[]", at::TensorList, params) \
  POSITIONAL("Tensor[]", at::TensorList, grads)
#define CSGD_STEP_STATE(POSITIONAL)                            \
  POSITIONAL("Tensor(s!)[]", at::TensorList, steps)            \
  POSITIONAL("Tensor(l!)[]", at::TensorList, lipschitz_bounds) \
  POSITIONAL("int[]", at::IntArrayRef, indices)                \
  POSITIONAL("int[]", at::IntArrayRef, shards)
#define CSGD_STEP_OPTIONS(KEYWORD)                                  \
  KEYWORD("float", double, lr)                                      \
  KEYWORD("float", double, weight_decay)                            \
  KEYWORD("float", double, calibration)                             \
  KEYWORD("float?", std::optional<double>, lipschitz)               \
  KEYWORD("float", double, bound_decay)                             \
  KEYWORD("str", std::string_view, rounding)                        \
  KEYWORD("int", int64_t, seed)                                     \
  KEYWORD("bool", bool, maximize)                                   \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, lr_tensor)   \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, grad_scale)  \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, found_inf)   \
  KEYWORD("Tensor(t!)?", const std::optional<at::Tensor>&, tallies) \
  KEYWORD("bool", bool, check_only)

// One buffer of all parameters.
struct BufferList {
  const char* name;  // in the state of a parameter
  at::TensorList tensors;
  bool used;                // whether the options need it; else the list is empty
  const char* when_unused;  // says of which options
};

struct StepArgs {
  at::TensorList params, grads;
  c10::SmallVector<BufferList, kMostBuffers> buffers;
  at::TensorList steps, lipschitz_bounds;
  at::IntArrayRef indices, shards;
  double lr, weight_decay, calibration;
  std::optional<double> lipschitz;
  double bound_decay;
  std::string_view rounding;
  int64_t seed;
  bool maximize;
  const std::optional<at::Tensor>&lr_tensor, &grad_scale, &found_inf, &tallies;
  bool check_only;

  // Args: the arguments of an operator.
  template <class Args>
  StepArgs(const Args& a, std::initializer_list<BufferList> lists)
      : params(a.params),
        grads(a.grads),
        buffers(lists),
        steps(a.steps),
        lipschitz_bounds(a.lipschitz_bounds),
        indices(a.indices),
        shards(a.shards),
        lr(a.lr),
        weight_decay(a.weight_decay),
        calibration(a.calibration),
        lipschitz(a.lipschitz),
        bound_decay(a.bound_decay),
        rounding(a.rounding),
        seed(a.seed),
        maximize(a.maximize),
        lr_tensor(a.lr_tensor),
        grad_scale(a.grad_scale),
        found_inf(a.found_inf),
        tallies(a.tallies),
        check_only(a.check_only) {}
};

// Checks everything that can be wrong with the arguments, before anything is changed. Errors name the parameter.
// csgd_cuda/reference/checks.py has the same for the pure-PyTorch reference.
void check_step(const StepArgs& args);

// Sets the options that all steps have.
void set_options(const StepArgs& args, StepOptions* options);

// One parameter ready to step. All its tensors lie in the parameter's memory order.
struct PackedTensor {
  StepShard tensor{};
  DType dtype{};
};

// The packed tensors. Those that cannot be stepped in place (a parameter that is not dense, a gradient or buffer with
// another memory order than its parameter) are stepped as dense copies, which this object owns.
class PackedStep {
 public:
  explicit PackedStep(const StepArgs& args);

  const std::vector<PackedTensor>& tensors() const { return tensors_; }
  const at::Tensor& first_param() const { return args_.params[0]; }  // there must be one

  // After the step: copies the stepped copies back and tells autograd which tensors were changed in place.
  void finish();

 private:
  const StepArgs& args_;
  std::vector<PackedTensor> tensors_;
  OrderedCopies copies_;
};

}  // namespace csgd
