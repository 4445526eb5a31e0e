// SPDX-License-Identifier: Apache-2.0
// The operators of the gradient exchange: encode_codes, pack_codes, add_codes, decode_sums; rows.cpp has two more.
// csgd_cuda/distributed/coding.py documents them.
#include "../core/exchange.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../cpu/exchange_cpu.h"
#include "parallel.h"
#include "tensors.h"
#include "words.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/exchange_cuda.h"
#endif

namespace csgd {
namespace {

// The functions that run the packed calls on one device.
struct ExchangeDevice {
  void (*encode)(DType, const std::vector<EncodeCall>&, c10::Device);
  void (*pack)(const PackCall&, c10::Device);
  void (*add)(const AddCall&, c10::Device);
  void (*decode)(DType, const std::vector<DecodeCall>&, c10::Device);
};

int64_t words_for(int64_t count, int64_t radix) {
  const int64_t places = digits_per_word(radix);
  return (count + places - 1) / places;
}

// Words that hold the codes of one rank's shard. All shards have the same length, a multiple of what a word holds.
int64_t code_words_of_shard(int64_t count, int64_t ranks) {
  return (count + ranks * kCodesPerWord - 1) / (ranks * kCodesPerWord);
}

int64_t sum_radix(int64_t ranks) { return 2 * ranks + 1; }

void check_grads(at::TensorList grads, c10::Device device) {
  for (size_t k = 0; k < grads.size(); ++k) {
    const at::Tensor& grad = grads[k];
    TORCH_CHECK_TYPE(grad.layout() == at::kStrided, "grads[", k, "] is sparse (", grad.layout(),
                     "), codes need dense gradients");
    const auto dtype = grad.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "grads[", k, "] has dtype ",
                     dtype, "; codes stand for float32, bfloat16 and float16");
    TORCH_CHECK_VALUE(dtype == grads[0].scalar_type() && grad.device() == device && grad.is_contiguous(), "grads[", k,
                      "] must be a contiguous ", grads[0].scalar_type(), " tensor on ", device, ", got ", dtype, " on ",
                      grad.device());
    TORCH_CHECK_VALUE(grad.numel() <= int64_t{1} << kDigitPositionShift, "grads[", k, "] has ", grad.numel(),
                      " elements, 2^40 at most can be encoded");
  }
}

void check_per_grad(const at::Tensor& t, at::TensorList grads, const char* name) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kDouble && t.is_contiguous() && t.numel() == int64_t(grads.size()), name,
                    " must be a contiguous float64 tensor with an entry for each of the ", grads.size(),
                    " gradients, got ", t.scalar_type(), " of shape ", t.sizes());
}

template <const ExchangeDevice& device>
at::Tensor encode_codes(at::TensorList grads, const at::Tensor& bounds, at::IntArrayRef indices, int64_t seed,
                        int64_t step, bool antithetic) {
  check_grads(grads, bounds.device());
  check_per_grad(bounds, grads, "bounds");
  TORCH_CHECK_VALUE(indices.size() == grads.size(), "indices must have an entry for each of the ", grads.size(),
                    " gradients, got ", indices.size());
  int64_t numel = 0;
  for (size_t k = 0; k < grads.size(); ++k) {
    TORCH_CHECK_VALUE(indices[k] >= 0 && indices[k] <= 0xFFFFFFFF, "indices must be in 0 ... 2^32-1, got ", indices[k]);
    numel += grads[k].numel();
  }
  at::Tensor codes = bounds.new_empty({numel}, at::kByte);
  auto* to = codes.data_ptr<uint8_t>();
  std::vector<EncodeCall> calls;
  for (size_t k = 0; k < grads.size(); ++k) {
    EncodeCall call{};
    call.grad = grads[k].const_data_ptr();
    call.codes = to;
    call.bound = bounds.const_data_ptr<double>() + k;
    call.numel = grads[k].numel();
    call.seed = static_cast<uint64_t>(seed);
    call.index = static_cast<uint32_t>(indices[k]);
    call.step = static_cast<uint32_t>(step);
    call.antithetic = antithetic ? kAllDraws : 0;
    if (call.numel > 0) calls.push_back(call);
    to += call.numel;
  }
  if (!calls.empty()) device.encode(dtype_of(grads[0]), calls, bounds.device());
  return codes;
}

