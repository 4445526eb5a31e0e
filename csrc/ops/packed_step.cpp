// SPDX-License-Identifier: Apache-2.0
// From checked torch tensors to plain addresses in one memory order.
#include <ATen/ops/empty_strided.h>
#include <c10/util/strides.h>

#include "csgd.h"
#include "dtype.h"

namespace csgd {
namespace {

bool same_memory_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t k = 0; k < a.dim(); ++k) {
    if (a.size(k) > 1 && a.stride(k) != b.stride(k)) return false;
  }
  return true;
}

const float* float_pointer(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

CsgdOptions options_of(const CsgdArgs& a) {
  CsgdOptions o{};
  o.lr = a.lr;
  if (a.lr_tensor && !a.params.empty()) {
    // A learning rate on the CPU can be read here; elsewhere the kernel reads it, so that nobody waits.
    if (a.lr_tensor->is_cpu()) {
      o.lr = a.lr_tensor->item<double>();
    } else if (a.lr_tensor->scalar_type() == at::kDouble) {
      o.lr_float64 = a.lr_tensor->const_data_ptr<double>();
    } else {
      o.lr_float32 = a.lr_tensor->const_data_ptr<float>();
    }
  }
  o.momentum = a.momentum;
  o.one_minus_dampening = 1.0 - a.dampening;
  o.weight_decay = a.weight_decay;
  o.calibration = a.calibration;
  o.lipschitz = a.lipschitz.value_or(0.0);
  o.bound_decay = a.bound_decay;
  o.grad_scale = float_pointer(a.grad_scale);
  o.found_inf = float_pointer(a.found_inf);
  o.seed = static_cast<uint64_t>(a.seed);
  o.nesterov = a.nesterov;
  o.maximize = a.maximize;
  o.stochastic_rounding = a.rounding == "stochastic";
  o.fresh_momentum = a.fresh_momentum;
  return o;
}

CsgdTally* tally_rows(const at::Tensor& t) { return reinterpret_cast<CsgdTally*>(t.data_ptr<int64_t>()); }

void bump_version(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

ShardLayout layout_of(const CsgdArgs& args, size_t i) {
  if (args.shards.empty()) return {};
  const int64_t* numbers = args.shards.data() + i * kShardNumbers;
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

}  // namespace

// `tensor` itself where it lies in memory as `like` does, else a copy that does.
at::Tensor PackedStep::dense(const at::Tensor& tensor, const at::Tensor& like, bool changed) {
  if (same_memory_order(tensor, like) || tensor.numel() == 0) return tensor;
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), tensor.options()).copy_(tensor);
  owned_.push_back(copy);
  if (changed) copies_back_.push_back({tensor, copy});
  return copy;
}

PackedStep::PackedStep(const CsgdArgs& args) : args_(args), options_(options_of(args)) {
  tensors_.reserve(args.params.size());
  for (size_t i = 0; i < args.params.size(); ++i) {
    const at::Tensor& param = args.params[i];
    at::Tensor p = param;
    if (!param.is_non_overlapping_and_dense()) {  // counted in row-major order
      p = at::empty_strided(param.sizes(), c10::contiguous_strides(param.sizes()), param.options()).copy_(param);
      owned_.push_back(p);
      copies_back_.push_back({param, p});
    }
    CsgdShard t{};
    t.param = p.data_ptr();
    t.grad = dense(args.grads[i], p, false).const_data_ptr();
    if (!args.momentum_buffers.empty()) t.momentum_buffer = dense(args.momentum_buffers[i], p, true).data_ptr();
    t.step = args.steps[i].data_ptr<int64_t>();
    if (!args.lipschitz_bounds.empty()) t.bound = args.lipschitz_bounds[i].data_ptr();
    t.index = static_cast<uint32_t>(args.indices[i]);
    if (args.tallies) t.tally = tally_rows(*args.tallies) + (args.indices[i] - args.indices[0]);
    t.numel = p.numel();
    t.layout = layout_of(args, i);
    tensors_.push_back({t, dtype_of(p)});
  }
}

void PackedStep::finish() {
  for (const CopyBack& copy : copies_back_) copy.to.copy_(copy.from);
  for (const at::TensorList& changed : {args_.params, args_.momentum_buffers, args_.steps, args_.lipschitz_bounds}) {
    for (const at::Tensor& t : changed) bump_version(t);
  }
}

}  // namespace csgd
