// SPDX-License-Identifier: Apache-2.0
// Copies that a thread begins and waits for later. Every other one is made at once, the rest at the last moment: who
// reads before the wait, or fills again what has not been read, finds the wrong values.
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
inline thread_local std::deque<std::vector<Copy>> committed;  // groups, the oldest first
inline thread_local std::vector<Copy> begun;
inline thread_local unsigned copies = 0;

}  // namespace cuda_emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  using namespace cuda_emulation;
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || reinterpret_cast<uintptr_t>(from) % size != 0) {
    std::puts("runtime error: misaligned copy");
    std::exit(1);
  }
  if (copies++ % 2 == 0) {
    std::memcpy(to, from, size);
  } else {
    begun.push_back({to, from, size});
  }
}

inline void __pipeline_commit() {
  cuda_emulation::committed.push_back(std::move(cuda_emulation::begun));
  cuda_emulation::begun.clear();
}

// Waits for all groups but the last `prior`.
inline void __pipeline_wait_prior(size_t prior) {
  using namespace cuda_emulation;
  for (; committed.size() > prior; committed.pop_front()) {
    for (const Copy& copy : committed.front()) std::memcpy(copy.to, copy.from, copy.size);
  }
}
