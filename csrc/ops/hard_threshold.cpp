// SPDX-License-Identifier: Apache-2.0
// The operator csgd_cuda::hard_threshold_, which keeps the largest elements or filters. csgd_cuda.hard_threshold_
// documents it.
#include "../core/hard_threshold.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "../cpu/hard_threshold_cpu.h"
#include "arguments.h"
#include "parallel.h"
#include "tensors.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/hard_threshold_cuda.h"
#endif

namespace csgd {
namespace {

// momentum_buffers is empty where momentum is not to be changed, and masks where nothing was dropped for good.
#define CSGD_HARD_THRESHOLD_ARGUMENTS(POSITIONAL, KEYWORD)     \
  POSITIONAL("Tensor(a!)[]", at::TensorList, params)           \
  POSITIONAL("Tensor(b!)[]", at::TensorList, momentum_buffers) \
  POSITIONAL("Tensor(c!)[]", at::TensorList, masks)            \
  POSITIONAL("int[]?", at::OptionalIntArrayRef, keeps)         \
  KEYWORD("str", std::string_view, structure)                  \
  KEYWORD("bool", bool, across)                                \
  KEYWORD("Tensor?", const std::optional<at::Tensor>&, found_inf)
CSGD_DEFINE_ARGUMENTS(HardThresholdArgs, CSGD_HARD_THRESHOLD_ARGUMENTS);

// The checks. csgd_cuda/pruning/hard_threshold.py has the same for the reference.

bool fits(const at::Tensor& t, const at::Tensor& param, at::IntArrayRef sizes, at::ScalarType dtype) {
  return t.layout() == at::kStrided && t.sizes() == sizes && t.scalar_type() == dtype && t.device() == param.device();
}

void check_param(const at::Tensor& p, int64_t i, const HardThresholdArgs& a) {
  const auto dtype = p.scalar_type();
  TORCH_CHECK_VALUE(p.layout() == at::kStrided, "parameter ", i, " has layout ", p.layout(),
                    "; hard_threshold_ needs dense (strided) parameters");
  TORCH_CHECK_TYPE(is_supported(dtype), "parameter ", i, " has dtype ", dtype,
                   "; hard_threshold_ supports float32, float64, bfloat16 and float16");
  TORCH_CHECK_VALUE(p.device() == a.params[0].device(), "parameter ", i, " is on ", p.device(), ", expected ",
                    a.params[0].device(), ", the device of the call's first parameter");
  TORCH_CHECK_VALUE(p.numel() == 0 || separate_elements(p), "parameter ", i,
                    " may overlap itself in memory (an expanded tensor?): clone() it");
  check_changeable(p, i, "the parameter");
  if (a.structure == "filter") {
    TORCH_CHECK_VALUE(p.dim() >= 2, "parameter ", i, " has shape ", p.sizes(),
                      ": structure 'filter' needs two dimensions or more, of which the first counts the filters");
  }
  if (a.structure == "2:4") {
    TORCH_CHECK_VALUE(p.dim() >= 2 && p.size(1) % 4 == 0, "parameter ", i, " has shape ", p.sizes(),
                      ": structure '2:4' needs a dimension 1 that is divisible by 4");
  }
}

void check_companions(const HardThresholdArgs& a, size_t i) {
  const at::Tensor& p = a.params[i];
  if (!a.momentum_buffers.empty()) {
    const at::Tensor& m = a.momentum_buffers[i];
    TORCH_CHECK_VALUE(fits(m, p, p.sizes(), p.scalar_type()), "parameter ", i, ": momentum_buffer has shape ",
                      m.sizes(), ", dtype ", m.scalar_type(), " on ", m.device(), "; expected those of the parameter");
    TORCH_CHECK_VALUE(m.numel() == 0 || separate_elements(m), "parameter ", i,
                      ": momentum_buffer may overlap itself in memory");
    check_changeable(m, static_cast<int64_t>(i), "momentum_buffer");
  }
  if (!a.masks.empty()) {
    const at::Tensor& m = a.masks[i];
    const at::IntArrayRef sizes = a.structure == "filter" ? p.sizes().slice(0, 1) : p.sizes();
    TORCH_CHECK_VALUE(fits(m, p, sizes, at::kBool), "parameter ", i, ": mask has shape ", m.sizes(), ", dtype ",
                      m.scalar_type(), " on ", m.device(), "; expected shape ", sizes, ", dtype Bool on ", p.device());
    TORCH_CHECK_VALUE(m.numel() == 0 || separate_elements(m), "parameter ", i, ": mask may overlap itself in memory");
    check_changeable(m, static_cast<int64_t>(i), "mask");
  }
}

void check_keeps(const HardThresholdArgs& a) {
  if (!a.keeps) {
    TORCH_CHECK_VALUE(!a.masks.empty(), "keeps must be given where there are no masks to apply");
    return;
  }
  const size_t expected = a.structure == "2:4" ? 0 : a.across ? 1 : a.params.size();
  TORCH_CHECK_VALUE(a.keeps->size() == expected, "keeps must have ", expected, " entries, got ", a.keeps->size());
  for (const int64_t keep : *a.keeps) TORCH_CHECK_VALUE(keep >= 0, "keeps must be >= 0, got ", keep);
}

// Checks everything that can be wrong with the arguments, before anything is changed. Errors name the parameter by its
// place in the list.
void check_all(const HardThresholdArgs& a) {
  TORCH_CHECK_VALUE(a.structure == "element" || a.structure == "filter" || a.structure == "2:4",
                    "structure must be 'element', 'filter' or '2:4', got '", a.structure, "'");
  if (a.params.empty()) return;
  const auto length = [&](size_t got, const char* name) {
    TORCH_CHECK_VALUE(got == 0 || got == a.params.size(), name, " must be empty or have ", a.params.size(),
                      " entries, one for each parameter, got ", got);
  };
  length(a.momentum_buffers.size(), "momentum_buffers");
  length(a.masks.size(), "masks");
  check_keeps(a);
  for (size_t i = 0; i < a.params.size(); ++i) {
    check_param(a.params[i], static_cast<int64_t>(i), a);
    check_companions(a, i);
    const bool alike = (a.params[i].scalar_type() == at::kDouble) == (a.params[0].scalar_type() == at::kDouble);
    TORCH_CHECK_TYPE(!a.across || a.structure != "element" || alike, "parameter ", i, " has dtype ",
                     a.params[i].scalar_type(), " and parameter 0 ", a.params[0].scalar_type(),
                     ": across tensors all must be float64 or none");
  }
  if (!a.found_inf) return;
  TORCH_CHECK_VALUE(fits(*a.found_inf, a.params[0], a.found_inf->sizes(), at::kFloat) && a.found_inf->numel() == 1,
                    "found_inf must be one Float on ", a.params[0].device(), ", the device of the parameters");
}

// Packing, and the work for each structure.

// The packed arguments. A parameter that is not dense, and a momentum buffer or mask with another memory order than its
// parameter, is worked on as a copy, which finish() copies back.
class PackedThreshold {
 public:
  explicit PackedThreshold(const HardThresholdArgs& args) : args_(args) {
    for (size_t i = 0; i < args.params.size(); ++i) pack(i);
  }

