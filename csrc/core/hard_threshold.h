// SPDX-License-Identifier: Apache-2.0
// Hard thresholding: which k elements of a tensor, of several, or of a row of norms are the largest, exactly.
//
// Elements are ordered by a key, the bits of |x|, of which a larger magnitude has the larger ones, and among equal keys
// by their place, the lower one first. The k-th in that order is found digit by digit, from the top: count how many
// elements have each value of the digit among those that agree with the digits found so far, take the value at which
// the count from above reaches k, go on with the next digit; first those of the key, then, where equal keys are left,
// those of the place. Counts are integers, which add up in any order: the result depends on no thread and no block.
// docs/pruning.md has the derivation; csgd_cuda/thresholding.py is the same in PyTorch.
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

// The key of an element: the bits of |value|, an integer >= 0, below a highest bit that is set where the element is
// alive. What was dropped for good has the key 0, below all others. NaN is above Inf, and all NaN are equal: the quiet
// NaN, which is one in 16 bits as well.
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

// The last survivor of a selection, as far as it is known. All zero at the start.
struct Selection {
  uint64_t key;       // its key: the digits found so far, the rest 0
  uint64_t from_end;  // likewise, among elements of that key, its place counted from the selection's end
  int64_t taken;      // survivors known to be above
  int64_t done;       // not 0: all that agrees with the digits found so far survives
};

// A selection and the counts of the digit at hand. On a GPU the blocks of a launch meet there, and leave zeros.
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
  void* momentum_buffer;  // of the same dtype and memory order; becomes +0 where `data` does; null: is left alone
  bool* mask;             // false: dropped for good. One for each element, or each channel; null: there is none
  double* norms;          // room for the squared norm of each channel
  int64_t numel;
  int64_t channels;          // of an element at i: i / inner % channels
  int64_t inner;             // consecutive elements that share a channel
  int64_t first;             // place of the first element in its selection
  int64_t keep;              // survivors of the selection
  int64_t total;             // elements of the selection
  int64_t selection;         // number of its selection
  int64_t selection_blocks;  // on a GPU: of all launches of one pass; set by the launcher
};

// A digit of the key, or of the place.
struct DigitPass {
  int32_t of_place;
  int32_t shift;  // of its lowest bit
  int32_t bits;
};

// The bits from `shift` on, which may be as many as there are.
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

// The next digit is found: `more` elements have a larger one, `own` the same. `keep`: survivors of the selection.
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

// Which two of four survive, as bits: those of the largest keys, of equal ones the first.
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

// Position of the first element of the four, `tensor.inner` apart from each other, that count as the given one.
CSGD_HOST_DEVICE int64_t position_of_four(const ThresholdTensor& tensor, int64_t four) {
  const int64_t fours = four / tensor.inner;  // all before this one, but those of the same channels
  const int64_t in_channels = tensor.channels / 4;
  const int64_t outer = fours / in_channels, first_channel = fours % in_channels * 4;
  return (outer * tensor.channels + first_channel) * tensor.inner + four % tensor.inner;
}

// Position of element `k` of a channel, counted in memory order.
CSGD_HOST_DEVICE int64_t position_in_channel(const ThresholdTensor& tensor, int64_t channel, int64_t k) {
  return (k / tensor.inner * tensor.channels + channel) * tensor.inner + k % tensor.inner;
}

// The digits to go through for all these tensors, which are all of float64 or none.
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
