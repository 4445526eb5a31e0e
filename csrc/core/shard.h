// SPDX-License-Identifier: Apache-2.0
// The draws of a shard are those of its elements' positions in the whole parameter. So the draws do not depend on how a
// parameter is split.
#pragma once

#include "params.h"
#include "philox.h"

namespace csgd {

// The position in the whole parameter of the first element of a shard's run.
CSGD_HOST_DEVICE int64_t run_position(const ShardLayout& layout, int64_t run) {
  return layout.offset + run / layout.group_runs * layout.group_stride + run % layout.group_runs * layout.run_stride;
}

// The draws of eight elements, from `first`, a multiple of 8, on: lane k is the draw of element first + k (draw_lane).
template <class Key>
CSGD_HOST_DEVICE Philox4x32 draw_eight(const Key& key, Stream stream, const CsgdTensor& tensor, int64_t first,
                                       uint32_t step) {
  return draw_block(key, stream, static_cast<uint64_t>(first) / kDrawsPerCall, tensor.index, step);
}

// shares_calls: whether each eight elements, from a multiple of 8 on, share a Philox call, as they do in a whole
// parameter. If so, element i is served by call number first_call + i / 8.
CSGD_HOST_DEVICE bool shares_calls(const CsgdTensor&) { return true; }
CSGD_HOST_DEVICE bool shares_calls(const CsgdShard& shard) {
  return shard.layout.run_length >= shard.numel && shard.layout.offset % kDrawsPerCall == 0;
}

CSGD_HOST_DEVICE uint64_t first_call(const CsgdTensor&) { return 0; }
CSGD_HOST_DEVICE uint64_t first_call(const CsgdShard& shard) {
  return static_cast<uint64_t>(shard.layout.offset) / kDrawsPerCall;
}

// The draw of a lane that is known only when running. Not written with an array, which a GPU would keep in memory.
CSGD_HOST_DEVICE uint32_t draw_any_lane(const Philox4x32& bits, int lane) {
  const uint32_t even = (lane & 2) == 0 ? bits.word[0] : bits.word[2];
  const uint32_t odd = (lane & 2) == 0 ? bits.word[1] : bits.word[3];
  const uint32_t word = (lane & 1) == 0 ? even : odd;
  return (lane & 4) == 0 ? (word & 0xFFFFu) : (word >> 16);
}

// draw_eight for a shard, whose eight elements may belong to several blocks, one after the other. Past the shard's end
// the draws are those of positions that belong to other shards.
template <class Key>
CSGD_HOST_DEVICE Philox4x32 draw_eight(const Key& key, Stream stream, const CsgdShard& shard, int64_t first,
                                       uint32_t step) {
  const ShardLayout& layout = shard.layout;
  int64_t run = first / layout.run_length;
  int64_t in_run = first - run * layout.run_length;
  int64_t position = run_position(layout, run) + in_run;
  uint64_t block = static_cast<uint64_t>(position) / kDrawsPerCall;
  Philox4x32 bits = draw_block(key, stream, block, shard.index, step);
  if (position % kDrawsPerCall == 0 && in_run + kDrawsPerCall <= layout.run_length) return bits;
  Philox4x32 draws = {{0, 0, 0, 0}};
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = 0; k < kDrawsPerCall; ++k) {
    if (static_cast<uint64_t>(position) / kDrawsPerCall != block) {
      block = static_cast<uint64_t>(position) / kDrawsPerCall;
      bits = draw_block(key, stream, block, shard.index, step);
    }
    draws.word[k & 3] |= draw_any_lane(bits, static_cast<int>(position % kDrawsPerCall)) << ((k & 4) * 4);
    ++position;
    if (++in_run == layout.run_length) {
      in_run = 0;
      position = run_position(layout, ++run);
    }
  }
  return draws;
}

}  // namespace csgd
