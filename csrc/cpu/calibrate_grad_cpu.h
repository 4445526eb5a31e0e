// SPDX-License-Identifier: Apache-2.0
// The CPU loop of calibrate_grad. A call works on a range of one gradient, so that a caller can divide a gradient
// between threads. This file does not need torch.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace csgd {

// Ranges begin at multiples of this.
constexpr int64_t kCalibrateGradGrain = 16384;

// Calibrates the elements [begin, end). Reads the step and the bounds without changing them. `scales` is what
// calibrate_grad_scales() has written. Returns the number of coordinates passed on, and raises largest_bits[channel] to
// max |d| of each channel, as the bits of opmath. These are sums and maxima of integers, so ranges can be combined in
// any order.
using CalibrateGradFunction = int64_t (*)(const CalibrateGradCall&, const void* scales, int64_t begin, int64_t end,
                                          int64_t* largest_bits);

// The loop for a dtype, in the instruction set that cpu_isa() names.
CalibrateGradFunction calibrate_grad_function(DType dtype);

// Writes 2^16 / T for each channel: call.channels numbers of opmath, at most 8 bytes each.
void calibrate_grad_scales(DType dtype, const CalibrateGradCall& call, void* scales);

// After all ranges: sets the bounds, the step and the tally.
void calibrate_grad_finish(DType dtype, const CalibrateGradCall& call, int64_t moved, const int64_t* largest_bits);

}  // namespace csgd
