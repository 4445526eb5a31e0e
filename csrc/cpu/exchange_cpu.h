// SPDX-License-Identifier: Apache-2.0
// The CPU loops that encode, pack, add up and decode gradients. A call works on a range, so that a caller can divide
// the work between threads. This file does not need torch.
#pragma once

#include "../core/exchange.h"

namespace csgd {

// Ranges of EncodeCall and DecodeCall begin at multiples of this, in elements.
constexpr int64_t kExchangeGrain = 16384;

// The loops of one instruction set; each works on [begin, end).
struct ExchangeLoops {
  void (*encode)(DType, const EncodeCall&, int64_t begin, int64_t end);  // elements
  void (*pack)(const PackCall&, int64_t begin, int64_t end);             // words of all rows, one row after another
  void (*unpack)(const UnpackCall&, int64_t begin, int64_t end);         // words
  void (*add)(const AddCall&, int64_t begin, int64_t end);               // words of codes; writes digits to pack
  void (*decode)(DType, const DecodeCall&, int64_t begin, int64_t end);  // elements
};

// The loops in the instruction set that cpu_isa() names.
ExchangeLoops exchange_loops();

// Bytes of a digit in memory.
inline int64_t digit_size(uint32_t radix) { return radix <= 256 ? 1 : 4; }

}  // namespace csgd
