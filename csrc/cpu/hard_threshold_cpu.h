// SPDX-License-Identifier: Apache-2.0
// Hard thresholding on the CPU. No torch in here: the caller shares the work out to its threads.
#pragma once

#include <functional>
#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

// Calls back with ranges [begin, end) that cover 0 ... count - 1, from any thread.
using Ranges = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, const Ranges& work)>;

// Keeps the largest elements of each selection. The tensors of one selection follow each other, and are all of float64
// or none. Masks, one entry for each element, become false where elements are dropped.
void hard_threshold_select_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// norms[c] = the sum of the squares of channel c, in float64 and in one order.
void hard_threshold_norms_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// Drops what the masks, one entry for each channel, say.
void hard_threshold_masks_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

// Keeps the two largest of each four consecutive channels.
void hard_threshold_two_of_four_cpu(const std::vector<ThresholdTensor>& tensors, const ParallelFor& parallel_for);

}  // namespace csgd
