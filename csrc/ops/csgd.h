// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::csgd_ on torch's side: its arguments, their checks, and their packing into the plain
// structs of csrc/core. Each device adds one function that runs the packed step (csgd_cpu.cpp, csgd_cuda.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../core/params.h"
#include "arguments.h"

namespace csgd {

constexpr int64_t kTallyWords = sizeof(CsgdTally) / sizeof(int64_t);
constexpr int64_t kShardNumbers = sizeof(ShardLayout) / sizeof(int64_t);

// Without momentum there are no momentum buffers, with a fixed Lipschitz constant no lipschitz_bounds. `shards` holds
// kShardNumbers for each parameter, as in ShardLayout; where it is empty all parameters are whole. `seed` has the bits
// of an unsigned number. csgd_cuda.functional.csgd_ documents the others.
#define CSGD_ARGUMENTS(POSITIONAL, KEYWORD)                        \
  POSITIONAL("Tensor(a!)[]", at::TensorList, params)               \
  POSITIONAL("Tensor[]", at::TensorList, grads)                    \
  POSITIONAL("Tensor(b!)[]", at::TensorList, momentum_buffers)     \
  POSITIONAL("Tensor(c!)[]", at::TensorList, steps)                \
  POSITIONAL("Tensor(d!)[]", at::TensorList, lipschitz_bounds)     \
  POSITIONAL("int[]", at::IntArrayRef, indices)                    \
  POSITIONAL("int[]", at::IntArrayRef, shards)                     \
  KEYWORD("float", double, lr)                                     \
  KEYWORD("float", double, momentum)                               \
  KEYWORD("float", double, dampening)                              \
  KEYWORD("float", double, weight_decay)                           \
  KEYWORD("bool", bool, nesterov)                                  \
  KEYWORD("float", double, calibration)                            \
  KEYWORD("float?", std::optional<double>, lipschitz)              \
  KEYWORD("float", double, bound_decay)                            \
  KEYWORD("str", std::string_view, rounding)                       \
  KEYWORD("int", int64_t, seed)                                    \
  KEYWORD("bool", bool, maximize)                                  \
  KEYWORD("bool", bool, fresh_momentum)                            \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, lr_tensor)  \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, grad_scale) \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, found_inf)  \
  KEYWORD("Tensor(e!)?", const std::optional<at::Tensor>&, tallies)
CSGD_DEFINE_ARGUMENTS(CsgdArgs, CSGD_ARGUMENTS);

void check_not_negative(double value, const char* name);

// True where no two elements can share memory.
bool separate_elements(const at::Tensor& t);

// Everything that can be wrong with the arguments, before anything is changed. Errors name the parameter.
void check_csgd_args(const CsgdArgs& args);

// One parameter ready to step: every tensor in the parameter's memory order, at a plain address.
struct PackedTensor {
  CsgdShard tensor;
  DType dtype;
};

// The packed call. Tensors that cannot be stepped in place (a non-dense parameter, a gradient or momentum
// buffer laid out otherwise than its parameter) are stepped as dense copies, which it owns.
class PackedStep {
 public:
  explicit PackedStep(const CsgdArgs& args);

  const CsgdOptions& options() const { return options_; }
  const std::vector<PackedTensor>& tensors() const { return tensors_; }
  c10::Device device() const { return args_.params[0].device(); }  // of a call with parameters

  // After the step: brings the stepped copies back and tells autograd what was changed in place.
  void finish();

 private:
  struct CopyBack {
    at::Tensor to;
    at::Tensor from;
  };

  at::Tensor dense(const at::Tensor& tensor, const at::Tensor& like, bool changed);

  const CsgdArgs& args_;
  CsgdOptions options_;
  std::vector<PackedTensor> tensors_;
  std::vector<at::Tensor> owned_;
  std::vector<CopyBack> copies_back_;
};

void run_cpu(const PackedStep& step);
void run_cuda(const PackedStep& step);
[[noreturn]] void run_nowhere(const PackedStep& step);  // for all other kinds of tensors: says so

// The operator on one device: check everything, then pack, run, finish. Without `run` the checks alone.
template <void (*run)(const PackedStep&)>
void csgd_(const CsgdArgs& args) {
  check_csgd_args(args);
  if constexpr (run != nullptr) {
    if (args.params.empty()) return;
    const at::NoGradGuard no_grad;  // for the copies of what is not dense
    PackedStep step(args);
    run(step);
    step.finish();
  }
}

}  // namespace csgd