template <const ExchangeDevice& device>
at::Tensor pack_codes(const at::Tensor& codes, int64_t rows) {
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 1 && codes.is_contiguous(),
                    "codes must be a contiguous uint8 tensor of shape (count,), got ", codes.scalar_type(),
                    " of shape ", codes.sizes());
  TORCH_CHECK_VALUE(rows >= 1 && rows <= kMostExchangeRanks, "rows must be in 1 ... ", kMostExchangeRanks, ", got ",
                    rows);
  PackCall call{};
  call.numel = codes.numel();
  call.rows = rows;
  call.words_per_row = code_words_of_shard(call.numel, rows);
  call.row = call.words_per_row * kCodesPerWord;
  call.radix = kCodeRadix;
  call.places = kCodesPerWord;
  at::Tensor words = codes.new_empty({rows, call.words_per_row}, at::kInt);
  call.digits = codes.const_data_ptr<uint8_t>();
  call.words = data_of(words);
  if (words.numel() > 0) device.pack(call, codes.device());
  return words;
}

template <const ExchangeDevice& device>
at::Tensor add_codes(const at::Tensor& words) {
  check_words(words);
  AddCall call{};
  call.codes = const_data_of(words);
  call.ranks = words.size(0);
  call.code_words = words.size(1);
  PackCall& sums = call.sums;
  sums.row = sums.numel = call.code_words * kCodesPerWord;
  sums.rows = 1;
  sums.radix = static_cast<uint32_t>(sum_radix(call.ranks));
  sums.places = digits_per_word(sums.radix);
  sums.words_per_row = words_for(sums.row, sums.radix);
  at::Tensor out = words.new_empty({sums.words_per_row});
  sums.words = data_of(out);
  if (out.numel() > 0) device.add(call, words.device());
  return out;
}

template <const ExchangeDevice& device>
void decode_sums(const at::Tensor& words, const at::Tensor& units, at::TensorList grads) {
  check_words(words);
  check_grads(grads, words.device());
  check_per_grad(units, grads, "units");
  TORCH_CHECK_VALUE(units.device() == words.device(), "units must be on ", words.device(), ", as words are, got ",
                    units.device());
  int64_t numel = 0;
  for (const at::Tensor& grad : grads) numel += grad.numel();
  const int64_t ranks = words.size(0), shard = code_words_of_shard(numel, ranks) * kCodesPerWord;
  TORCH_CHECK_VALUE(words.size(1) == words_for(shard, sum_radix(ranks)), "words must have ",
                    words_for(shard, sum_radix(ranks)), " columns, for the sums of ", numel, " codes of ", ranks,
                    " ranks, got ", words.size(1));
  std::vector<DecodeCall> calls;
  int64_t first = 0;
  for (size_t k = 0; k < grads.size(); ++k) {
    DecodeCall call{};
    call.words = const_data_of(words);
    call.unit = units.const_data_ptr<double>() + k;
    call.grad = grads[k].data_ptr();
    call.numel = grads[k].numel();
    call.first = first;
    call.shard = shard;
    call.words_per_shard = words.size(1);
    call.ranks = ranks;
    call.radix = static_cast<uint32_t>(sum_radix(ranks));
    if (call.numel > 0) calls.push_back(call);
    first += call.numel;
  }
  if (!calls.empty()) device.decode(dtype_of(grads[0]), calls, words.device());
  bump_versions({grads});
}

// On the CPU: torch's threads divide the elements, or words, between them.

constexpr int64_t kWordsPerGrain = kExchangeGrain / kCodesPerWord;

// Calls f(call, begin, end) for the elements of all calls, a grain at a time.
template <class Call, class F>
void share_out(const std::vector<Call>& calls, F f) {
  std::vector<int64_t> first = {0};  // number of the first grain of each call
  for (const Call& call : calls) first.push_back(first.back() + (call.numel + kExchangeGrain - 1) / kExchangeGrain);
  parallel_for(0, first.back(), 2, [&](int64_t grain, int64_t last) {
    auto k = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), grain) - first.begin() - 1);
    for (; grain < last; ++grain) {
      while (grain >= first[k + 1]) ++k;
      const int64_t begin = (grain - first[k]) * kExchangeGrain;
      f(calls[k], begin, std::min(begin + kExchangeGrain, calls[k].numel));
    }
  });
}

