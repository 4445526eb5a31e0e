// SPDX-License-Identifier: Apache-2.0
// csgd_ on the CPU: the chunks of all tensors together, shared by torch's threads.
#include "../cpu/csgd_cpu.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../core/update_rule.h"
#include "csgd.h"

namespace csgd {
namespace {

struct Chunk {
  size_t tensor;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kWorthThreads = 2 * kCpuChunk;  // elements, below which waking other threads costs more

std::vector<Chunk> chunks_of(const std::vector<PackedTensor>& tensors, int64_t* elements) {
  std::vector<Chunk> chunks;
  *elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].tensor.numel;
    for (int64_t begin = 0; begin < numel; begin += kCpuChunk) {
      chunks.push_back({i, begin, std::min(begin + kCpuChunk, numel)});
    }
    *elements += numel;
  }
  return chunks;
}

}  // namespace

void run_cpu(const PackedStep& step) {
  const CsgdOptions& options = step.options();
  if (overflowed(options)) return;
  int64_t elements = 0;
  const std::vector<Chunk> chunks = chunks_of(step.tensors(), &elements);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<ChunkResult> results(chunks.size());
  const auto run_chunks = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const PackedTensor& packed = step.tensors()[chunks[c].tensor];
      results[c] = csgd_chunk_function(packed.dtype)(options, packed.tensor, chunks[c].begin, chunks[c].end);
    }
  };
  if (elements < kWorthThreads) {
    run_chunks(0, count);
  } else {
    at::parallel_for(0, count, 1, run_chunks);
  }
  std::vector<ChunkResult> totals(step.tensors().size());
  for (int64_t c = 0; c < count; ++c) {
    ChunkResult& total = totals[chunks[c].tensor];
    total.largest_bits = std::max(total.largest_bits, results[c].largest_bits);
    total.moved += results[c].moved;
  }
  for (size_t i = 0; i < totals.size(); ++i) {
    csgd_finish_tensor(step.tensors()[i].dtype, options, step.tensors()[i].tensor, totals[i]);
  }
}

TORCH_LIBRARY_IMPL(csgd_cuda, CPU, m) { m.impl("csgd_", unboxed<CsgdArgs, csgd_<run_cpu>>); }

}  // namespace csgd
