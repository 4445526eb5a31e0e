// SPDX-License-Identifier: Apache-2.0
// Linked into a program that compares a kernel with its CPU loop, this makes it a library: launches go to a function of
// the caller's, and all that the program allocates lies in one arena, where each byte is marked that a kernel may
// touch.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda_runtime_api.h"

namespace {

using LaunchElsewhere = void (*)(const void* kernel, const void* argument, unsigned blocks, unsigned threads);
LaunchElsewhere launch_elsewhere = nullptr;

void launch(unsigned blocks, unsigned threads, cuda_emulation::Call, cuda_emulation::Kernel kernel,
            const void* argument) {
  launch_elsewhere(reinterpret_cast<const void*>(kernel), argument, blocks, threads);
}

constexpr size_t kSize = size_t{1} << 32;  // of addresses; memory only where something was allocated
constexpr size_t kAlignment = 64;          // at least; before each allocation this many bytes are a gap
constexpr size_t kPage = 4096;

unsigned char* reserve() {
  void* memory = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(memory);
}

// What was freed is not allocated again, so that a kernel that still uses it is found.
struct Arena {
  unsigned char* data = reserve();
  unsigned char* valid = reserve();
  size_t used = 0;
};

Arena& arena() {
  static Arena all;
  return all;
}

void* allocate(size_t size, size_t alignment) {
  Arena& all = arena();
  alignment = std::max(alignment, kAlignment);
  const size_t at = (all.used + kAlignment + alignment - 1) / alignment * alignment;
  if (size > kSize - at) std::abort();
  all.used = at + size;
  std::memcpy(all.data + at - sizeof size, &size, sizeof size);
  std::memset(all.valid + at, 1, size);
  return all.data + at;
}

void release(void* memory) {
  Arena& all = arena();
  const auto at = static_cast<size_t>(static_cast<unsigned char*>(memory) - all.data);
  if (at >= kSize) return std::free(memory);  // allocated by another library, or null
  size_t size = 0;
  std::memcpy(&size, all.data + at - sizeof size, sizeof size);
  std::memset(all.valid + at, 0, size);
  const size_t begin = (at + kPage - 1) / kPage * kPage, end = (at + size) / kPage * kPage;
  if (begin < end) madvise(all.data + begin, end - begin, MADV_DONTNEED);
}

}  // namespace

void* operator new(size_t size) { return allocate(size, kAlignment); }
void* operator new(size_t size, std::align_val_t alignment) { return allocate(size, static_cast<size_t>(alignment)); }
void operator delete(void* memory) noexcept { release(memory); }
void operator delete(void* memory, size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { release(memory); }

extern "C" {

void set_launcher(LaunchElsewhere function) {
  launch_elsewhere = function;
  cuda_emulation::launcher = launch;
}

void* memory_data() { return arena().data; }
void* memory_valid() { return arena().valid; }
size_t memory_size() { return kSize; }

}  // extern "C"
