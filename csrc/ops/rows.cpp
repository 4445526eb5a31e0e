// SPDX-License-Identifier: Apache-2.0
// The operators write_rows and read_rows of the gradient exchange: rows of packed sums in the shorter of two forms, as
// words, or as planes of bits where these take fewer bytes. csgd_cuda/distributed/coding.py documents them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../cpu/exchange_cpu.h"
#include "../cpu/planes_cpu.h"
#include "parallel.h"
#include "words.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/planes_cuda.h"
#endif

namespace csgd {
namespace {

constexpr int64_t kWordBytes = sizeof(uint32_t);

uint32_t checked_most(int64_t most) {
  TORCH_CHECK_VALUE(most >= 1 && most <= kMostExchangeRanks, "most must be in 1 ... ", kMostExchangeRanks, ", got ",
                    most);
  return static_cast<uint32_t>(most);
}

// Checks the arguments of read_rows. Returns where each row begins in the message, and where the last one ends.
std::vector<int64_t> checked_begins(const at::Tensor& message, at::IntArrayRef lengths, int64_t count) {
  TORCH_CHECK_VALUE(message.scalar_type() == at::kByte && message.dim() == 1 && message.is_contiguous(),
                    "message must be a contiguous uint8 tensor of shape (bytes,), got ", message.scalar_type(),
                    " of shape ", message.sizes());
  TORCH_CHECK_VALUE(count >= 0, "words must be >= 0, got ", count);
  std::vector<int64_t> begins = {0};
  for (const int64_t length : lengths) {
    TORCH_CHECK_VALUE(length >= 0 && length <= count * kWordBytes, "a row has ", length, " bytes, its words only ",
                      count * kWordBytes);
    begins.push_back(begins.back() + length);
  }
  TORCH_CHECK_VALUE(begins.back() == message.numel(), "lengths add up to ", begins.back(), " bytes, but message has ",
                    message.numel());
  return begins;
}

void check_whole(bool whole, int64_t row, int64_t bytes) {
  TORCH_CHECK_VALUE(whole, "row ", row, " has ", bytes, " bytes, which are not those of its planes");
}

// On the CPU the threads divide the rows between them.

// The words and digits of a row, with memory for the digits.
struct RowOfDigits {
  RowOfDigits(int64_t words, uint32_t most)
      : radix(2 * most + 1),
        places(digits_per_word(radix)),
        memory(static_cast<size_t>(words * places * digit_size(radix))),
        planes{memory.data(), words * places, most} {}

  uint32_t radix;
  int places;
  std::vector<uint8_t> memory;
  PlanesCall planes;
};

std::tuple<at::Tensor, at::Tensor> write_rows_cpu(const at::Tensor& words, int64_t most) {
  check_words(words);
  const uint32_t checked = checked_most(most);
  const int64_t rows = words.size(0), count = words.size(1), limit = count * kWordBytes;
  at::Tensor out = words.new_empty({rows, limit}, at::kByte), lengths = words.new_empty({rows}, at::kLong);
  auto* to = out.data_ptr<uint8_t>();
  auto* bytes = lengths.data_ptr<int64_t>();
  parallel_for(0, rows, 1, [&, loops = exchange_loops()](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const uint32_t* from = const_data_of(words) + row * count;
      RowOfDigits digits(count, checked);
      loops.unpack({from, digits.planes.digits, count, digits.radix, digits.places}, 0, count);
      bytes[row] = write_planes(digits.planes, to + row * limit, limit);
      if (bytes[row] == limit) std::memcpy(to + row * limit, from, static_cast<size_t>(limit));
    }
  });
  return {out, lengths};
}

at::Tensor read_rows_cpu(const at::Tensor& message, at::IntArrayRef lengths, int64_t count, int64_t most) {
  const std::vector<int64_t> begins = checked_begins(message, lengths, count);
  const uint32_t checked = checked_most(most);
  const auto rows = static_cast<int64_t>(lengths.size());
  at::Tensor out = message.new_empty({rows, count}, at::kInt);
  const auto* from = message.const_data_ptr<uint8_t>();
  parallel_for(0, rows, 1, [&, loops = exchange_loops()](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const uint8_t* own = from + begins[static_cast<size_t>(row)];
      const int64_t bytes = lengths[static_cast<size_t>(row)];
      uint32_t* to = data_of(out) + row * count;
      if (bytes == count * kWordBytes) {
        if (bytes > 0) std::memcpy(to, own, static_cast<size_t>(bytes));
        continue;
      }
      RowOfDigits digits(count, checked);
      check_whole(read_planes(digits.planes, own, bytes), row, bytes);
      const int64_t numel = digits.planes.count;
      loops.pack({digits.planes.digits, to, numel, numel, count, 1, digits.radix, digits.places}, 0, count);
    }
  });
  return out;
}