void encode_cpu(DType dtype, const std::vector<EncodeCall>& calls, c10::Device) {
  share_out(calls, [&, loops = exchange_loops()](const EncodeCall& call, int64_t begin, int64_t end) {
    loops.encode(dtype, call, begin, end);
  });
}

void pack_cpu(const PackCall& call, c10::Device) {
  parallel_for(0, call.rows * call.words_per_row, kWordsPerGrain,
               [&, loops = exchange_loops()](int64_t begin, int64_t end) { loops.pack(call, begin, end); });
}

void add_cpu(const AddCall& given, c10::Device device) {
  std::vector<uint8_t> digits(static_cast<size_t>(given.sums.row * digit_size(given.sums.radix)));
  AddCall call = given;
  call.sums.digits = digits.data();
  parallel_for(0, call.code_words, kWordsPerGrain,
               [&, loops = exchange_loops()](int64_t begin, int64_t end) { loops.add(call, begin, end); });
  pack_cpu(call.sums, device);
}

void decode_cpu(DType dtype, const std::vector<DecodeCall>& calls, c10::Device) {
  share_out(calls, [&, loops = exchange_loops()](const DecodeCall& call, int64_t begin, int64_t end) {
    loops.decode(dtype, call, begin, end);
  });
}

const ExchangeDevice kExchangeCpu = {encode_cpu, pack_cpu, add_cpu, decode_cpu};

#if CSGD_WITH_CUDA
// On CUDA, on torch's current stream: encode and decode make a launch for each gradient, the others one.

void encode_on_cuda(DType dtype, const std::vector<EncodeCall>& calls, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  for (const EncodeCall& call : calls) {
    C10_CUDA_CHECK(launch_encode_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
  }
}

void pack_on_cuda(const PackCall& call, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_pack_cuda(call, c10::cuda::getCurrentCUDAStream()));
}

void add_on_cuda(const AddCall& call, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_add_cuda(call, c10::cuda::getCurrentCUDAStream()));
}

void decode_on_cuda(DType dtype, const std::vector<DecodeCall>& calls, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  for (const DecodeCall& call : calls) {
    C10_CUDA_CHECK(launch_decode_cuda(dtype, call, c10::cuda::getCurrentCUDAStream()));
  }
}

const ExchangeDevice kExchangeCuda = {encode_on_cuda, pack_on_cuda, add_on_cuda, decode_on_cuda};
#endif

[[noreturn]] void no_kernel(c10::Device device) {
  TORCH_CHECK(false, "codes have no kernel for tensors on ", device, " in this build; see csgd_cuda.show_config()");
}

const ExchangeDevice kExchangeNowhere = {
    [](DType, const std::vector<EncodeCall>&, c10::Device device) { no_kernel(device); },
    [](const PackCall&, c10::Device device) { no_kernel(device); },
    [](const AddCall&, c10::Device device) { no_kernel(device); },
    [](DType, const std::vector<DecodeCall>&, c10::Device device) { no_kernel(device); },
};

// Registers the four operators for a dispatch key.
template <const ExchangeDevice& device, class Library>
void add_exchange(Library& m) {
  m.impl("encode_codes", encode_codes<device>);
  m.impl("pack_codes", pack_codes<device>);
  m.impl("add_codes", add_codes<device>);
  m.impl("decode_sums", decode_sums<device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) {
  m.def(
      "encode_codes(Tensor[] grads, Tensor bounds, int[] indices, *, int seed, int step, bool antithetic=False) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("pack_codes(Tensor codes, int rows) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("add_codes(Tensor words) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("decode_sums(Tensor words, Tensor units, Tensor(a!)[] grads) -> ()", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { add_exchange<kExchangeCpu>(m); }

#if CSGD_WITH_CUDA
TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) { add_exchange<kExchangeCuda>(m); }
#endif

TORCH_LIBRARY_IMPL(csgd_cuda, CompositeExplicitAutograd, m) { add_exchange<kExchangeNowhere>(m); }

}  // namespace csgd
