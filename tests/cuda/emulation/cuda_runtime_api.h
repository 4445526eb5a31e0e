// SPDX-License-Identifier: Apache-2.0
// CUDA on a CPU, for tests: as much of it as the kernels in csrc/cuda use. Each CUDA thread is a thread of the
// operating system, and several blocks run at a time, so that races between threads and between blocks are real ones.
// Atomics and __ldcg() are sequentially consistent here and __threadfence() does nothing, since ThreadSanitizer does
// not know fences: a missing fence is not found, a missing atomic, barrier or last-block test is. What __CUDA_ARCH__
// chooses in csrc/core does not run here, but what stands beside it; on a GPU tests/cuda/test_shortcuts.py tries it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUDART_VERSION 13000
#define __CUDA_ARCH_LIST__ 0

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = void*;
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x_) : x(x_) {}
};

namespace cuda_emulation {

constexpr int kWarp = 32;
constexpr int kBlocksInFlight = 3;
constexpr size_t kSharedBytes = 48 * 1024;  // what a block may have unless its kernel asks for more

// What a test sets: the device it pretends to have.
inline int driver_version = 13000;
inline int multiprocessors = 2;

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// The threads that run one block after another together. What is written before a barrier and read after it is there
// twice, in turns: who is already on the way to the next barrier writes elsewhere, and one barrier does instead of two.
struct Team {
  using Slots = std::vector<uint64_t>;
  explicit Team(unsigned threads) : barrier(threads), slots{Slots(threads), Slots(threads)}, shared(kSharedBytes) {
    for (unsigned w = 0; w < threads / kWarp; ++w) warp_barriers.push_back(new Barrier(kWarp));
  }
  ~Team() {
    for (Barrier* b : warp_barriers) delete b;
  }
  Barrier barrier;
  std::vector<Barrier*> warp_barriers;
  Slots slots[2];  // what each thread offers in a shuffle
  std::vector<unsigned char> shared;
  unsigned block[2] = {};
};

inline thread_local Team* team = nullptr;
inline thread_local unsigned shuffles = 0;
inline thread_local size_t shared_used = 0;

// The same address for all threads of a block, since all ask for the same arrays in the same order.
template <class T>
T* shared_array(size_t size) {
  shared_used = (shared_used + 15) / 16 * 16;
  T* array = reinterpret_cast<T*>(team->shared.data() + shared_used);
  shared_used += size * sizeof(T);
  return shared_used <= team->shared.size() ? array : nullptr;
}

}  // namespace cuda_emulation

#define CSGD_SHARED_ARRAY(type, name, size) type* name = cuda_emulation::shared_array<type>(size)

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx{0};
inline thread_local EmulatedIndex blockIdx{0};
inline thread_local EmulatedIndex gridDim{0};

inline void __syncthreads() { cuda_emulation::team->barrier.wait(); }
inline void __threadfence() {}
inline void __syncwarp() { cuda_emulation::team->warp_barriers[threadIdx.x / cuda_emulation::kWarp]->wait(); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

// Bytes of the eight of (high, low), chosen by the lowest four hexadecimal digits of the selector.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) result |= static_cast<unsigned>(both >> (selector >> 4 * k & 7) * 8 & 0xFF) << 8 * k;
  return result;
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  using namespace cuda_emulation;
  Barrier& warp = *team->warp_barriers[threadIdx.x / kWarp];
  Team::Slots& slots = team->slots[shuffles++ % 2];
  std::memcpy(&slots[threadIdx.x], &value, sizeof value);
  warp.wait();
  if (threadIdx.x % kWarp + offset < kWarp) std::memcpy(&value, &slots[threadIdx.x + offset], sizeof value);
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

template <class T>
T __ldcg(const T* address) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = cuda_emulation::driver_version;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::multiprocessors;
  return cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  using namespace cuda_emulation;
  std::atomic<unsigned> next{0};
  const auto run_thread = [&](Team* my_team, unsigned index) {
    team = my_team;
    threadIdx.x = index;
    gridDim.x = grid.x;
    for (unsigned turn = 0;; ++turn) {
      unsigned& number = my_team->block[turn % 2];
      if (index == 0) number = next++;
      my_team->barrier.wait();  // the block before is done, with its shared memory, too
      blockIdx.x = number;
      if (blockIdx.x >= grid.x) return;
      shared_used = 0;
      kernel(*static_cast<Argument*>(arguments[0]));
    }
  };
  std::vector<Team*> teams;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kBlocksInFlight && t < grid.x; ++t) {
    teams.push_back(new Team(block.x));
    for (unsigned index = 0; index < block.x; ++index) threads.emplace_back(run_thread, teams.back(), index);
  }
  for (std::thread& thread : threads) thread.join();
  for (Team* t : teams) delete t;
  return cudaSuccess;
}