#if CSGD_WITH_CUDA
// On CUDA, on torch's current stream.

PlaneRows rows_of(int64_t rows, int64_t words, uint32_t most) {
  const uint32_t radix = 2 * most + 1;
  return {rows, words, radix, most, digits_per_word(radix)};
}

std::tuple<at::Tensor, at::Tensor> write_rows_cuda(const at::Tensor& words, int64_t most) {
  check_words(words);
  const PlaneRows of = rows_of(words.size(0), words.size(1), checked_most(most));
  at::Tensor out = words.new_zeros({of.rows, of.words * kWordBytes}, at::kByte);
  at::Tensor lengths = words.new_zeros({of.rows}, at::kLong);
  if (of.words > 0) {
    const c10::cuda::CUDAGuard guard(words.device());
    const at::Tensor counts = words.new_empty({plane_counts(of)}, at::kLong);
    C10_CUDA_CHECK(launch_write_planes_cuda(
        {of, const_data_of(words), out.data_ptr<uint8_t>(), lengths.data_ptr<int64_t>(), counts.data_ptr<int64_t>()},
        c10::cuda::getCurrentCUDAStream()));
  }
  return {out, lengths};
}

at::Tensor read_rows_cuda(const at::Tensor& message, at::IntArrayRef lengths, int64_t count, int64_t most) {
  const std::vector<int64_t> begins = checked_begins(message, lengths, count);
  const PlaneRows of = rows_of(static_cast<int64_t>(lengths.size()), count, checked_most(most));
  at::Tensor out = message.new_empty({of.rows, count}, at::kInt);
  if (out.numel() == 0) return out;
  const c10::cuda::CUDAGuard guard(message.device());
  const auto entries = static_cast<int64_t>(begins.size());
  const at::Tensor on_host = message.new_empty({entries}, at::TensorOptions(at::kLong).device(at::kCPU));
  std::copy(begins.begin(), begins.end(), on_host.data_ptr<int64_t>());
  const at::Tensor on_gpu = on_host.to(message.device());
  const at::Tensor tables = on_gpu.new_empty({plane_tables(of)}), ranks = on_gpu.new_empty({plane_ranks(of)});
  const at::Tensor broken = message.new_empty({of.rows}, at::kBool);
  C10_CUDA_CHECK(
      launch_read_planes_cuda({of, message.const_data_ptr<uint8_t>(), on_gpu.const_data_ptr<int64_t>(), data_of(out),
                               broken.data_ptr<bool>(), tables.data_ptr<int64_t>(), ranks.data_ptr<int64_t>()},
                              c10::cuda::getCurrentCUDAStream()));
  const at::Tensor found = broken.cpu();  // waits for the GPU
  for (int64_t row = 0; row < of.rows; ++row) {
    check_whole(!found.const_data_ptr<bool>()[row], row, lengths[static_cast<size_t>(row)]);
  }
  return out;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(csgd_cuda, m) {
  m.def("write_rows(Tensor words, int most) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("read_rows(Tensor message, int[] lengths, int words, int most) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) {
  m.impl("write_rows", write_rows_cpu);
  m.impl("read_rows", read_rows_cpu);
}

#if CSGD_WITH_CUDA
TORCH_LIBRARY_IMPL(csgd_cuda, CUDA, m) {
  m.impl("write_rows", write_rows_cuda);
  m.impl("read_rows", read_rows_cuda);
}
#endif

}  // namespace csgd
