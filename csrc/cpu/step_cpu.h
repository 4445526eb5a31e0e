// SPDX-License-Identifier: Apache-2.0
// The CPU loop of a step. A call works on one chunk of one tensor, so that a caller can divide the chunks of all
// tensors between threads. This file does not need torch.
#pragma once

#include <cstdint>

#include "../core/params.h"

namespace csgd {

// Elements of a chunk: few enough to divide the work evenly, enough to make the cost of a call negligible. A multiple
// of kStepTile.
constexpr int64_t kCpuChunk = 16384;

// What one chunk contributes to the result of its tensor: a maximum and a sum of integers, so chunks can be combined in
// any order.
struct ChunkResult {
  int64_t largest_bits = 0;  // max |d| over finite d, as the bits of opmath
  int64_t moved = 0;         // coordinates that moved
};

// Steps the elements [begin, end) of a tensor; begin is a multiple of kCpuChunk. Reads the step and the bound without
// changing them. To be called only where overflowed() is false. Options: those of a direction.
template <class Options>
using ChunkFunction = ChunkResult (*)(const Options&, const StepShard&, int64_t begin, int64_t end);

// The loop for a dtype in the widest instruction set that this processor has.
template <class Options>
ChunkFunction<Options> chunk_function(DType dtype);
template <>
ChunkFunction<SgdOptions> chunk_function(DType dtype);
template <>
ChunkFunction<AdamWOptions> chunk_function(DType dtype);

// After all chunks of a tensor: sets its bound, its step and its number of coordinates that moved.
void finish_tensor(DType dtype, const StepOptions& options, const StepTensor& tensor, ChunkResult total);

// The instruction set that chunk_function() chose: "avx512", "avx2" or "baseline".
const char* cpu_isa();

// Chooses another instruction set, for tests. Returns false, and changes nothing, if this build or processor does not
// have it.
bool set_cpu_isa(const char* name);

}  // namespace csgd
