// SPDX-License-Identifier: Apache-2.0
// Tensors of packed words, as the operators of the gradient exchange take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace csgd {

constexpr int64_t kMostExchangeRanks = 1 << 16;

// The largest k with radix^k <= 2^32.
inline int digits_per_word(int64_t radix) {
  int count = 0;
  for (uint64_t power = radix; power <= uint64_t{1} << 32; power *= radix) ++count;
  return count;
}

// Checks rows of words, of which there is one for each rank.
inline void check_words(const at::Tensor& words) {
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt && words.dim() == 2 && words.is_contiguous(),
                    "words must be a contiguous int32 tensor of shape (ranks, words), got ", words.scalar_type(),
                    " of shape ", words.sizes());
  TORCH_CHECK_VALUE(words.size(0) >= 1 && words.size(0) <= kMostExchangeRanks, "words must have 1 ... ",
                    kMostExchangeRanks, " rows, got ", words.size(0));
}

inline uint32_t* data_of(const at::Tensor& words) { return reinterpret_cast<uint32_t*>(words.data_ptr<int32_t>()); }

inline const uint32_t* const_data_of(const at::Tensor& words) {
  return reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
}

}  // namespace csgd
