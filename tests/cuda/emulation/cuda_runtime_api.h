// SPDX-License-Identifier: Apache-2.0
// CUDA on a CPU, for tests: as much of it as the kernels in csrc/cuda use. Each CUDA thread is a thread of the
// operating system, and several blocks run at a time, so that races between threads and between blocks are real ones.
//
// Atomics and __ldcg() are sequentially consistent here, and __threadfence() does nothing, because ThreadSanitizer does
// not understand fences. A missing fence is therefore not found; a missing atomic, barrier or last-block test is. Where
// csrc/core tests __CUDA_ARCH__, the branch for the host runs here; ptx/ executes the other one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

// The emulated device; the tests change this.
inline int multiprocessors = 2;

// Lets `threads` threads run each of `blocks` blocks: call(kernel, argument) is what a thread does.
using Kernel = void (*)();
using Call = void (*)(Kernel kernel, const void* argument);
void run_blocks(unsigned blocks, unsigned threads, Call call, Kernel kernel, const void* argument);

// What runs a launch. ptx/launches.cpp puts a function of its own here, which executes the kernel's PTX.
using Launcher = decltype(&run_blocks);
inline Launcher launcher = run_blocks;

// The same address for all threads of a block, since all of them request the same arrays in the same order.
void* shared_memory(size_t bytes);

// The value of the lane `offset` above the own one; beyond the warp the own value.
uint64_t shuffle_down(uint64_t value, unsigned offset);

// Each thread has a copy of the kernel's argument, of up to 32 KB. ThreadSanitizer would spend more time on these
// copies than on the kernel: they are made here, in code that it does not watch and without memcpy(), which it does.
#if defined(__x86_64__) && !defined(__clang__)
#define CSGD_COPIES_ARGUMENTS __attribute__((noinline, no_sanitize_thread, target("inline-all-stringops")))
#else
#define CSGD_COPIES_ARGUMENTS
#endif
template <class Argument>
CSGD_COPIES_ARGUMENTS void call(Kernel kernel, const void* argument) {
  reinterpret_cast<void (*)(Argument)>(kernel)(*static_cast<const Argument*>(argument));
}

}  // namespace cuda_emulation

#define CSGD_SHARED_ARRAY(type, name, size) \
  type* name = static_cast<type*>(cuda_emulation::shared_memory(sizeof(type) * (size)))

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx{0};
inline thread_local EmulatedIndex blockIdx{0};
inline thread_local EmulatedIndex gridDim{0};

void __syncthreads();
void __syncwarp();
inline void __threadfence() {}
inline int __popc(unsigned value) { return __builtin_popcount(value); }

// Bytes of the eight of (high, low), chosen by the lowest four hexadecimal digits of the selector.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int k = 0; k < 4; ++k) result |= static_cast<unsigned>(both >> (selector >> 4 * k & 7) * 8 & 0xFF) << 8 * k;
  return result;
}

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned offset) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_emulation::shuffle_down(bits, offset);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);
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
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_emulation::multiprocessors;
  return cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  using namespace cuda_emulation;
  launcher(grid.x, block.x, call<Argument>, reinterpret_cast<Kernel>(kernel), arguments[0]);
  return cudaSuccess;
}
