// SPDX-License-Identifier: Apache-2.0
// The gradient exchange on the CPU: elements and words, shared by torch's threads.
#include "../cpu/exchange_cpu.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "exchange.h"

namespace csgd {
namespace {

constexpr int64_t kWordsPerGrain = kExchangeGrain / kCodesPerWord;

// Calls f(call, begin, end) for the elements of all calls, in grains.
template <class Call, class F>
void share_out(const std::vector<Call>& calls, F f) {
  std::vector<int64_t> first = {0};  // grain of each call
  for (const Call& call : calls) first.push_back(first.back() + (call.numel + kExchangeGrain - 1) / kExchangeGrain);
  at::parallel_for(0, first.back(), 2, [&](int64_t grain, int64_t last) {
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
  at::parallel_for(0, call.rows * call.words_per_row, kWordsPerGrain,
                   [&, loops = exchange_loops()](int64_t begin, int64_t end) { loops.pack(call, begin, end); });
}

void add_cpu(const AddCall& given, c10::Device device) {
  std::vector<uint8_t> digits(static_cast<size_t>(given.sums.row * digit_size(given.sums.radix)));
  AddCall call = given;
  call.sums.digits = digits.data();
  at::parallel_for(0, call.code_words, kWordsPerGrain,
                   [&, loops = exchange_loops()](int64_t begin, int64_t end) { loops.add(call, begin, end); });
  pack_cpu(call.sums, device);
}

void decode_cpu(DType dtype, const std::vector<DecodeCall>& calls, c10::Device) {
  share_out(calls, [&, loops = exchange_loops()](const DecodeCall& call, int64_t begin, int64_t end) {
    loops.decode(dtype, call, begin, end);
  });
}

}  // namespace

const ExchangeDevice kExchangeCpu = {encode_cpu, pack_cpu, add_cpu, decode_cpu};

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { add_exchange<kExchangeCpu>(m); }

}  // namespace csgd
