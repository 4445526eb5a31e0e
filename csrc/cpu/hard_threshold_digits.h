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

// Clears the flags of elements that the mask says are dropped. Reads the mask as bytes, for which compilers make vector
// loads.
inline void and_mask(const bool* mask, int64_t count, uint8_t* flags) {
  const uint8_t* alive = reinterpret_cast<const uint8_t*>(mask);
  for (int64_t k = 0; k < count; ++k) flags[k] &= alive[k];
}

// Finds, of `count` elements, those whose key agrees with `wanted` in the digits above bit `top`.
template <class S, class Key>
void find_agreeing(const S* data, const bool* mask, int64_t count, int top, Key wanted, uint8_t* agrees) {
  for (int64_t k = 0; k < count; ++k) agrees[k] = (key_at(data, nullptr, k) >> top) == wanted ? 1 : 0;
  if (mask == nullptr) return;
  if (wanted != 0) return and_mask(mask, count, agrees);
  for (int64_t k = 0; k < count; ++k) agrees[k] |= mask[k] ? 0 : 1;  // the key of a dropped element is 0
}

// The first digit of each of `count` elements, which all take part in it.
template <class S>
void first_digits(const S* data, const bool* mask, const DigitPass& pass, int64_t count, uint16_t* digits) {
  for (int64_t k = 0; k < count; ++k) digits[k] = static_cast<uint16_t>(key_at(data, nullptr, k) >> pass.shift);
  if (mask == nullptr) return;
  const uint8_t* alive = reinterpret_cast<const uint8_t*>(mask);
  for (int64_t k = 0; k < count; ++k) digits[k] = choose_bits(alive[k], digits[k], uint16_t{0});
}

// The digits of those of `count` elements from `from` on which agree with the digits found so far. Returns how many do.
// Few elements agree: they are picked first, without a branch for each of the others.
template <class S>
int64_t later_digits(const ThresholdTensor& tensor, const Selection& found, const DigitPass& pass, const S* data,
                     int64_t from, int64_t count, uint16_t* digits) {
  using Key = decltype(key_at(data, nullptr, 0));
  const int top = pass.of_place != 0 ? 0 : pass.shift + pass.bits;
  uint8_t agrees[kBlock] = {}, agreeing[kBlock + 8];
  find_agreeing(data + from, tensor.mask != nullptr ? tensor.mask + from : nullptr, count, top,
                above(static_cast<Key>(found.key), top), agrees);
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
  int64_t agreed = 0;
  for (int64_t c = 0; c < candidates; ++c) {
    const int64_t i = from + agreeing[c];
    const int digit = digit_of(found, pass, key_at(data, tensor.mask, i), from_end(tensor, i));
    digits[agreed] = static_cast<uint16_t>(digit);
    agreed += digit >= 0 ? 1 : 0;  // in the digits of the place, too
  }
  return agreed;
}

// Adds the digits of a range of elements to rows of counters.
template <class S>
void count_digits(const ThresholdTensor& tensor, const Selection& selection, const DigitPass& pass, const S* data,
                  int64_t begin, int64_t end, uint32_t* rows) {
  const DigitPass own_pass = pass;  // a copy, which writes to the counters cannot change
  const Selection found = selection;
  using Key = decltype(key_at(data, nullptr, 0));
  const bool first = pass.of_place == 0 && pass.shift + pass.bits == 8 * static_cast<int>(sizeof(Key));
  for (int64_t from = begin; from < end; from += kBlock) {
    int64_t count = std::min(kBlock, end - from);
    uint16_t digits[kBlock];
    if (first) {
      first_digits(data + from, tensor.mask != nullptr ? tensor.mask + from : nullptr, own_pass, count, digits);
    } else {
      count = later_digits(tensor, found, own_pass, data, from, count, digits);
    }
    for (int64_t k = 0; k < count; ++k) ++rows[k % kRows * kBins + digits[k]];
  }
}

}  // namespace csgd
