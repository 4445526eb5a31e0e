// SPDX-License-Identifier: Apache-2.0
// The CPU loop of csgd_: one chunk of one tensor at a time, so that a caller with threads can share the chunks
// of all tensors between them. No torch in here.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace csgd {

// Elements of a chunk: small enough to balance, large enough to forget the call. A multiple of the tile.
constexpr int64_t kCpuChunk = 16384;

// What one chunk contributes to its tensor. Both combine in any order: a maximum and a sum of integers.
struct ChunkResult {
  int64_t largest_bits = 0;  // max |d| over finite d, as the bits of opmath
  int64_t moved = 0;         // coordinates that moved
};

// Steps the elements [begin, end) of a tensor; begin is a multiple of kCpuChunk. Reads the step and the bound
// and leaves both as they are. To be called only where overflowed() is false.
using ChunkFunction = ChunkResult (*)(const CsgdOptions&, const CsgdShard&, int64_t begin, int64_t end);

// The loop for a dtype in the widest instruction set that this processor has.
ChunkFunction csgd_chunk_function(DType dtype);

// After all chunks of a tensor: sets its bound, step and count of moved coordinates.
void csgd_finish_tensor(DType dtype, const CsgdOptions& options, const CsgdTensor& tensor, ChunkResult total);

// The instruction set that csgd_chunk_function() chose: "avx512", "avx2" or "baseline".
const char* csgd_cpu_isa();

// Chooses another one, for tests: false, and no change, where this build or processor does not have it.
bool csgd_set_cpu_isa(const char* name);

}  // namespace csgd
