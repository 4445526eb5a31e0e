// SPDX-License-Identifier: Apache-2.0
// The draws of a tile of a shard, made by vectors of Philox calls; for the loop of one instruction set.
#pragma once

#include "../core/shard.h"
#include "tile.h"

namespace csgd {
namespace CSGD_ISA {

// The numbers of the blocks whose draws a tile needs, in the order of the tile's elements.
struct TileBlocks {
  // Each element may need a block of its own, and each run may begin and end within a block.
  static constexpr int kMost = 2 * kTile + Words::kLanes;
  uint64_t block[kMost];
  int count = 0;

  void add(uint64_t number) { block[count++] = number; }
};

// A part of a tile that has consecutive draws.
struct TilePiece {
  int first;  // place of its first draw among the draws of the tile's blocks
  int count;  // elements
};

// The draws of `elements` elements from `first` on, counted in the shard's memory; at most kTile.
static inline void draw_shard_tile(const StreamDraws& stream, const ShardLayout& layout, int64_t first, int elements,
                                   uint16_t* draws) {
  TileBlocks blocks;
  TilePiece pieces[kTile];
  int piece_count = 0;
  int64_t run = first / layout.run_length;
  int64_t in_run = first - run * layout.run_length;
  for (int done = 0; done < elements; ++run, in_run = 0) {
    const int64_t left = layout.run_length - in_run;
    const int count = left < elements - done ? static_cast<int>(left) : elements - done;
    const uint64_t position = static_cast<uint64_t>(run_position(layout, run) + in_run);
    pieces[piece_count++] = {blocks.count * kDrawsPerCall + static_cast<int>(position % kDrawsPerCall), count};
    const uint64_t last = (position + static_cast<uint64_t>(count) - 1) / kDrawsPerCall;
    for (uint64_t block = position / kDrawsPerCall; block <= last; ++block) blocks.add(block);
    done += count;
  }
  while (blocks.count % Words::kLanes != 0) blocks.add(0);

  uint16_t bits[TileBlocks::kMost * kDrawsPerCall];
  stream.draw_blocks(blocks.block, blocks.count, bits);
  for (int k = 0; k < piece_count; draws += pieces[k].count, ++k) {
    memcpy(draws, bits + pieces[k].first, static_cast<size_t>(pieces[k].count) * sizeof(uint16_t));
  }
}

}  // namespace CSGD_ISA
}  // namespace csgd
