// SPDX-License-Identifier: Apache-2.0
// CUDA on a CPU, for tests: as much of it as the kernels in csrc/cuda use. Each CUDA thread is a thread of the
// operating system, and several blocks run at a time, so that races between threads and between blocks are real ones.
// The threads are kept from launch to launch, since most launches here are over sooner than threads are made.
//
// Atomics and __ldcg() are sequentially consistent here, and __threadfence() does nothing, because ThreadSanitizer does
// not understand fences. A missing fence is therefore not found; a missing atomic, barrier or last-block test is. Where
// csrc/core tests __CUDA_ARCH__, the branch for the host runs here; on a GPU tests/cuda/test_shortcuts.py checks the
// other one.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
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

constexpr unsigned kWarp = 32;
constexpr unsigned kBlocksInFlight = 2;
constexpr size_t kSharedBytes = 48 * 1024;  // the shared memory of a block whose kernel does not request more

// The emulated device; the tests change these.
inline int driver_version = 13000;
inline int multiprocessors = 2;

// A number that threads can wait for. Nearly all of the time that a launch takes here is the operating system's, which
// puts threads to sleep and wakes them: a thread first lets the others run, and sleeps if the number is still the same.
class Signal {
 public:
  uint32_t value() const { return value_; }

  void set(uint32_t value) {
    value_ = value;
    if (waiting_ != 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
  }

  // Waits while the value is `old`.
  void wait_while(uint32_t old) {
    for (int k = 0; k < 4; ++k) {
      if (value_ != old) return;
      std::this_thread::yield();
    }
    ++waiting_;
    while (value_ == old) futex(FUTEX_WAIT_PRIVATE, old);
    --waiting_;
  }

 private:
  void futex(int operation, uint32_t argument) { syscall(SYS_futex, &value_, operation, argument, nullptr); }

  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> waiting_{0};
};

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  void wait() {
    const uint32_t round = round_.value();
    if (++arrived_ == threads_) {
      arrived_ = 0;
      round_.set(round + 1);
    } else {
      round_.wait_while(round);
    }
  }

 private:
  const unsigned threads_;
  std::atomic<unsigned> arrived_{0};
  Signal round_;
};

// The values that a thread offers to its warp in the last shuffles.
struct Offers {
  static constexpr uint32_t kLast = 16;
  uint64_t values[kLast];
  Signal count;  // of shuffles so far
};

// The threads of one block. They run one block after another, in turns from 0 on. A thread may begin a turn while
// others are still in the one before, as all of them would only wait for each other once more than the kernel needs;
// two turns have different shared memory.
class Team {
 public:
  Team(unsigned number, unsigned threads)
      : barrier(threads),
        offers(threads),
        shared{std::vector<unsigned char>(kSharedBytes, 0xFF), std::vector<unsigned char>(kSharedBytes, 0xFF)},
        number_(number) {
    for (unsigned w = 0; w < threads / kWarp; ++w) warp_barriers.emplace_back(kWarp);
    for (unsigned index = 0; index < threads; ++index) threads_.emplace_back([this, index] { run_thread(index); });
  }
  ~Team() {
    job_ = nullptr;
    launches_.set(launches_.value() + 1);
    for (std::thread& thread : threads_) thread.join();
  }
  Team(const Team&) = delete;

  // Lets each thread run job(team, its number, thread's number); wait() returns when all are done.
  void start(const std::function<void(Team&, unsigned, unsigned)>& job) {
    job_ = &job;
    for (Signal& each : ended_) each.set(0);
    running_ = static_cast<unsigned>(threads_.size());
    launches_.set(launches_.value() + 1);
  }
  void wait() { done_.wait_while(launches_.value() - 1); }

  // Waits until no thread is in the turn before the last one.
  void begin(uint32_t turn) {
    Signal& ended = ended_[turn % 2];
    for (uint32_t turns; (turns = ended.value()) < turn / 2;) ended.wait_while(turns);
  }
  void end(uint32_t turn) {
    if (++left_[turn % 2] < threads_.size()) return;
    left_[turn % 2] = 0;
    ended_[turn % 2].set(turn / 2 + 1);
  }

  Barrier barrier;
  std::deque<Barrier> warp_barriers;
  std::vector<Offers> offers;            // of each thread
  std::vector<unsigned char> shared[2];  // memory, of even and of odd turns

