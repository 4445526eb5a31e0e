// SPDX-License-Identifier: Apache-2.0
// Hard thresholding.
#include "../../csrc/cpu/hard_threshold_cpu.h"
#include "cases.h"

namespace cases {
namespace {

using namespace csgd;

constexpr int64_t kInner = 9, kChannels = 12, kOuter = 11;
constexpr int64_t kNumel = kOuter * kChannels * kInner;

void one_after_another(int64_t count, const Ranges& work) {
  for (int64_t k = 0; k < count; ++k) work(k, k + 1);
}

// `number`: of the tensor among those of the case.
template <class S>
ThresholdTensor tensor_of(DType dtype, Fill fill, const std::string& number, bool masked, Memory& memory) {
  ThresholdTensor tensor{};
  tensor.dtype = dtype;
  tensor.data = memory.make<S>("data" + number, kNumel, fill);
  tensor.momentum_buffer = memory.make<S>("momentum_buffer" + number, kNumel, fill);
  if (masked) tensor.mask = reinterpret_cast<bool*>(memory.make<uint8_t>("mask" + number, kNumel, Fill::kEdge));
  tensor.numel = tensor.channels = tensor.total = kNumel;
  tensor.inner = 1;
  tensor.keep = kNumel / 3;
  return tensor;
}

// "one" tensor; two "together", of which one is masked; the channels ("filter") with the largest norms; "2:4".
template <class S>
void threshold(const std::string& structure, DType dtype, Fill fill, Memory& memory) {
  std::vector<ThresholdTensor> tensors = {tensor_of<S>(dtype, fill, "0", structure == "2:4", memory)};
  ThresholdTensor& first = tensors[0];
  if (structure == "2:4") {
    first.channels = kChannels, first.inner = kInner;
    return hard_threshold_two_of_four_cpu(tensors, one_after_another);
  }
  if (structure == "filter") {
    first.channels = kChannels, first.inner = kInner;
    first.norms = memory.make<double>("norms", kChannels, Fill::kZeros);
    first.mask = reinterpret_cast<bool*>(memory.hold<uint8_t>("mask0", std::vector<uint8_t>(kChannels, 1)));
    hard_threshold_norms_cpu(tensors, one_after_another);
    ThresholdTensor row{};
    row.dtype = DType::kFloat64;
    row.data = memory.make<double>("kept_norms", kChannels, Fill::kZeros);
    std::memcpy(row.data, first.norms, kChannels * sizeof(double));
    row.mask = first.mask;
    row.numel = row.channels = row.total = kChannels;
    row.inner = 1;
    row.keep = kChannels / 2;
    hard_threshold_select_cpu({row}, one_after_another);
    return hard_threshold_masks_cpu(tensors, one_after_another);
  }
  if (structure == "together") {
    tensors.push_back(tensor_of<S>(dtype, fill, "1", true, memory));
    tensors[1].first = kNumel;
    for (ThresholdTensor& tensor : tensors) tensor.total = 2 * kNumel;
  }
  hard_threshold_select_cpu(tensors, one_after_another);
}

}  // namespace

void thresholds(const Take& take) {
  for (const DType dtype : kDTypes)
    for (const char* structure : {"one", "together", "filter", "2:4"})
      for (const NamedFill& fill : kFills) {
        std::string name = "hard_threshold";
        for (const char* word : {name_of(dtype), structure, fill.name}) (name += ' ') += word;
        take(name, [&](Memory& memory) {
          with_storage(dtype, [&](auto tag) { threshold<decltype(tag)>(structure, dtype, fill.fill, memory); });
        });
      }
}

}  // namespace cases
