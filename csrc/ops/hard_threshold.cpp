// SPDX-License-Identifier: Apache-2.0
// From the checked arguments of hard_threshold_ to the work of a device, for each structure.
#include "hard_threshold.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones.h>
#include <c10/util/strides.h>

#include "csgd.h"
#include "dtype.h"

namespace csgd {
namespace {

// The packed call. What does not lie in memory as its parameter counts (a parameter that is not dense, a momentum
// buffer or mask laid out otherwise) is worked on as a copy, which is brought back by finish().
class PackedThreshold {
 public:
  explicit PackedThreshold(const HardThresholdArgs& args) : args_(args) {
    for (size_t i = 0; i < args.params.size(); ++i) pack(i);
  }

  std::vector<ThresholdTensor> tensors;

  void keep_alive(const at::Tensor& t) { owned_.push_back(t); }

  void finish() {
    for (const auto& [to, from] : copies_) to.copy_(from);
    for (const at::TensorList& changed : {args_.params, args_.momentum_buffers, args_.masks}) {
      for (const at::Tensor& t : changed) {
        if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
      }
    }
  }

 private:
  void pack(size_t i) {
    const at::Tensor& param = args_.params[i];
    std::vector<int64_t> order = param.strides().vec();
    if (!param.is_non_overlapping_and_dense()) {  // counted in row-major order
      const auto row_major = c10::contiguous_strides(param.sizes());
      order.assign(row_major.begin(), row_major.end());
    }
    ThresholdTensor t{};
    t.dtype = dtype_of(param);
    t.data = in_order(param, order).data_ptr();
    t.numel = t.channels = param.numel();
    t.inner = 1;
    if (!args_.momentum_buffers.empty()) t.momentum_buffer = in_order(args_.momentum_buffers[i], order).data_ptr();
    const bool of_filters = args_.structure == "filter";
    if (!args_.masks.empty()) {
      const std::vector<int64_t> one{1};
      t.mask = in_order(args_.masks[i], of_filters ? one : order).data_ptr<bool>();
    }
    if (of_filters || args_.structure == "2:4") {
      const size_t dim = of_filters ? 0 : 1;
      t.channels = param.size(static_cast<int64_t>(dim));
      // The stride of a dimension of one entry means nothing.
      t.inner = t.channels == 1 ? std::max<int64_t>(param.numel(), 1) : std::max<int64_t>(order[dim], 1);
    }
    tensors.push_back(t);
  }

  at::Tensor in_order(const at::Tensor& tensor, const std::vector<int64_t>& order) {
    bool same = true;
    for (int64_t k = 0; k < tensor.dim(); ++k) {
      same = same && (tensor.size(k) <= 1 || tensor.stride(k) == order[static_cast<size_t>(k)]);
    }
    if (same || tensor.numel() == 0) return tensor;
    copies_.emplace_back(tensor, at::empty_strided(tensor.sizes(), order, tensor.options()).copy_(tensor));
    return copies_.back().second;
  }

  const HardThresholdArgs& args_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  std::vector<at::Tensor> owned_;
};

// Numbers the selections, and the places in them. Returns how many selections there are.
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

// The norms are thresholded as elements are; where one is dropped, its filter is.
void threshold_filters(PackedThreshold& packed, const HardThresholdArgs& args, ThresholdDevice& device) {
  const auto options = at::TensorOptions().device(args.params[0].device());
  std::vector<ThresholdTensor> rows;
  for (ThresholdTensor& t : packed.tensors) {
    const at::Tensor norms = at::empty({t.channels}, options.dtype(at::kDouble));
    packed.keep_alive(norms);
    t.norms = norms.data_ptr<double>();
    if (t.mask == nullptr) {
      const at::Tensor mask = at::ones({t.channels}, options.dtype(at::kBool));
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

}  // namespace

void run_hard_threshold(const HardThresholdArgs& args, ThresholdDevice& device) {
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

void hard_threshold_nowhere(const HardThresholdArgs& args) {
  TORCH_CHECK(false, "hard_threshold_ has no kernel for tensors on ", args.params[0].device(),
              " in this build; see csgd_cuda.show_config()");
}

}  // namespace csgd
