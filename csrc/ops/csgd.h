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

namespace csgd {

constexpr int64_t kTallyWords = sizeof(CsgdTally) / sizeof(int64_t);
constexpr int64_t kShardNumbers = sizeof(ShardLayout) / sizeof(int64_t);

struct CsgdArgs {
  at::TensorList params;
  at::TensorList grads;
  at::TensorList momentum_buffers;  // empty without momentum
  at::TensorList steps;
  at::TensorList lipschitz_bounds;  // empty with a fixed Lipschitz constant
  at::IntArrayRef indices;
  at::IntArrayRef shards;  // kShardNumbers for each parameter, as in ShardLayout; empty: all are whole
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  double calibration;
  std::optional<double> lipschitz;
  double bound_decay;
  std::string_view rounding;
  int64_t seed;  // the bits of an unsigned 64-bit number
  bool maximize;
  bool fresh_momentum;
  const std::optional<at::Tensor>& lr_tensor;
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
  const std::optional<at::Tensor>& tallies;
};

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

// The kernel of the operator for one device: check everything, then pack, run, finish.
template <void (*run)(const PackedStep&)>
void csgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
           at::TensorList lipschitz_bounds, at::IntArrayRef indices, at::IntArrayRef shards, double lr, double momentum,
           double dampening, double weight_decay, bool nesterov, double calibration, std::optional<double> lipschitz,
           double bound_decay, std::string_view rounding, int64_t seed, bool maximize, bool fresh_momentum,
           const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& grad_scale,
           const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& tallies) {
  const CsgdArgs args{
      params,   grads,     momentum_buffers, steps,     lipschitz_bounds, indices,   shards,      lr,
      momentum, dampening, weight_decay,     nesterov,  calibration,      lipschitz, bound_decay, rounding,
      seed,     maximize,  fresh_momentum,   lr_tensor, grad_scale,       found_inf, tallies};
  check_csgd_args(args);
  if constexpr (run != nullptr) {
    if (params.empty()) return;
    const at::NoGradGuard no_grad;  // for the copies of what is not dense
    PackedStep step(args);
    run(step);
    step.finish();
  }
}

}  // namespace csgd
