// SPDX-License-Identifier: Apache-2.0
// The kernels of the gradient exchange, their own source emulated on the CPU, against the CPU loops: the same bits of
// the codes, the words, the sums and the gradients. Usage: exchange_against_cpu_loop [CASE]; exit status 0 if
// everything agrees.
#include <cmath>
#include <cstdio>
#include <limits>

#include "compare.h"
#include "csrc/cpu/exchange_cpu.h"
#include "csrc/cuda/exchange_cuda.h"

using namespace csgd;

namespace {

struct Case {
  const char* name;
  DType dtype = DType::kFloat32;
  int64_t numel = 5000;
  int ranks = 2;
  int offset = 0;  // elements that misalign the gradient
  double bound = 0.5;
  bool specials = false;  // NaN and Inf among the gradients
  double scale = 0.1;
  int multiprocessors = 2;
};

bool differ(const Case& c, const char* what) {
  return std::printf("%s, %d ranks: %s differs\n", c.name, c.ranks, what), false;
}

// What both sides make of a rank's gradient: true where codes and words agree; they are added to `words`.
bool encode_and_pack(const Case& c, int rank, Buffer& grad, int64_t row_words, std::vector<uint32_t>& words) {
  std::vector<uint8_t> codes(static_cast<size_t>(c.numel) + 1, 9), on_gpu = codes;
  EncodeCall call{};
  call.grad = data_of(grad, c.dtype, c.offset);
  call.codes = codes.data();
  call.bound = &c.bound;
  call.numel = c.numel;
  call.seed = 0x123456789ABCDEFull;
  call.index = static_cast<uint32_t>(rank / 2) << 16 | 5;
  call.antithetic = rank % 2 == 1 ? kAllDraws : 0;
  call.step = 7;
  exchange_loops().encode(c.dtype, call, 0, c.numel);
  call.codes = on_gpu.data();
  if (launch_encode_cuda(c.dtype, call, nullptr) != cudaSuccess || !same_bits(codes, on_gpu)) return differ(c, "code");

  std::vector<uint32_t> packed(static_cast<size_t>(c.ranks * row_words) + 1, 9), packed_on_gpu = packed;
  PackCall pack{codes.data(), packed.data(), c.numel,    row_words * kCodesPerWord,
                row_words,    c.ranks,       kCodeRadix, kCodesPerWord};
  exchange_loops().pack(pack, 0, c.ranks * row_words);
  pack.words = packed_on_gpu.data();
  if (launch_pack_cuda(pack, nullptr) != cudaSuccess || !same_bits(packed, packed_on_gpu)) return differ(c, "word");
  words.insert(words.end(), packed.begin(), packed.end() - 1);
  return true;
}

int places_of(uint32_t radix) {
  int count = 0;
  for (double power = radix; power <= 0x1p32; power *= radix) ++count;
  return count;
}

bool add_and_decode(const Case& c, int64_t row_words, const std::vector<uint32_t>& words) {
  const int64_t shard = row_words * kCodesPerWord;
  const auto radix = static_cast<uint32_t>(2 * c.ranks + 1);
  const int places = places_of(radix);
  const int64_t sum_words = (shard + places - 1) / places;
  std::vector<uint32_t> digits(static_cast<size_t>(shard)), sums(static_cast<size_t>(c.ranks * sum_words));
  for (int of = 0; of < c.ranks; ++of) {
    std::vector<uint32_t> received, on_gpu(static_cast<size_t>(sum_words) + 1, 9);
    for (int rank = 0; rank < c.ranks; ++rank) {
      const auto* row = words.data() + (rank * c.ranks + of) * row_words;
      received.insert(received.end(), row, row + row_words);
    }
    uint32_t* out = sums.data() + of * sum_words;
    AddCall call{received.data(), row_words, c.ranks, {digits.data(), out, shard, shard, sum_words, 1, radix, places}};
    exchange_loops().add(call, 0, row_words);
    exchange_loops().pack(call.sums, 0, sum_words);
    call.sums.words = on_gpu.data();
    if (launch_add_cuda(call, nullptr) != cudaSuccess) return differ(c, "launch");
    if (std::memcmp(out, on_gpu.data(), static_cast<size_t>(sum_words) * 4) != 0) return differ(c, "sum");
    if (on_gpu.back() != 9) return differ(c, "memory behind the sums");
  }
  Buffer grad, on_gpu;
  fill(c.dtype, grad, c.numel, c.offset, [] { return 3.0; });
  on_gpu = grad;
  const std::vector<double> unit = {c.bound / c.ranks};  // among what kernels may access
  // Two gradients of one bucket, of which the second begins anywhere.
  const int64_t cut = c.numel / 3;
  for (const auto& [first, numel] : {std::pair{int64_t{0}, cut}, std::pair{cut, c.numel - cut}}) {
    DecodeCall call{sums.data(), unit.data(), nullptr, numel, first, shard, sum_words, c.ranks, radix};
    const int at = c.offset + static_cast<int>(first);
    call.grad = data_of(grad, c.dtype, at);
    if (numel > 0) exchange_loops().decode(c.dtype, call, 0, numel);
    call.grad = data_of(on_gpu, c.dtype, at);
    if (numel > 0 && launch_decode_cuda(c.dtype, call, nullptr) != cudaSuccess) return differ(c, "launch");
  }
  for (Buffer* each : {&grad, &on_gpu}) unite_nans(c.dtype, *each);  // an infinite bound makes them
  return same_bits(grad, on_gpu) || differ(c, "gradient");
}

bool run(const Case& c) {
  static const double inf = std::numeric_limits<double>::infinity();
  static const double specials[] = {NAN, inf, -inf, 0.0, -0.0, 1e-310, 1e-40, 65504.0};
  cuda_emulation::multiprocessors = c.multiprocessors;
  Random random(static_cast<uint64_t>(c.numel));
  const int64_t row_words = (c.numel + c.ranks * kCodesPerWord - 1) / (c.ranks * kCodesPerWord);
  std::vector<uint32_t> words;
  for (int rank = 0; rank < c.ranks; ++rank) {
    Buffer grad;
    int64_t i = 0;
    fill(c.dtype, grad, c.numel, c.offset, [&] {
      const int64_t k = i++;
      return c.specials && k % 5 == 2 ? specials[k / 5 % 8] : c.scale * random.heavy_tailed();
    });
    if (!encode_and_pack(c, rank, grad, row_words, words)) return false;
  }
  if (!add_and_decode(c, row_words, words)) return false;
  std::printf("%s, %d ranks: %lld elements agree\n", c.name, c.ranks, static_cast<long long>(c.numel));
  return true;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const int64_t numel : {1, 8, 9, 20, 257, 2049, 5000}) {
      all.push_back({.name = "sizes", .dtype = dtype, .numel = numel});
    }
    all.push_back({.name = "NaN and Inf", .dtype = dtype, .numel = 2000, .specials = true});
  }
  for (const int ranks : {1, 3, 4, 17}) all.push_back({.name = "ranks", .numel = 300, .ranks = ranks});
  all.push_back({.name = "misaligned", .offset = 1});
  all.push_back({.name = "misaligned bfloat16", .dtype = DType::kBFloat16, .offset = 3});
  all.push_back({.name = "no bound", .numel = 300, .bound = 0.0});
  all.push_back({.name = "infinite bound", .numel = 300, .bound = HUGE_VAL, .specials = true});
  all.push_back({.name = "a tiny bound", .numel = 3000, .bound = 0x1p-130, .scale = 0x1p-134});
  // A 2^16th of it is no float32.
  all.push_back(
      {.name = "a bound where float32 decides nothing", .numel = 3000, .bound = 0x1.8p-134, .scale = 0x1p-138});
  // A card of one multiprocessor: blocks take several passes, and come in any order. Some first digits are ties.
  all.push_back({.name = "several passes", .numel = 60000, .multiprocessors = 1});
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool good = true;
  for (const Case& c : cases()) {
    if (is_compiled(c.dtype) && is_chosen(c.name, argc, argv)) good = good && run(c);
  }
  return good ? 0 : 1;
}
