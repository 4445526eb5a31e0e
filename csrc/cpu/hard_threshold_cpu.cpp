// SPDX-License-Identifier: Apache-2.0
#include "hard_threshold_cpu.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "hard_threshold_digits.h"

namespace csgd {
namespace {

constexpr int64_t kGrain = 32768;  // elements that a thread takes at a time

// Calls f with a pointer to the tensor's elements in the type in which they are stored.
template <class F>
void with_data(const ThresholdTensor& tensor, F f) {
  with_storage(tensor.dtype, [&](auto tag) { f(static_cast<decltype(tag)*>(tensor.data)); });
}

template <class S>
void drop(const ThresholdTensor& tensor, S* data, int64_t i) {
  data[i] = S{};
  if (tensor.momentum_buffer != nullptr) static_cast<S*>(tensor.momentum_buffer)[i] = S{};
}

// Divides the count(tensor) items of each tensor between threads, `grain` items at a time.
template <class Count, class Work>
void for_each_range(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for, int64_t grain,
                    Count count, Work work) {
  for (const ThresholdTensor& tensor : tensors) {
    const int64_t items = count(tensor);
    parallel_for((items + grain - 1) / grain,
                 [&](int64_t first, int64_t last) { work(tensor, first * grain, std::min(last * grain, items)); });
  }
}

int64_t numel_of(const ThresholdTensor& tensor) { return tensor.numel; }

void histogram(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for, const DigitPass& pass,
               SelectionScratch& scratch) {
  std::mutex merging;
  std::fill_n(scratch.bins, kBins, 0ULL);
  for_each_range(tensors, parallel_for, kGrain, numel_of,
                 [&](const ThresholdTensor& tensor, int64_t begin, int64_t end) {
                   Counts counts;
                   // A range may have more elements than a 32-bit counter can count.
                   for (int64_t from = begin; from < end; from += int64_t{1} << 31) {
                     std::fill(counts.rows.begin(), counts.rows.end(), 0u);
                     const int64_t to = std::min(end, from + (int64_t{1} << 31));
                     with_data(tensor, [&](const auto* data) {
                       count_digits(tensor, scratch.state, pass, data, from, to, counts.rows.data());
                     });
                     const std::lock_guard<std::mutex> lock(merging);
                     for (int b = 0; b < kBins; ++b)
                       for (int64_t row = 0; row < kRows; ++row) scratch.bins[b] += counts.rows[row * kBins + b];
                   }
                 });
}

void pick_digit(const DigitPass& pass, int64_t keep, SelectionScratch& scratch) {
  int64_t more = 0;
  for (int digit = (1 << pass.bits) - 1; digit >= 0; --digit) {
    const auto own = static_cast<int64_t>(scratch.bins[digit]);
    if (scratch.state.taken + more + own >= keep) return take_digit(scratch.state, pass, digit, more, own, keep);
    more += own;
  }
}

// Which of the `count` elements from `begin` on survive: 1 or 0 for each.
template <class S>
void find_survivors(const ThresholdTensor& tensor, const Selection& selection, const S* data, int64_t begin,
                    int64_t count, uint8_t* survive) {
  const auto last = static_cast<decltype(key_at(data, nullptr, 0))>(selection.key);
  if (is_trivial(tensor)) {
    std::memset(survive, tensor.keep > 0 ? 1 : 0, static_cast<size_t>(count));
  } else if (selection.from_end == 0) {  // all elements of equal key survive
    for (int64_t k = 0; k < count; ++k) survive[k] = key_at(data, nullptr, begin + k) >= last ? 1 : 0;
  } else {
    for (int64_t k = 0; k < count; ++k) {
      const auto key = key_at(data, tensor.mask, begin + k);
      survive[k] = survives(tensor, selection, key, from_end(tensor, begin + k)) ? 1 : 0;
    }
  }
  if (tensor.mask != nullptr) and_mask(tensor.mask + begin, count, survive);
}

template <class S>
void drop_unless(const uint8_t* survive, int64_t count, S* values) {
  for (int64_t k = 0; k < count; ++k) values[k] = choose_bits(survive[k], values[k], S{});
}

template <class S>
void drop_others(const ThresholdTensor& tensor, const Selection& selection, S* data, int64_t begin, int64_t end) {
  S* momentum_buffer = static_cast<S*>(tensor.momentum_buffer);
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t count = std::min(kBlock, end - from);
    uint8_t survive[kBlock];
    find_survivors(tensor, selection, data, from, count, survive);
    drop_unless(survive, count, data + from);
    if (momentum_buffer != nullptr) drop_unless(survive, count, momentum_buffer + from);
    if (tensor.mask != nullptr) std::memcpy(tensor.mask + from, survive, static_cast<size_t>(count));
  }
}

// Drops the elements that are false in a mask with an entry for each element.
template <class S>
void drop_masked(const ThresholdTensor& tensor, S* data, int64_t begin, int64_t end) {
  const uint8_t* alive = reinterpret_cast<const uint8_t*>(tensor.mask) + begin;
  drop_unless(alive, end - begin, data + begin);
  S* momentum_buffer = static_cast<S*>(tensor.momentum_buffer);
  if (momentum_buffer != nullptr) drop_unless(alive, end - begin, momentum_buffer + begin);
}

void select_one(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for) {
  SelectionScratch scratch{};
  if (!is_trivial(tensors[0])) {
    for (const DigitPass& pass : digit_passes(tensors)) {
      if (scratch.state.done != 0) break;
      histogram(tensors, parallel_for, pass, scratch);
      pick_digit(pass, tensors[0].keep, scratch);
    }
  }
  for_each_range(tensors, parallel_for, kGrain, numel_of,
                 [&](const ThresholdTensor& tensor, int64_t begin, int64_t end) {
                   with_data(tensor, [&](auto* data) { drop_others(tensor, scratch.state, data, begin, end); });
                 });
}

template <class S>
double squared_norm(const ThresholdTensor& tensor, const S* data, int64_t channel) {
  const int64_t size = tensor.numel / tensor.channels;
  double lanes[kNormLanes] = {};
  for (int64_t k = 0; k < size; ++k) {
    const auto value = static_cast<double>(Storage<S>::load(data[position_in_channel(tensor, channel, k)]));
    lanes[k % kNormLanes] += value * value;
  }
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace

void hard_threshold_select_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for) {
  for (size_t i = 0; i < tensors.size();) {
    std::vector<ThresholdTensor> together;
    for (const int64_t selection = tensors[i].selection; i < tensors.size() && tensors[i].selection == selection; ++i) {
      together.push_back(tensors[i]);
    }
    select_one(together, parallel_for);
  }
}

void hard_threshold_norms_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for) {
  const auto channels = [](const ThresholdTensor& tensor) { return tensor.channels; };
  for (const ThresholdTensor& tensor : tensors) {
    const int64_t grain = std::max<int64_t>(1, kGrain * tensor.channels / std::max<int64_t>(1, tensor.numel));
    for_each_range({tensor}, parallel_for, grain, channels, [](const ThresholdTensor& t, int64_t begin, int64_t end) {
      with_data(t, [&](const auto* data) {
        for (int64_t c = begin; c < end; ++c) t.norms[c] = squared_norm(t, data, c);
      });
    });
  }
}

