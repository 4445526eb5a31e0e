// SPDX-License-Identifier: Apache-2.0
#include "step.h"

#include <algorithm>
#include <functional>

namespace csgd {
namespace {

// Schedulers may set lr a rounding error below 0. The constructor of an optimizer refuses such options; a step does
// not.
void check_options(const StepArgs& a) {
  check_finite(a.lr, "lr");
  check_finite(a.weight_decay, "weight_decay");
  check_calibration(a.calibration, a.lipschitz, a.bound_decay, a.rounding);
}

void check_list_lengths(const StepArgs& a) {
  const auto length = [&](size_t got, bool used, const std::string& name, const char* when_unused) {
    const size_t expected = used ? a.params.size() : 0;
    TORCH_CHECK_VALUE(got == expected, name, " must have ", expected, " entries",
                      used ? ", one for each parameter" : when_unused, ", got ", got);
  };
  length(a.grads.size(), true, "grads", "");
  for (const BufferList& list : a.buffers) {
    length(list.tensors.size(), list.used, std::string(list.name) + "s", list.when_unused);
  }
  length(a.steps.size(), true, "steps", "");
  length(a.lipschitz_bounds.size(), !a.lipschitz, "lipschitz_bounds", " when lipschitz is fixed");
  length(a.indices.size(), true, "indices", "");
}

// Checks a tensor that belongs to the whole call.
void check_usable(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " must be a dense tensor, got layout ", t.layout());
}

void check_param(const at::Tensor& p, int64_t index, c10::Device device) {
  TORCH_CHECK_VALUE(index >= 0 && index <= 0xFFFFFFFF, "indices: ", index, " is not a parameter index (0 ... 2^32-1)");
  TORCH_CHECK_VALUE(p.layout() == at::kStrided, "parameter ", index, " has layout ", p.layout(),
                    "; csgd_cuda needs dense (strided) parameters");
  TORCH_CHECK_TYPE(!p.is_complex(), "parameter ", index, " is complex (", p.scalar_type(),
                   "); csgd_cuda does not support complex parameters: pass torch.view_as_real(parameter) instead");
  const auto dtype = p.scalar_type();
  TORCH_CHECK_TYPE(is_supported(dtype), "parameter ", index, " has dtype ", dtype,
                   "; csgd_cuda supports float32, float64, bfloat16 and float16");
  TORCH_CHECK_VALUE(p.device() == device, "parameter ", index, " is on ", p.device(), ", expected ", device,
                    ", the device of the call's first parameter");
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(p), "parameter ", index,
                    " may overlap itself in memory (an expanded tensor?): clone() it before optimizing it");
  check_changeable(p, index, "the parameter");
}

constexpr const char* kHowToConvertState =
    " (if the parameter was converted, optimizer.load_state_dict(optimizer.state_dict()) converts the state)";
constexpr const char* kHowToConvertGradient = " (a param.grad_dtype of another dtype is not supported)";

// Checks a tensor of the parameter's own shape and dtype: its gradient or a buffer.
void check_companion(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name, const char* advice) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "parameter ", index, ": ", name, " is sparse (", t.layout(),
                   "), csgd_cuda needs a dense one: use sparse=False in the layer, or ", name, ".to_dense()");
  TORCH_CHECK_VALUE(t.sizes() == p.sizes(), "parameter ", index, ": ", name, " has shape ", t.sizes(), ", expected ",
                    p.sizes(), " as the parameter");
  TORCH_CHECK_TYPE(t.scalar_type() == p.scalar_type(), "parameter ", index, ": ", name, " has dtype ", t.scalar_type(),
                   ", expected ", p.scalar_type(), " as the parameter", advice);
  TORCH_CHECK_VALUE(t.device() == p.device(), "parameter ", index, ": ", name, " is on ", t.device(), ", expected ",
                    p.device(), " as the parameter");
}

// Checks a scalar that the step reads or writes in place.
void check_scalar(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.numel() == 1 && t.scalar_type() == dtype && t.device() == p.device(), "parameter ", index, ": ",
                    name, " must be one ", dtype, " on ", p.device(), ", got ", t.numel(), " x ", t.scalar_type(),
                    " on ", t.device(), kHowToConvertState);
  check_changeable(t, index, name);
}

void check_buffer(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name) {
  check_companion(t, p, index, name, kHowToConvertState);
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(t), "parameter ", index, ": ", name,
                    " may overlap itself in memory");
  check_changeable(t, index, name);
}

