// SPDX-License-Identifier: Apache-2.0
// The CPU loops that encode, pack, add up and decode gradients: a range at a time, so that a caller with threads can
// share it out. No torch in here.
#pragma once

#include "../core/exchange.h"

namespace csgd {

// Ranges of EncodeCall and DecodeCall begin at multiples of this, in elements.
constexpr int64_t kExchangeGrain = 16384;

// The loops of one instruction set; each works on [begin, end).
struct ExchangeLoops {
  void (*encode)(DType, const EncodeCall&, int64_t begin, int64_t end);  // elements
  void (*pack)(const PackCall&, int64_t begin, int64_t end);             // words, those of all rows one after another
  void (*add)(const AddCall&, int64_t begin, int64_t end);  // words of codes; writes the sums' digits, to be packed
  void (*decode)(DType, const DecodeCall&, int64_t begin, int64_t end);  // elements
};

// Those of the instruction set that csgd_cpu_isa() names.
ExchangeLoops exchange_loops();

// Bytes of a digit in memory.
inline int64_t digit_size(uint32_t radix) { return radix <= 256 ? 1 : 4; }

}  // namespace csgd