void hard_threshold_masks_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for) {
  for_each_range(tensors, parallel_for, kGrain, numel_of,
                 [](const ThresholdTensor& tensor, int64_t begin, int64_t end) {
                   with_data(tensor, [&](auto* data) {
                     if (tensor.channels == tensor.numel) return drop_masked(tensor, data, begin, end);
                     for (int64_t i = begin; i < end;) {
                       const int64_t run_end = std::min(end, i - i % tensor.inner + tensor.inner);
                       if (tensor.mask[i / tensor.inner % tensor.channels]) {
                         i = run_end;
                         continue;
                       }
                       for (; i < run_end; ++i) drop(tensor, data, i);
                     }
                   });
                 });
}

void hard_threshold_two_of_four_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for) {
  const auto fours = [](const ThresholdTensor& tensor) { return tensor.numel / 4; };
  for_each_range(tensors, parallel_for, kGrain / 4, fours,
                 [](const ThresholdTensor& tensor, int64_t begin, int64_t end) {
                   with_data(tensor, [&](auto* data) {
                     using Key = decltype(key_at(data, nullptr, 0));
                     for (int64_t four = begin; four < end; ++four) {
                       const int64_t first = position_of_four(tensor, four);
                       Key keys[4];
                       for (int j = 0; j < 4; ++j) keys[j] = key_at(data, tensor.mask, first + j * tensor.inner);
                       const unsigned kept = two_of_four(keys);
                       for (int j = 0; j < 4; ++j) {
                         if (((kept >> j) & 1u) != 0 && keys[j] != 0) continue;
                         drop(tensor, data, first + j * tensor.inner);
                         if (tensor.mask != nullptr) tensor.mask[first + j * tensor.inner] = false;
                       }
                     }
                   });
                 });
}

}  // namespace csgd
