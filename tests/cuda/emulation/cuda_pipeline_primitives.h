// SPDX-License-Identifier: Apache-2.0
// Copies that a thread begins and waits for later. Every other copy is made at once, the rest at the last moment: code
// that reads before the wait, or fills memory again that has not been read, finds wrong values.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <deque>

#include "cuda_runtime_api.h"

namespace cuda_emulation {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

// The copies that a thread has begun in one block.
struct Pipeline {
  uint64_t block = 0;
  std::deque<std::vector<Copy>> committed;  // groups, the oldest first
  std::vector<Copy> begun;
};

inline Pipeline& pipeline() {
  static thread_local Pipeline own;
  if (own.block != blocks_begun) own = {.block = blocks_begun, .committed = {}, .begun = {}};
  return own;
}

inline thread_local unsigned copies = 0;

}  // namespace cuda_emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  using namespace cuda_emulation;
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    std::puts("runtime error: misaligned copy");
    std::fflush(stdout);
    std::_Exit(1);  // other threads are at work
  }
  if (copies++ % 2 == 0) {
    std::memcpy(to, from, size);
  } else {
    pipeline().begun.push_back({to, from, size});
  }
}

inline void __pipeline_commit() {
  cuda_emulation::Pipeline& own = cuda_emulation::pipeline();
  own.committed.push_back(std::move(own.begun));
  own.begun.clear();
}

// Waits for all groups but the last `prior`.
inline void __pipeline_wait_prior(size_t prior) {
  using namespace cuda_emulation;
  auto& committed = pipeline().committed;
  for (; committed.size() > prior; committed.pop_front()) {
    for (const Copy& copy : committed.front()) std::memcpy(copy.to, copy.from, copy.size);
  }
}