  std::vector<ThresholdTensor> tensors;

  void keep_alive(const at::Tensor& t) { owned_.push_back(t); }

  void finish() {
    copies_.bring_back();
    bump_versions({args_.params, args_.momentum_buffers, args_.masks});
  }

 private:
  void pack(size_t i) {
    const at::Tensor& param = args_.params[i];
    const at::DimVector order = memory_order(param);
    ThresholdTensor t{};
    t.dtype = dtype_of(param);
    t.data = copies_.in_order(param, order, true).data_ptr();
    t.numel = t.channels = param.numel();
    t.inner = 1;
    if (!args_.momentum_buffers.empty())
      t.momentum_buffer = copies_.in_order(args_.momentum_buffers[i], order, true).data_ptr();
    const bool of_filters = args_.structure == "filter";
    if (!args_.masks.empty()) {
      t.mask = copies_.in_order(args_.masks[i], of_filters ? at::DimVector{1} : order, true).data_ptr<bool>();
    }
    if (of_filters || args_.structure == "2:4") {
      const size_t dim = of_filters ? 0 : 1;
      t.channels = param.size(static_cast<int64_t>(dim));
      // The stride of a dimension with one entry has no meaning.
      t.inner = t.channels == 1 ? std::max<int64_t>(param.numel(), 1) : std::max<int64_t>(order[dim], 1);
    }
    tensors.push_back(t);
  }

