// SPDX-License-Identifier: Apache-2.0
// Hard thresholding on the CPU. This file does not need torch: the caller passes a function that divides the work
// between threads.
#pragma once

#include <functional>
#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

// A ParallelFor calls `work` with ranges [begin, end) that together cover 0 ... count - 1, from any thread.
using Ranges = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const Ranges& work)>;

// Keeps the largest elements of each selection. The tensors of one selection follow each other in the list, and are all
// of float64 or none. A mask has an entry for each element, which becomes false where the element is dropped.
void hard_threshold_select_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// Sets norms[c] to the sum of the squares of channel c, in float64 and always added in the same order.
void hard_threshold_norms_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// Drops the channels, or elements, that are false in the masks.
void hard_threshold_masks_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// Keeps the two largest of each four consecutive channels.
void hard_threshold_two_of_four_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

}  // namespace csgd