void check_tensors(const StepArgs& a) {
  for (size_t i = 0; i < a.params.size(); ++i) {
    const at::Tensor& p = a.params[i];
    const int64_t index = a.indices[i];
    check_param(p, index, a.params[0].device());
    check_companion(a.grads[i], p, index, "gradient", kHowToConvertGradient);
    for (const BufferList& list : a.buffers) {
      if (list.used) check_buffer(list.tensors[i], p, index, list.name);
    }
    check_scalar(a.steps[i], p, index, "step", at::kLong);
    const auto opmath = p.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (!a.lipschitz) check_scalar(a.lipschitz_bounds[i], p, index, "lipschitz_bound", opmath);
  }
}

// Two parameters with one row of the tallies: on a GPU each would count the other's blocks, and no step might end.
void check_different(at::IntArrayRef indices) {
  if (std::is_sorted(indices.begin(), indices.end(), std::less_equal<>())) return;  // as in a step of an optimizer
  std::vector<int64_t> sorted = indices.vec();
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(twice == sorted.end(), "indices: with tallies all must be different, got ", *twice, " twice");
}

void check_optional_tensors(const StepArgs& a) {
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
    check_different(a.indices);
    const at::Tensor& t = *a.tallies;
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == kTallyWords && t.is_contiguous() && t.scalar_type() == at::kLong &&
                          t.device() == device && t.size(0) >= needed,
                      "tallies must be a contiguous Long tensor on ", device, " of shape (K, ", kTallyWords,
                      ") with K >= ", needed, ", a row for each parameter index from that of the first parameter on");
  }
}

// Runs of a shard that overlap would use the same draws twice.
void check_shards(const StepArgs& a) {
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

const float* float_pointer(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

StepTally* tally_rows(const at::Tensor& t) { return reinterpret_cast<StepTally*>(t.data_ptr<int64_t>()); }

ShardLayout layout_of(const StepArgs& args, size_t i) {
  if (args.shards.empty()) return {};
  const int64_t* numbers = args.shards.data() + i * kShardNumbers;
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

}  // namespace

void check_step(const StepArgs& args) {
  check_options(args);
  check_list_lengths(args);
  if (args.params.empty()) return;
  check_tensors(args);
  check_shards(args);
  check_unshared(args.steps, "steps");
  check_unshared(args.lipschitz_bounds, "lipschitz_bounds");
  check_optional_tensors(args);
}

void set_options(const StepArgs& a, StepOptions* o) {
  o->lr = a.lr;
  if (a.lr_tensor && !a.params.empty()) {
    // A learning rate on the CPU is read here. One on a GPU is read by the kernel, so that the host does not wait.
    if (a.lr_tensor->is_cpu()) {
      o->lr = a.lr_tensor->item<double>();
    } else if (a.lr_tensor->scalar_type() == at::kDouble) {
      o->lr_float64 = a.lr_tensor->const_data_ptr<double>();
    } else {
      o->lr_float32 = a.lr_tensor->const_data_ptr<float>();
    }
  }
  o->weight_decay = a.weight_decay;
  o->calibration = a.calibration;
  o->lipschitz = a.lipschitz.value_or(0.0);
  o->bound_decay = a.bound_decay;
  o->grad_scale = float_pointer(a.grad_scale);
  o->found_inf = float_pointer(a.found_inf);
  o->seed = static_cast<uint64_t>(a.seed);
  o->maximize = a.maximize;
  o->stochastic_rounding = a.rounding == "stochastic";
}

PackedStep::PackedStep(const StepArgs& args) : args_(args) {
  tensors_.reserve(args.params.size());
  for (size_t i = 0; i < args.params.size(); ++i) {
    const at::Tensor& param = args.params[i];
    const at::DimVector order = memory_order(param);
    PackedTensor& packed = tensors_.emplace_back();
    packed.dtype = dtype_of(param);
    StepShard& t = packed.tensor;
    t.param = copies_.in_order(param, order, true).data_ptr();
    t.grad = copies_.in_order(args.grads[i], order, false).const_data_ptr();
    for (size_t b = 0; b < args.buffers.size(); ++b) {
      const BufferList& list = args.buffers[b];
      if (list.used) t.buffers[b] = copies_.in_order(list.tensors[i], order, true).data_ptr();
    }
    t.step = args.steps[i].data_ptr<int64_t>();
    if (!args.lipschitz_bounds.empty()) t.bound = args.lipschitz_bounds[i].data_ptr();
    t.index = static_cast<uint32_t>(args.indices[i]);
    if (args.tallies) t.tally = tally_rows(*args.tallies) + (args.indices[i] - args.indices[0]);
    t.numel = param.numel();
    t.layout = layout_of(args, i);
  }
}

void PackedStep::finish() {
  copies_.bring_back();
  for (const BufferList& list : args_.buffers) bump_versions({list.tensors});
  bump_versions({args_.params, args_.steps, args_.lipschitz_bounds, list_of(args_.tallies)});
}

}  // namespace csgd