  const HardThresholdArgs& args_;
  OrderedCopies copies_;
  std::vector<at::Tensor> owned_;
};

// What one device does with packed tensors.
class ThresholdDevice {
 public:
  virtual ~ThresholdDevice() = default;
  virtual void select(const std::vector<ThresholdTensor>& tensors, int64_t selections) = 0;
  virtual void norms(const std::vector<ThresholdTensor>& tensors) = 0;
  virtual void masks(const std::vector<ThresholdTensor>& tensors) = 0;
  virtual void two_of_four(const std::vector<ThresholdTensor>& tensors) = 0;
};

// Gives each selection a number, and its tensors their places in it. Returns the number of selections.
int64_t number_selections(std::vector<ThresholdTensor>& tensors, const HardThresholdArgs& args) {
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    ThresholdTensor& t = tensors[i];
    t.keep = (*args.keeps)[args.across ? 0 : i];
    t.selection = args.across ? 0 : static_cast<int64_t>(i);
    t.first = args.across ? total : 0;
    t.total = t.numel;
    total += t.numel;
  }
  if (!args.across) return static_cast<int64_t>(tensors.size());
  for (ThresholdTensor& t : tensors) t.total = total;
  return 1;
}

// Thresholds the norms of the filters like elements; a filter is dropped where its norm is.
void threshold_filters(PackedThreshold& packed, const HardThresholdArgs& args, ThresholdDevice& device) {
  std::vector<ThresholdTensor> rows;
  for (ThresholdTensor& t : packed.tensors) {
    const at::Tensor norms = args.params[0].new_empty({t.channels}, at::kDouble);
    packed.keep_alive(norms);
    t.norms = norms.data_ptr<double>();
    if (t.mask == nullptr) {
      const at::Tensor mask = args.params[0].new_ones({t.channels}, at::kBool);
      packed.keep_alive(mask);
      t.mask = mask.data_ptr<bool>();
    }
    ThresholdTensor row{};
    row.dtype = DType::kFloat64;
    row.data = t.norms;
    row.mask = t.mask;
    row.numel = row.channels = t.channels;
    row.inner = 1;
    rows.push_back(row);
  }
  device.norms(packed.tensors);
  const int64_t selections = number_selections(rows, args);
  device.select(rows, selections);
  device.masks(packed.tensors);
}

// Packs the arguments and makes the device do the work.
void run(const HardThresholdArgs& args, ThresholdDevice& device) {
  const at::NoGradGuard no_grad;
  PackedThreshold packed(args);
  if (!args.keeps) {
    if (args.structure != "filter") {
      for (ThresholdTensor& t : packed.tensors) t.channels = t.numel, t.inner = 1;
    }
    device.masks(packed.tensors);
  } else if (args.structure == "filter") {
    threshold_filters(packed, args, device);
  } else if (args.structure == "2:4") {
    device.two_of_four(packed.tensors);
  } else {
    const int64_t selections = number_selections(packed.tensors, args);
    device.select(packed.tensors, selections);
  }
  packed.finish();
}

// On the CPU: torch's threads divide the work between them.

void parallel_for(int64_t count, const Ranges& work) { csgd::parallel_for(0, count, 2, work); }

class Cpu : public ThresholdDevice {
 public:
  void select(const std::vector<ThresholdTensor>& tensors, int64_t) override {
    hard_threshold_select_cpu(tensors, parallel_for);
  }
  void norms(const std::vector<ThresholdTensor>& tensors) override { hard_threshold_norms_cpu(tensors, parallel_for); }
  void masks(const std::vector<ThresholdTensor>& tensors) override { hard_threshold_masks_cpu(tensors, parallel_for); }
  void two_of_four(const std::vector<ThresholdTensor>& tensors) override {
    hard_threshold_two_of_four_cpu(tensors, parallel_for);
  }
};

void run_cpu(const HardThresholdArgs& args) {
  if (args.found_inf && *args.found_inf->const_data_ptr<float>() != 0.0f) return;
  Cpu cpu;
  run(args, cpu);
}

#if CSGD_WITH_CUDA
// On CUDA: launches on torch's current stream, with scratch memory from torch's allocator.

constexpr int64_t kScratchWords = sizeof(SelectionScratch) / sizeof(int64_t);

class Cuda : public ThresholdDevice {
 public:
  explicit Cuda(const HardThresholdArgs& args)
      : param_(args.params[0]),
        found_inf_(args.found_inf ? args.found_inf->const_data_ptr<float>() : nullptr),
        stream_(c10::cuda::getCurrentCUDAStream()) {}

