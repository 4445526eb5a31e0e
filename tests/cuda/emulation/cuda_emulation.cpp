// SPDX-License-Identifier: Apache-2.0
// The threads of the emulation, and how they wait for each other. They live from launch to launch, since most launches
// here are over sooner than threads are made.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>
#include <vector>

#include "cuda_runtime_api.h"

namespace cuda_emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kBlocksInFlight = 2;
constexpr size_t kSharedBytes = 48 * 1024;  // the shared memory of a block whose kernel does not request more

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

struct Launch {
  unsigned blocks;
  unsigned blocks_in_flight;
  Call call;
  Kernel kernel;
  const void* argument;
};

// The threads of one block. They run one block after another, in turns from 0 on. A thread may begin a turn while
// others are still in the one before, which saves a barrier that the kernel does not have; each of two turns therefore
// has shared memory of its own.
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
    launch_ = nullptr;
    launches_.set(launches_.value() + 1);
    for (std::thread& thread : threads_) thread.join();
  }
  Team(const Team&) = delete;

  void start(const Launch& launch) {
    launch_ = &launch;
    for (Signal& each : ended_) each.set(0);
    running_ = static_cast<unsigned>(threads_.size());
    launches_.set(launches_.value() + 1);
  }
  void wait() { done_.wait_while(launches_.value() - 1); }

  Barrier barrier;
  std::deque<Barrier> warp_barriers;
  std::vector<Offers> offers;            // of each thread
  std::vector<unsigned char> shared[2];  // memory, of even and of odd turns

 private:
  void run_thread(unsigned index);
  void run_launch(const Launch& launch);

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

  const unsigned number_;
  const Launch* launch_ = nullptr;
  std::atomic<unsigned> running_{0};        // threads that have not finished the launch
  std::atomic<unsigned> left_[2] = {0, 0};  // threads that have left the present even and odd turn
  Signal ended_[2];                         // even and odd turns that all threads have left
  Signal launches_, done_;
  std::vector<std::thread> threads_;
};

std::deque<Team> teams;  // those that a launch has needed so far

// Of the thread and the block that it runs.
thread_local Team* team = nullptr;
thread_local std::vector<unsigned char>* shared = nullptr;
thread_local size_t shared_used = 0;
thread_local uint32_t shuffles = 0;

void Team::run_thread(unsigned index) {
  team = this;
  threadIdx.x = index;
  for (uint32_t launch = 0;; ++launch) {
    launches_.wait_while(launch);
    if (launch_ == nullptr) return;
    run_launch(*launch_);
    if (--running_ == 0) done_.set(launch + 1);
  }
}

void Team::run_launch(const Launch& launch) {
  gridDim.x = launch.blocks;
  blockIdx.x = number_;
  for (uint32_t turn = 0; blockIdx.x < launch.blocks; ++turn, blockIdx.x += launch.blocks_in_flight) {
    begin(turn);
    cuda_emulation::shared = &shared[turn % 2];
    shared_used = 0;
    launch.call(launch.kernel, launch.argument);
    end(turn);
  }
}

}  // namespace

void run_blocks(unsigned blocks, unsigned threads, Call call, Kernel kernel, const void* argument) {
  const Launch launch{blocks, std::min(blocks, kBlocksInFlight), call, kernel, argument};
  // All launches of a program have blocks of one size.
  while (teams.size() < launch.blocks_in_flight) teams.emplace_back(static_cast<unsigned>(teams.size()), threads);
  for (unsigned t = 0; t < launch.blocks_in_flight; ++t) teams[t].start(launch);
  for (unsigned t = 0; t < launch.blocks_in_flight; ++t) teams[t].wait();
}

void* shared_memory(size_t bytes) {
  shared_used = (shared_used + 15) / 16 * 16;
  void* memory = shared->data() + shared_used;
  shared_used += bytes;
  return shared_used <= shared->size() ? memory : nullptr;
}

// A lane waits only for the lane whose value it takes: a shuffle orders no other memory accesses, on a GPU neither.
// Values stay for kLast shuffles. Before the first of the next kLast all lanes of the warp have taken theirs.
uint64_t shuffle_down(uint64_t value, unsigned offset) {
  const uint32_t number = shuffles++;
  if (number % Offers::kLast == 0) __syncwarp();
  Offers& own = team->offers[threadIdx.x];
  own.values[number % Offers::kLast] = value;
  own.count.set(number + 1);
  if (threadIdx.x % kWarp + offset >= kWarp) return value;
  Offers& other = team->offers[threadIdx.x + offset];
  for (uint32_t count; (count = other.count.value()) <= number;) other.count.wait_while(count);
  return other.values[number % Offers::kLast];
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

void __syncthreads() { team->barrier.wait(); }

void __syncwarp() { team->warp_barriers[threadIdx.x / kWarp].wait(); }
