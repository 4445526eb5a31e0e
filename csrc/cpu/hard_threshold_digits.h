// SPDX-License-Identifier: Apache-2.0
// Counting the digits of a range of elements on the CPU: in blocks, by loops that compilers vectorise.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

constexpr int64_t kBlock = 256;  // elements of a block

template <class S>
auto key_at(const S* data, const bool* mask, int64_t i) {
  return key_of(Storage<S>::load(data[i]), mask == nullptr || mask[i]);
}

// Elements of equal digits often follow each other. With several rows of counters, used in turn, an increment need not
// wait for the one just before it.
constexpr int64_t kRows = 4;
struct Counts {
  std::vector<uint32_t> rows = std::vector<uint32_t>(kRows * kBins, 0);
};

template <class S>
void count_digit(const ThresholdTensor& tensor, const Selection& found, const DigitPass& pass, const S* data, int64_t i,
                 uint32_t* row) {
  const int digit = digit_of(found, pass, key_at(data, tensor.mask, i), from_end(tensor, i));
  if (digit >= 0) ++row[digit];
}

// Clears the flags of elements that the mask says are dropped. Reads the mask as bytes, for which compilers make vector
// loads.
inline void and_mask(const bool* mask, int64_t count, uint8_t* flags) {
  const uint8_t* alive = reinterpret_cast<const uint8_t*>(mask);
  for (int64_t k = 0; k < count; ++k) flags[k] &= alive[k];
}

// Finds, of `count` elements, those that are alive and whose key agrees with `wanted` in the digits above bit `top`.
template <class S, class Key>
void find_agreeing(const S* data, const bool* mask, int64_t count, int top, Key wanted, uint8_t* agrees) {
  for (int64_t k = 0; k < count; ++k) agrees[k] = (key_at(data, nullptr, k) >> top) == wanted ? 1 : 0;
  if (mask != nullptr) and_mask(mask, count, agrees);
}

// Counts the first digit, in which every element takes part.
template <class S>
void count_first_digits(const bool* mask, const DigitPass& pass, const S* data, int64_t begin, int64_t end,
                        uint32_t* rows) {
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t count = std::min(kBlock, end - from);
    uint16_t digits[kBlock];
    for (int64_t k = 0; k < count; ++k) {
      digits[k] = static_cast<uint16_t>(key_at(data, nullptr, from + k) >> pass.shift);
    }
    if (mask != nullptr) {
      const uint8_t* alive = reinterpret_cast<const uint8_t*>(mask) + from;
      for (int64_t k = 0; k < count; ++k) digits[k] = choose_bits(alive[k], digits[k], uint16_t{0});
    }
    for (int64_t k = 0; k < count; ++k) ++rows[k % kRows * kBins + digits[k]];
  }
}

template <class S>
void count_digits(const ThresholdTensor& tensor, const Selection& selection, const DigitPass& pass, const S* data,
                  int64_t begin, int64_t end, uint32_t* rows) {
  using Key = decltype(key_at(data, nullptr, 0));
  const DigitPass own_pass = pass;  // a copy, which writes to the counters cannot change
  const Selection found = selection;
  const int top = pass.of_place != 0 ? 0 : pass.shift + pass.bits;
  const Key wanted = above(static_cast<Key>(found.key), top);
  if (top == 8 * static_cast<int>(sizeof(Key)))
    return count_first_digits(tensor.mask, own_pass, data, begin, end, rows);
  if (wanted == 0) {  // the threshold is among the elements that were dropped for good
    for (int64_t i = begin; i < end; ++i) count_digit(tensor, found, own_pass, data, i, rows + i % kRows * kBins);
    return;
  }
  // Few elements agree with the digits found so far. They are picked first, without a branch for each of the others.
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t count = std::min(kBlock, end - from);
    uint8_t agrees[kBlock] = {}, agreeing[kBlock + 8];
    find_agreeing(data + from, tensor.mask != nullptr ? tensor.mask + from : nullptr, count, top, wanted, agrees);
    int64_t candidates = 0;
    for (int64_t k = 0; k < kBlock; k += 8) {
      uint64_t any;
      std::memcpy(&any, agrees + k, sizeof(any));
      if (any == 0) continue;
      for (int64_t j = k; j < k + 8; ++j) {
        agreeing[candidates] = static_cast<uint8_t>(j);
        candidates += agrees[j];
      }
    }
    for (int64_t c = 0; c < candidates; ++c) {
      count_digit(tensor, found, own_pass, data, from + agreeing[c], rows + c % kRows * kBins);
    }
  }
}

}  // namespace csgd
