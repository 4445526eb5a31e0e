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

// The draw of a lane that is known only when running. Not written with an array, which a GPU would keep in memory.
CSGD_HOST_DEVICE uint32_t draw_any_lane(const Philox4x32& bits, int lane) {
  const uint32_t even = (lane & 2) == 0 ? bits.word[0] : bits.word[2];
  const uint32_t odd = (lane & 2) == 0 ? bits.word[1] : bits.word[3];
  const uint32_t word = (lane & 1) == 0 ? even : odd;
  return (lane & 4) == 0 ? (word & 0xFFFFu) : (word >> 16);
}

}  // namespace csgd