 private:
  void run_thread(unsigned index) {
    for (uint32_t launch = 0;; ++launch) {
      launches_.wait_while(launch);
      if (job_ == nullptr) return;
      (*job_)(*this, number_, index);
      if (--running_ == 0) done_.set(launch + 1);
    }
  }

  const unsigned number_;
  const std::function<void(Team&, unsigned, unsigned)>* job_ = nullptr;
  std::atomic<unsigned> running_{0}, left_[2] = {0, 0};  // threads: in the launch; that have left the present turns
  Signal ended_[2];                                      // even and odd turns that all threads have left
  Signal launches_, done_;
  std::vector<std::thread> threads_;
};

inline std::deque<Team> teams;  // those that a launch has needed so far
inline thread_local Team* team = nullptr;
inline thread_local std::vector<unsigned char>* shared = nullptr;
inline thread_local uint32_t shuffles = 0;
inline thread_local uint64_t blocks_begun = 0;
inline thread_local size_t shared_used = 0;

// The same address for all threads of a block, since all of them request the same arrays in the same order.
template <class T>
T* shared_array(size_t size) {
  shared_used = (shared_used + 15) / 16 * 16;
  T* array = reinterpret_cast<T*>(shared->data() + shared_used);
  shared_used += size * sizeof(T);
  return shared_used <= shared->size() ? array : nullptr;
}

// Each thread has a copy of the kernel's argument, of up to 32 KB. ThreadSanitizer would spend more time on these
// copies than on the kernel: they are made here, in code that it does not watch and without memcpy(), which it does.
#if defined(__x86_64__) && !defined(__clang__)
#define CSGD_COPIES_ARGUMENTS __attribute__((noinline, no_sanitize_thread, target("inline-all-stringops")))
#else
#define CSGD_COPIES_ARGUMENTS
#endif
template <class Argument>
CSGD_COPIES_ARGUMENTS void call(void (*kernel)(Argument), const Argument& argument) {
  kernel(argument);
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
inline void __syncwarp() { cuda_emulation::team->warp_barriers[threadIdx.x / cuda_emulation::kWarp].wait(); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }

// Bytes of the eight of (high, low), chosen by the lowest four hexadecimal digits of the selector.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) result |= static_cast<unsigned>(both >> (selector >> 4 * k & 7) * 8 & 0xFF) << 8 * k;
  return result;
}

// A lane waits only for the lane whose value it takes: a shuffle orders no other memory accesses, on a GPU neither.
// Values stay for kLast shuffles. Before the first of the next kLast all lanes of the warp have taken theirs.
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned offset) {
  using namespace cuda_emulation;
  const uint32_t number = shuffles++;
  if (number % Offers::kLast == 0) __syncwarp();
  Offers& own = team->offers[threadIdx.x];
  std::memcpy(&own.values[number % Offers::kLast], &value, sizeof value);
  own.count.set(number + 1);
  if (threadIdx.x % kWarp + offset < kWarp) {
    Offers& other = team->offers[threadIdx.x + offset];
    for (uint32_t count; (count = other.count.value()) <= number;) other.count.wait_while(count);
    std::memcpy(&value, &other.values[number % Offers::kLast], sizeof value);
  }
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

// All launches of a program have blocks of one size.
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  using namespace cuda_emulation;
  const unsigned at_work = std::min(grid.x, kBlocksInFlight);
  const std::function<void(Team&, unsigned, unsigned)> run_blocks = [&](Team& own, unsigned number, unsigned index) {
    team = &own;
    threadIdx.x = index;
    gridDim.x = grid.x;
    blockIdx.x = number;
    for (uint32_t turn = 0; blockIdx.x < grid.x; ++turn, blockIdx.x += at_work) {
      own.begin(turn);
      shared = &own.shared[turn % 2];
      shared_used = 0;
      ++blocks_begun;
      call(kernel, *static_cast<const Argument*>(arguments[0]));
      own.end(turn);
    }
  };
  while (teams.size() < at_work) teams.emplace_back(static_cast<unsigned>(teams.size()), block.x);
  for (unsigned t = 0; t < at_work; ++t) teams[t].start(run_blocks);
  for (unsigned t = 0; t < at_work; ++t) teams[t].wait();
  return cudaSuccess;
}