  void select(const std::vector<ThresholdTensor>& tensors, int64_t selections) override {
    const at::Tensor scratch =  // freed in stream order, after the kernels
        param_.new_zeros({selections, kScratchWords}, at::kLong);
    auto* of_selection = reinterpret_cast<SelectionScratch*>(scratch.data_ptr<int64_t>());
    C10_CUDA_CHECK(launch_hard_threshold_select_cuda(tensors, of_selection, found_inf_, stream_));
  }
  void norms(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_norms_cuda(tensors, found_inf_, stream_));
  }
  void masks(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_masks_cuda(tensors, found_inf_, stream_));
  }
  void two_of_four(const std::vector<ThresholdTensor>& tensors) override {
    C10_CUDA_CHECK(launch_hard_threshold_two_of_four_cuda(tensors, found_inf_, stream_));
  }

 private:
  const at::Tensor& param_;
  const float* found_inf_;
  cudaStream_t stream_;
};

void run_cuda(const HardThresholdArgs& args) {
  const c10::cuda::CUDAGuard guard(args.params[0].device());
  Cuda cuda(args);
  run(args, cuda);
}
#endif

void run_nowhere(const HardThresholdArgs& args) {
  TORCH_CHECK(false, "hard_threshold_ has no kernel for tensors on ", args.params[0].device(),
              " in this build; see csgd_cuda.show_config()");
}

// The operator on one device.
template <void (*run_on)(const HardThresholdArgs&)>
void hard_threshold_(const HardThresholdArgs& args) {
  check_all(args);
  if (!args.params.empty()) run_on(args);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) {
  m.def(schema<HardThresholdArgs>("hard_threshold_", "()").c_str(),
        {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) {
  m.impl("hard_threshold_", unboxed<HardThresholdArgs, hard_threshold_<run_cpu>>);
}

#if CSGD_WITH_CUDA
TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) {
  m.impl("hard_threshold_", unboxed<HardThresholdArgs, hard_threshold_<run_cuda>>);
}
#endif

TORCH_LIBRARY_IMPL(csgd_cuda, CompositeExplicitAutograd, m) {
  m.impl("hard_threshold_", unboxed<HardThresholdArgs, hard_threshold_<run_nowhere>>);
}

}  // namespace csgd
