// SPDX-License-Identifier: Apache-2.0
// Rows of sums as planes of bits, and back. csgd_cuda/distributed/planes.py describes the planes. This file does not
// need torch.
#pragma once

#include <cstdint>

namespace csgd {

// A row of sums: each is 0 ... 2 * most. uint8_t, or uint32_t where 2 * most + 1 exceeds 2^8.
struct PlanesCall {
  void* digits;
  int64_t count;
  uint32_t most;
};

// Writes the planes of a row if they take fewer than `limit` bytes. Returns their bytes, or `limit`.
int64_t write_planes(const PlanesCall& call, uint8_t* to, int64_t limit);

// Reads a row of sums from its planes. Returns whether these take `bytes` bytes, as they should.
bool read_planes(const PlanesCall& call, const uint8_t* from, int64_t bytes);

}  // namespace csgd
