// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::csgd_, which makes a step. The arguments are checked and packed into the plain structs of
// csrc/core, on which the CPU loop or the CUDA kernels work.
#include "csgd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "../core/params.h"
#include "../core/update_rule.h"
#include "../cpu/csgd_cpu.h"
#include "arguments.h"
#include "python_function.h"
#include "tensors.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/csgd_cuda.h"
#endif

namespace csgd {
namespace {

constexpr int64_t kTallyWords = sizeof(CsgdTally) / sizeof(int64_t);
constexpr int64_t kShardNumbers = sizeof(ShardLayout) / sizeof(int64_t);

// Without momentum, momentum_buffers is empty; with a fixed Lipschitz constant, lipschitz_bounds is empty. `shards` has
// kShardNumbers numbers for each parameter, as in ShardLayout; it is empty where all parameters are whole. `seed` has
// the bits of an unsigned 64-bit number. With `check_only` nothing is changed: a caller that makes several calls checks
// them all before the first one. csgd_cuda.csgd_ documents the others.
#define CSGD_ARGUMENTS(POSITIONAL, KEYWORD)                         \
  POSITIONAL("Tensor(a!)[]", at::TensorList, params)                \
  POSITIONAL("Tensor[]", at::TensorList, grads)                     \
  POSITIONAL("Tensor(b!)[]", at::TensorList, momentum_buffers)      \
  POSITIONAL("Tensor(c!)[]", at::TensorList, steps)                 \
  POSITIONAL("Tensor(d!)[]", at::TensorList, lipschitz_bounds)      \
  POSITIONAL("int[]", at::IntArrayRef, indices)                     \
  POSITIONAL("int[]", at::IntArrayRef, shards)                      \
  KEYWORD("float", double, lr)                                      \
  KEYWORD("float", double, momentum)                                \
  KEYWORD("float", double, dampening)                               \
  KEYWORD("float", double, weight_decay)                            \
  KEYWORD("bool", bool, nesterov)                                   \
  KEYWORD("float", double, calibration)                             \
  KEYWORD("float?", std::optional<double>, lipschitz)               \
  KEYWORD("float", double, bound_decay)                             \
  KEYWORD("str", std::string_view, rounding)                        \
  KEYWORD("int", int64_t, seed)                                     \
  KEYWORD("bool", bool, maximize)                                   \
  KEYWORD("bool", bool, fresh_momentum)                             \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, lr_tensor)   \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, grad_scale)  \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, found_inf)   \
  KEYWORD("Tensor(e!)?", const std::optional<at::Tensor>&, tallies) \
  KEYWORD("bool", bool, check_only)
CSGD_DEFINE_ARGUMENTS(CsgdArgs, CSGD_ARGUMENTS);

// The checks. csgd_cuda/reference/checks.py has the same for the pure-PyTorch reference.

void check_options(const CsgdArgs& a) {
  // Schedulers may set lr a rounding error below 0, and the momentum to 0 together with nesterov. The constructor of
  // CSGD refuses such options; a step does not.
  check_finite(a.lr, "lr");
  check_finite(a.momentum, "momentum");
  check_finite(a.dampening, "dampening");
  check_finite(a.weight_decay, "weight_decay");
  check_calibration(a.calibration, a.lipschitz, a.bound_decay, a.rounding);
}

void check_list_lengths(const CsgdArgs& a) {
  const auto length = [&](size_t got, bool used, const char* name, const char* when_unused) {
    const size_t expected = used ? a.params.size() : 0;
    TORCH_CHECK_VALUE(got == expected, name, " must have ", expected, " entries",
                      used ? ", one for each parameter" : when_unused, ", got ", got);
  };
  length(a.grads.size(), true, "grads", "");
  length(a.momentum_buffers.size(), a.momentum != 0, "momentum_buffers", " when momentum is 0");
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
                    "; CSGD needs dense (strided) parameters");
  TORCH_CHECK_TYPE(!p.is_complex(), "parameter ", index, " is complex (", p.scalar_type(),
                   "); CSGD does not support complex parameters: pass torch.view_as_real(parameter) instead");
  const auto dtype = p.scalar_type();
  TORCH_CHECK_TYPE(is_supported(dtype), "parameter ", index, " has dtype ", dtype,
                   "; CSGD supports float32, float64, bfloat16 and float16");
  TORCH_CHECK_VALUE(p.device() == device, "parameter ", index, " is on ", p.device(), ", expected ", device,
                    ", the device of the call's first parameter");
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(p), "parameter ", index,
                    " may overlap itself in memory (an expanded tensor?): clone() it before optimizing it");
  check_changeable(p, index, "the parameter");
}

constexpr const char* kHowToConvertState =
    " (if the parameter was converted, optimizer.load_state_dict(optimizer.state_dict()) converts the state)";
