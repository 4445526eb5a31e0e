// SPDX-License-Identifier: Apache-2.0
// Hard thresholding: exactly which k elements are the largest in magnitude, of one tensor, of several, or of a row of
// norms.
//
// Elements are ordered by a key, the bits of |x|: a larger magnitude has a larger key. Among equal keys the element at
// the lower place comes first. The k-th element in that order is found digit by digit, from the top digit of the key
// on. Among the elements that agree with the digits found so far, count how many have each value of the next digit;
// take the value at which the count from above reaches k; go on with the next digit. If elements with equal keys are
// left after the digits of the key, the digits of the place follow. Counts are integers, whose sum does not depend on
// the order of addition, so the result does not depend on threads and blocks. docs/pruning.md has the derivation; the
// reference in PyTorch finds the same elements by sorting.
#pragma once

#include <vector>

#include "lanes.h"
#include "params.h"
#include "storage.h"

namespace csgd {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kNormLanes = 32;  // partial sums of a norm

template <class T>
struct KeyType;
template <>
struct KeyType<float> {
  using Type = uint32_t;
};
template <>
struct KeyType<double> {
  using Type = uint64_t;
};

// The key of an element: the bits of |value|, an integer >= 0, below a highest bit that is set while the element is
// alive. An element that was dropped for good has key 0, below all others. NaN is above Inf, and all NaN are equal:
// each counts as the quiet NaN, which has one bit pattern in 16 bits as well.
template <class T>
CSGD_HOST_DEVICE typename KeyType<T>::Type key_of(T value, bool alive) {
  using Bits = FloatBits<T>;
  using Key = typename KeyType<T>::Type;
  constexpr typename Bits::Type kNaN = Bits::kInfinity | Bits::kInfinity >> 1;
  const auto magnitude = bit_cast<typename Bits::Type>(value) & Bits::kMagnitude;
  const auto ordered = select(magnitude > Bits::kInfinity, kNaN, magnitude);
  const Key key = static_cast<Key>(ordered) | ~static_cast<Key>(Bits::kMagnitude);
  return alive ? key : Key{0};
}

// The last survivor of a selection, as far as it has been found. All zero at the start.
struct Selection {
  uint64_t key;       // the digits of its key found so far, the rest 0
  uint64_t from_end;  // likewise the digits of its place among equal keys, counted from the selection's end
  int64_t taken;      // survivors already known to come before it
  int64_t done;       // not 0: every element that agrees with the digits found so far survives
};

// A selection and the counts of the current digit. On a GPU all blocks of a launch add to one of these, and the last
// block leaves zeros.
struct SelectionScratch {
  Selection state;
  unsigned long long blocks_done;
  unsigned long long bins[kBins];
};

// One tensor to threshold, seen as `numel` elements in memory order. All pointers live on one device.
struct ThresholdTensor {
  DType dtype;
  uint32_t first_block;   // on a GPU: the first block of the launch that works on it; set by the launcher
  void* data;             // elements that do not survive become +0
  void* momentum_buffer;  // same dtype and memory order; becomes +0 where `data` does; null: not changed
  bool* mask;             // an entry for each element, or channel; false: dropped for good; null: no mask
  double* norms;          // room for the squared norm of each channel
  int64_t numel;
  int64_t channels;          // the channel of element i is i / inner % channels
  int64_t inner;             // consecutive elements that share a channel
  int64_t first;             // place of the first element in its selection
  int64_t keep;              // survivors of the selection
  int64_t total;             // elements of the selection
  int64_t selection;         // number of the selection that the tensor belongs to
  int64_t selection_blocks;  // on a GPU: blocks of the selection in one pass; set by the launcher
};

// A digit of the key, or of the place.
struct DigitPass {
  int32_t of_place;
  int32_t shift;  // of its lowest bit
  int32_t bits;
};

// The bits of a word from `shift` on; `shift` may be as large as the number of bits.
template <class Word>
CSGD_HOST_DEVICE Word above(Word word, int shift) {
  return shift >= static_cast<int>(8 * sizeof(Word)) ? Word{0} : static_cast<Word>(word >> shift);
}

// The digit of an element, or -1 where the element does not agree with the digits found so far.
template <class Key>
CSGD_HOST_DEVICE int digit_of(const Selection& selection, const DigitPass& pass, Key key, uint64_t from_end) {
  const int top = pass.shift + pass.bits;
  const uint32_t mask = (1u << pass.bits) - 1u;
  const Key key_found = static_cast<Key>(selection.key);
  if (pass.of_place == 0) {
    return above(key, top) == above(key_found, top) ? static_cast<int>(static_cast<uint32_t>(key >> pass.shift) & mask)
                                                    : -1;
  }
  if (key != key_found || above(from_end, top) != above(selection.from_end, top)) return -1;
  return static_cast<int>(static_cast<uint32_t>(from_end >> pass.shift) & mask);
}

// Takes the next digit, now that it is found: `more` elements have a larger digit, `own` the same one. `keep`:
// survivors of the selection.
CSGD_HOST_DEVICE void take_digit(Selection& selection, const DigitPass& pass, int digit, int64_t more, int64_t own,
                                 int64_t keep) {
  const uint64_t bits = static_cast<uint64_t>(digit) << pass.shift;
  (pass.of_place == 0 ? selection.key : selection.from_end) |= bits;
  selection.taken += more;
  selection.done = keep - selection.taken == own ? 1 : 0;
}

CSGD_HOST_DEVICE bool is_trivial(const ThresholdTensor& tensor) {
  return tensor.keep <= 0 || tensor.keep >= tensor.total;
}

// Whether the element survives, once the selection is done.
template <class Key>
CSGD_HOST_DEVICE bool survives(const ThresholdTensor& tensor, const Selection& selection, Key key, uint64_t from_end) {
  if (is_trivial(tensor)) return tensor.keep > 0;
  const Key last = static_cast<Key>(selection.key);
  return key > last || (key == last && from_end >= selection.from_end);
}

CSGD_HOST_DEVICE uint64_t from_end(const ThresholdTensor& tensor, int64_t position) {
  return static_cast<uint64_t>(tensor.total - 1 - tensor.first - position);
}

// Which two of four survive, a bit for each: the two largest keys; of equal keys the first.
template <class Key>
CSGD_HOST_DEVICE unsigned two_of_four(const Key (&keys)[4]) {
  unsigned kept = 0;
  for (int j = 0; j < 4; ++j) {
    int before = 0;
    for (int other = 0; other < 4; ++other) {
      before += keys[other] > keys[j] || (keys[other] == keys[j] && other < j) ? 1 : 0;
    }
    kept |= before < 2 ? 1u << j : 0u;
  }
  return kept;
}

// The position of the first element of group number `four`. The four elements of a group are `tensor.inner` apart.
CSGD_HOST_DEVICE int64_t position_of_four(const ThresholdTensor& tensor, int64_t four) {
  const int64_t fours = four / tensor.inner;  // groups before this one, except those of the same channels
  const int64_t in_channels = tensor.channels / 4;
  const int64_t outer = fours / in_channels, first_channel = fours % in_channels * 4;
  return (outer * tensor.channels + first_channel) * tensor.inner + four % tensor.inner;
}

// The position of element `k` of a channel, counted in memory order.
CSGD_HOST_DEVICE int64_t position_in_channel(const ThresholdTensor& tensor, int64_t channel, int64_t k) {
  return (k / tensor.inner * tensor.channels + channel) * tensor.inner + k % tensor.inner;
}

// The digits to find for all these tensors, which are all of float64 or none.
inline std::vector<DigitPass> digit_passes(const std::vector<ThresholdTensor>& tensors) {
  int key_bits = 32, lowest = 32, place_bits = 0;
  for (const ThresholdTensor& tensor : tensors) {
    if (tensor.dtype == DType::kFloat64) key_bits = 64;
    const int empty = with_storage(tensor.dtype, [](auto tag) { return Storage<decltype(tag)>::kEmptyBits; });
    lowest = lowest < empty ? lowest : empty;
    while (above(static_cast<uint64_t>(tensor.total), place_bits) != 0) ++place_bits;
  }
  std::vector<DigitPass> passes;
  const auto add = [&](int32_t of_place, int top, int end) {
    while (top > end) {
      const int bits = top - end < kDigitBits ? top - end : kDigitBits;
      top -= bits;
      passes.push_back({of_place, top, bits});
    }
  };
  add(0, key_bits, lowest);
  add(1, place_bits, 0);
  return passes;
}

}  // namespace csgd