constexpr const char* kHowToConvertGradient = " (a param.grad_dtype of another dtype is not supported)";

// Checks a tensor of the parameter's own shape and dtype: its gradient or its momentum buffer.
void check_companion(const at::Tensor& t, const at::Tensor& p, int64_t index, const char* name, const char* advice) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, "parameter ", index, ": ", name, " is sparse (", t.layout(),
                   "), CSGD needs a dense one: use sparse=False in the layer, or ", name, ".to_dense()");
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

void check_tensors(const CsgdArgs& a) {
  for (size_t i = 0; i < a.params.size(); ++i) {
    const at::Tensor& p = a.params[i];
    const int64_t index = a.indices[i];
    check_param(p, index, a.params[0].device());
    check_companion(a.grads[i], p, index, "gradient", kHowToConvertGradient);
    if (!a.momentum_buffers.empty()) {
      check_companion(a.momentum_buffers[i], p, index, "momentum_buffer", kHowToConvertState);
      TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(a.momentum_buffers[i]), "parameter ", index,
                        ": momentum_buffer may overlap itself in memory");
      check_changeable(a.momentum_buffers[i], index, "momentum_buffer");
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

void check_optional_tensors(const CsgdArgs& a) {
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
void check_shards(const CsgdArgs& a) {
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

// Checks everything that can be wrong with the arguments, before anything is changed. Errors name the parameter.
void check_all(const CsgdArgs& args) {
  check_options(args);
  check_list_lengths(args);
  if (args.params.empty()) return;
  check_tensors(args);
  check_shards(args);
  check_unshared(args.steps, "steps");
  check_unshared(args.lipschitz_bounds, "lipschitz_bounds");
  check_optional_tensors(args);
}

// Packing.

// One parameter ready to step. All its tensors lie in the parameter's memory order.
struct PackedTensor {
  CsgdShard tensor{};
  DType dtype{};
};

// The packed arguments. Tensors that cannot be stepped in place (a parameter that is not dense, a gradient or momentum
// buffer with another memory order than its parameter) are stepped as dense copies, which this object owns.
class PackedStep {
 public:
  explicit PackedStep(const CsgdArgs& args);

  const CsgdOptions& options() const { return options_; }
  const std::vector<PackedTensor>& tensors() const { return tensors_; }
  const at::Tensor& first_param() const { return args_.params[0]; }  // there must be one

  // After the step: copies the stepped copies back and tells autograd which tensors were changed in place.
  void finish();

 private:
  const CsgdArgs& args_;
  CsgdOptions options_;
  std::vector<PackedTensor> tensors_;
  OrderedCopies copies_;
};

const float* float_pointer(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

CsgdOptions options_of(const CsgdArgs& a) {
  CsgdOptions o{};
  o.lr = a.lr;
  if (a.lr_tensor && !a.params.empty()) {
    // A learning rate on the CPU is read here. One on a GPU is read by the kernel, so that the host does not wait.
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

ShardLayout layout_of(const CsgdArgs& args, size_t i) {
  if (args.shards.empty()) return {};
  const int64_t* numbers = args.shards.data() + i * kShardNumbers;
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
}

PackedStep::PackedStep(const CsgdArgs& args) : args_(args), options_(options_of(args)) {
  tensors_.reserve(args.params.size());
  for (size_t i = 0; i < args.params.size(); ++i) {
    const at::Tensor& param = args.params[i];
    const at::DimVector order = memory_order(param);
    PackedTensor& packed = tensors_.emplace_back();
    packed.dtype = dtype_of(param);
    CsgdShard& t = packed.tensor;
    t.param = copies_.in_order(param, order, true).data_ptr();
    t.grad = copies_.in_order(args.grads[i], order, false).const_data_ptr();
    if (!args.momentum_buffers.empty()) {
      t.momentum_buffer = copies_.in_order(args.momentum_buffers[i], order, true).data_ptr();
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
  bump_versions({args_.params, args_.momentum_buffers, args_.steps, args_.lipschitz_bounds, list_of(args_.tallies)});
}

// On the CPU: torch's threads divide the chunks of all tensors between them.

struct Chunk {
  size_t tensor;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kWorthThreads = 2 * kCpuChunk;  // with fewer elements, waking other threads costs more than it saves

std::vector<Chunk> chunks_of(const std::vector<PackedTensor>& tensors, int64_t* elements) {
  std::vector<Chunk> chunks;
  *elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].tensor.numel;
    for (int64_t begin = 0; begin < numel; begin += kCpuChunk) {
      chunks.push_back({i, begin, std::min(begin + kCpuChunk, numel)});
    }
    *elements += numel;
  }
  return chunks;
}

void run_cpu(const PackedStep& step) {
  const CsgdOptions& options = step.options();
  if (overflowed(options)) return;
  int64_t elements = 0;
  const std::vector<Chunk> chunks = chunks_of(step.tensors(), &elements);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<ChunkResult> results(chunks.size());
  const auto run_chunks = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const PackedTensor& packed = step.tensors()[chunks[c].tensor];
      results[c] = csgd_chunk_function(packed.dtype)(options, packed.tensor, chunks[c].begin, chunks[c].end);
    }
  };
  if (elements < kWorthThreads) {
    run_chunks(0, count);
  } else {
    at::parallel_for(0, count, 1, run_chunks);
  }
  std::vector<ChunkResult> totals(step.tensors().size());
  for (int64_t c = 0; c < count; ++c) {
    ChunkResult& total = totals[chunks[c].tensor];
    total.largest_bits = std::max(total.largest_bits, results[c].largest_bits);
    total.moved += results[c].moved;
  }
  for (size_t i = 0; i < totals.size(); ++i) {
    csgd_finish_tensor(step.tensors()[i].dtype, options, step.tensors()[i].tensor, totals[i]);
  }
}

#if CSGD_WITH_CUDA
// On CUDA, on torch's current stream: a launch for the whole parameters of each dtype, and one for its shards.

template <class Tensor>
void launch(DType dtype, const CsgdOptions& options, const std::vector<Tensor>& tensors, cudaStream_t stream) {
  C10_CUDA_CHECK(
      launch_csgd_cuda(dtype, options, tensors.data(), static_cast<int64_t>(tensors.size()), stream, nullptr));
}

void run_cuda(const PackedStep& step) {
  const c10::cuda::CUDAGuard guard(step.first_param().device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = static_cast<int64_t>(step.tensors().size());
  at::Tensor own_tallies;  // freed in stream order, after the kernels
  if (step.tensors()[0].tensor.tally == nullptr) {
    own_tallies = step.first_param().new_zeros({count, kTallyWords}, at::kLong);
  }
  for (const DType dtype : kDTypes) {
    std::vector<CsgdTensor> whole;
    std::vector<CsgdShard> shards;
    for (int64_t i = 0; i < count; ++i) {
      if (step.tensors()[i].dtype != dtype) continue;
      CsgdShard tensor = step.tensors()[i].tensor;
      if (own_tallies.defined()) {
        tensor.tally = reinterpret_cast<CsgdTally*>(own_tallies.data_ptr<int64_t>()) + i;
      }
      if (tensor.layout.run_length == 0) {
        whole.push_back(tensor);
      } else {
        shards.push_back(tensor);
      }
    }
    launch(dtype, step.options(), whole, stream);
    launch(dtype, step.options(), shards, stream);
  }
}
#endif

// The operator on one device: checks everything, then packs, runs, finishes.
template <void (*run)(const PackedStep&)>
void csgd_(const CsgdArgs& args) {
  check_all(args);
  if (args.check_only || args.params.empty()) return;
  const at::NoGradGuard no_grad;  // for the copies of tensors that are not dense
  PackedStep step(args);
  run(step);
  step.finish();
}

#if CSGD_WITH_CUDA
// Older drivers would refuse the launch, which passes more than 4 KB of arguments, only after other launches were made.
void check_driver() {
  static const int version = [] {
    int of_driver = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&of_driver));
    return of_driver;
  }();
  TORCH_CHECK(version >= 12010, "csgd_ needs an NVIDIA driver for CUDA 12.1 or later (R530 or later), and this one is ",
              "for CUDA ", version / 1000, ".", version % 1000 / 10, ": update it, or pass fused=False");
}

void csgd_on_cuda(const CsgdArgs& args) {
  check_driver();
  csgd_<run_cuda>(args);
}
#endif

// Sparse, complex and other tensors come here as well; the checks then say which one is wrong.
void csgd_nowhere(const CsgdArgs& args) {
  check_all(args);
  TORCH_CHECK(args.params.empty(), "csgd_ has no kernel for tensors on ", args.params[0].device(),
              " in this build; see csgd_cuda.show_config()");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) {
  m.def(schema<CsgdArgs>("csgd_", "()").c_str(), {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
}

// It has no gradient, and torch's own kernel for such operators would box the lists.
TORCH_LIBRARY_IMPL(csgd_cuda, Autograd, m) { m.impl("csgd_", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { m.impl("csgd_", unboxed<CsgdArgs, csgd_<run_cpu>>); }

#if CSGD_WITH_CUDA
TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { m.impl("csgd_", unboxed<CsgdArgs, csgd_on_cuda>); }
#endif

TORCH_LIBRARY_IMPL(csgd_cuda, CompositeExplicitAutograd, m) { m.impl("csgd_", unboxed<CsgdArgs, csgd_nowhere>); }

void add_csgd(pybind11::module_& m) { PythonFunction<CsgdArgs, void>::add(m, "csgd_"); }

}  // namespace csgd
