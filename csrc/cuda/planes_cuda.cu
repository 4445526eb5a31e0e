// SPDX-License-Identifier: Apache-2.0
// Rows of sums as planes of bits, on a GPU.
//
// Where a bit stands in its plane is a rank: how many sums, or groups, before it have such a bit. To write, the blocks
// first count theirs, and the counts are added up; then each block sets its bits. To read, one block for each row makes
// a directory of the planes, with the number of ones before every 256th bit (the rank directory of G. Jacobson,
// Space-efficient static trees and graphs, 1989). From it each thread finds the bits of its sums.
#include <cuda_runtime.h>

#include "../core/exchange.h"
#include "blocks.cuh"
#include "planes_cuda.h"

namespace csgd {
namespace {

constexpr int kByte = 8;            // bits
constexpr int kGroup = 4;           // sums that share a bit
constexpr int64_t kRankBits = 256;  // from one number of the directory to the next
constexpr int64_t kRankBytes = kRankBits / kByte;

__host__ __device__ int64_t bytes_of(int64_t bits) { return (bits + kByte - 1) / kByte; }
__host__ __device__ int64_t row_bytes(const PlaneRows& of) { return of.words * static_cast<int64_t>(sizeof(uint32_t)); }
__host__ __device__ int64_t sums_of(const PlaneRows& of) { return of.words * of.places; }
__host__ __device__ int64_t groups_of(const PlaneRows& of) { return (sums_of(of) + kGroup - 1) / kGroup; }

// Adds up a number of each thread. Returns the sum of those of the threads before this one, and sets `total`.
// `of_warps` is shared memory for kWarps numbers.
__device__ uint32_t sum_before(uint32_t own, uint32_t* of_warps, uint32_t& total) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t from_here = own;  // the sum over this lane and those after it
  for (unsigned offset = 1; offset < 32; offset *= 2) {
    const uint32_t more = __shfl_down_sync(0xFFFFFFFFu, from_here, offset);
    if (lane + offset < 32) from_here += more;
  }
  __syncthreads();  // all threads have read the numbers of the call before
  if (lane == 0) of_warps[warp] = from_here;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (unsigned w = 0; w < static_cast<unsigned>(kWarps); ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before + of_warps[warp] - from_here;
}

// Writing. What is counted: kind 0 are the groups with a sum that is not 0, kind k > 0 are the sums of size >= k.

__host__ __device__ int64_t kinds_of(const PlaneRows& of) { return int64_t{of.most} + 1; }
__host__ __device__ int64_t blocks_of_row(const PlaneRows& of) { return blocks_of(sums_of(of), kPass); }

// The counts of one kind in a row, one for each block, and behind them their sum.
__device__ int64_t* counts_of(const WritePlanesCall& call, int64_t row, int64_t kind) {
  return call.counts + (row * kinds_of(call.of) + kind) * (blocks_of_row(call.of) + 1);
}

// The kPerThread sums that are a thread's, 0 beyond the end of the row.
struct OwnSums {
  uint32_t sizes[kPerThread];
  uint32_t positive;  // a bit for each
};

__device__ OwnSums own_sums(const WritePlanesCall& call, int64_t row, int64_t block) {
  const PlaneRows& of = call.of;
  const int64_t first = block * kPass + int64_t{threadIdx.x} * kPerThread;
  const double radix = of.radix, inverse = 1.0 / radix;
  OwnSums own{};
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t position = first + k;
    if (position >= sums_of(of)) continue;
    const uint32_t word = call.words[row * of.words + position % of.words];
    double value = divided(static_cast<double>(word), inverse_power(of.radix, static_cast<int>(position / of.words)));
    const auto digit = static_cast<uint32_t>(take_digit(value, radix, inverse));
    own.sizes[k] = digit > of.most ? digit - of.most : of.most - digit;
    own.positive |= (digit > of.most ? 1u : 0u) << k;
  }
  return own;
}

// A bit for each own sum of at least this size.
__device__ uint32_t mask_of(const OwnSums& own, uint32_t size) {
  uint32_t mask = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) mask |= (own.sizes[k] >= size ? 1u : 0u) << k;
  return mask;
}

// A bit for each own group with a sum that is not 0. `mask`: a bit for each such sum.
__device__ uint32_t groups_in(uint32_t mask) {
  constexpr uint32_t kAll = (1u << kGroup) - 1;
  static_assert(kPerThread == 2 * kGroup, "a thread has two groups");
  return ((mask & kAll) != 0 ? 1u : 0u) | ((mask >> kGroup & kAll) != 0 ? 2u : 0u);
}

// The bits of `bits` where `mask` has ones, moved together.
__device__ uint32_t picked(uint32_t bits, uint32_t mask) {
  uint32_t result = 0;
  int count = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    result |= (bits >> k & mask >> k & 1u) << count;
    count += static_cast<int>(mask >> k & 1u);
  }
  return result;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ WritePlanesCall call) {
  CSGD_SHARED_ARRAY(uint32_t, of_warps, kWarps);
  const int64_t row = blockIdx.x / blocks_of_row(call.of), block = blockIdx.x % blocks_of_row(call.of);
  const OwnSums own = own_sums(call, row, block);
  uint32_t total = 1;
  for (uint32_t kind = 0; kind <= call.of.most; ++kind) {
    if (total != 0) {  // of larger sums there are no more
      const uint32_t mask = mask_of(own, kind == 0 ? 1 : kind);
      sum_before(static_cast<uint32_t>(__popc(kind == 0 ? groups_in(mask) : mask)), of_warps, total);
    }
    if (threadIdx.x == 0) counts_of(call, row, kind)[block] = total;
  }
}

// Each block adds up the counts of one kind in one row: each becomes the sum of those before it.
__global__ void __launch_bounds__(kThreads) add_counts_kernel(const __grid_constant__ WritePlanesCall call) {
  CSGD_SHARED_ARRAY(uint32_t, of_warps, kWarps);
  const int64_t blocks = blocks_of_row(call.of);
  int64_t* counts = counts_of(call, blockIdx.x / kinds_of(call.of), blockIdx.x % kinds_of(call.of));
  int64_t sum = 0;
  for (int64_t first = 0; first < blocks; first += kThreads) {
    const int64_t at = first + threadIdx.x;
    uint32_t total = 0;
    const uint32_t before = sum_before(at < blocks ? static_cast<uint32_t>(counts[at]) : 0, of_warps, total);
    if (at < blocks) counts[at] = sum + before;
    sum += total;
  }
  if (threadIdx.x == 0) counts[blocks] = sum;
}

// One thread for each row finds how many bytes this takes.
__global__ void __launch_bounds__(kThreads) length_kernel(const __grid_constant__ WritePlanesCall call) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= call.of.rows) return;
  const int64_t blocks = blocks_of_row(call.of), limit = row_bytes(call.of);
  const int64_t not_zero = counts_of(call, row, 1)[blocks];
  int64_t bytes = bytes_of(groups_of(call.of)) + bytes_of(counts_of(call, row, 0)[blocks] * kGroup);
  bytes += bytes_of(not_zero);
  int64_t left = not_zero;
  for (uint32_t size = 1; size < call.of.most && left > 0 && bytes < limit; ++size) {
    bytes += bytes_of(left);
    left = counts_of(call, row, int64_t{size} + 1)[blocks];
  }
  call.lengths[row] = bytes < limit ? bytes : limit;
}

// Sets up to kPerThread bits from bit `at` of a row on. Neighbours may set others of the same word.
__device__ void set_bits(uint8_t* row, int64_t at, uint32_t bits) {
  auto* words = reinterpret_cast<unsigned*>(row) + at / 32;
  const uint64_t both = uint64_t{bits} << at % 32;
  const auto low = static_cast<unsigned>(both), high = static_cast<unsigned>(both >> 32);
  if (low != 0) atomicOr(words, low);
  if (high != 0) atomicOr(words + 1, high);
}

__global__ void __launch_bounds__(kThreads) write_kernel(const __grid_constant__ WritePlanesCall call) {
  CSGD_SHARED_ARRAY(uint32_t, of_warps, kWarps);
  const PlaneRows& of = call.of;
  const int64_t blocks = blocks_of_row(of), row = blockIdx.x / blocks, block = blockIdx.x % blocks;
  uint8_t* to = call.bytes + row * row_bytes(of);
  if (call.lengths[row] == row_bytes(of)) {  // as words
    for (int64_t w = block * kThreads + threadIdx.x; w < of.words; w += blocks * kThreads) {
      reinterpret_cast<uint32_t*>(to)[w] = call.words[row * of.words + w];
    }
    return;
  }
  const OwnSums own = own_sums(call, row, block);
  uint32_t mask = mask_of(own, 1), total = 0;  // of the own sums that have bits in the plane
  const uint32_t groups = groups_in(mask);
  set_bits(to, (block * kThreads + threadIdx.x) * (kPerThread / kGroup), groups);
  int64_t plane = bytes_of(groups_of(of));

  const int64_t* counts = counts_of(call, row, 0);
  int64_t at = counts[block] + sum_before(static_cast<uint32_t>(__popc(groups)), of_warps, total);
  if ((groups & 1u) == 0) mask >>= kGroup;  // only groups that have a bit take four in this plane
  set_bits(to, plane * kByte + at * kGroup, mask);
  plane += bytes_of(counts[blocks] * kGroup);

  mask = mask_of(own, 1);
  uint32_t bits = own.positive;
  for (uint32_t size = 0; size < of.most; ++size) {  // the plane of signs, then those of size > 1, > 2, ...
    const uint32_t kind = size == 0 ? 1 : size;
    counts = counts_of(call, row, kind);
    if (size != 0) {
      mask = mask_of(own, kind);
      bits = mask_of(own, kind + 1);
    }
    at = counts[block] + sum_before(static_cast<uint32_t>(__popc(mask)), of_warps, total);
    set_bits(to, plane * kByte + at, picked(bits, mask));
    if (total == 0 && size != 0) return;  // this block has no larger sums
    plane += bytes_of(counts[blocks]);
  }
}

// Reading. Planes: 0 of groups, 1 of their sums, 2 of signs, 2 + s of size > s.

constexpr int kSigns = 2;

__host__ __device__ int64_t planes_of(const PlaneRows& of) { return int64_t{of.most} + kSigns; }
// A row that is planes is shorter than its words, and each plane may begin one more number.
__host__ __device__ int64_t ranks_of_row(const PlaneRows& of) { return row_bytes(of) / kRankBytes + planes_of(of) + 1; }

// Where a plane begins among the bytes, and its numbers among those of the directory.
struct PlaneTable {
  int64_t byte;
  int64_t rank;
};

__device__ PlaneTable* table_of(const ReadPlanesCall& call, int64_t row) {
  return reinterpret_cast<PlaneTable*>(call.tables) + row * planes_of(call.of);
}

__device__ uint32_t bit_of(const uint8_t* plane, int64_t i) { return plane[i / kByte] >> (i % kByte) & 1u; }

// How many of the bits [begin, end) are 1; begin is a multiple of 8.
__device__ uint32_t ones(const uint8_t* plane, int64_t begin, int64_t end) {
  uint32_t count = 0;
  int64_t i = begin;
  for (; i + kByte <= end; i += kByte) count += static_cast<uint32_t>(__popc(plane[i / kByte]));
  if (i < end) count += static_cast<uint32_t>(__popc(plane[i / kByte] & ((1u << (end - i)) - 1)));
  return count;
}

// The block fills in the directory of a plane, and returns how many of its first `bits` bits are 1.
__device__ int64_t index_plane(const uint8_t* plane, int64_t bits, int64_t* ranks, uint32_t* of_warps) {
  int64_t sum = 0;
  for (int64_t first = 0; first * kRankBits < bits; first += kThreads) {
    const int64_t number = first + threadIdx.x, begin = number * kRankBits;
    const int64_t end = begin + kRankBits < bits ? begin + kRankBits : bits;
    uint32_t total = 0;
    const uint32_t before = sum_before(begin < bits ? ones(plane, begin, end) : 0, of_warps, total);
    if (begin < bits) ranks[number] = sum + before;
    sum += total;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) index_kernel(const __grid_constant__ ReadPlanesCall call) {
  CSGD_SHARED_ARRAY(uint32_t, of_warps, kWarps);
  const PlaneRows& of = call.of;
  const int64_t row = blockIdx.x, end = call.begins[row + 1];
  PlaneTable next{call.begins[row], row * ranks_of_row(of)};
  const bool as_words = end - next.byte == row_bytes(of);
  int64_t bits = groups_of(of);
  bool whole = true;
  for (int64_t plane = 0; !as_words && whole && plane < planes_of(of); ++plane) {
    whole = bytes_of(bits) <= end - next.byte;
    if (!whole) break;
    if (threadIdx.x == 0) table_of(call, row)[plane] = next;
    const uint8_t* from = call.bytes + next.byte;
    int64_t counted = bits;
    if (plane == 1 && bits > 0 && bit_of(from - bytes_of(groups_of(of)), groups_of(of) - 1) != 0) {
      counted -= groups_of(of) * kGroup - sums_of(of);  // the last group may be cut off by the end of the row
    }
    next.byte += bytes_of(bits);
    if (plane == kSigns) continue;  // the next plane has as many bits
    const int64_t found = index_plane(from, counted, call.ranks + next.rank, of_warps);
    next.rank += (bits + kRankBits - 1) / kRankBits;
    bits = plane == 0 ? found * kGroup : found;
  }
  if (threadIdx.x == 0) call.broken[row] = !as_words && !(whole && next.byte == end);
}

// The planes of a row, with their directories.
struct PlaneReader {
  const ReadPlanesCall& call;
  const PlaneTable* table;

  __device__ uint32_t bit(int64_t plane, int64_t i) const { return bit_of(call.bytes + table[plane].byte, i); }

  // How many ones there are before bit i.
  __device__ int64_t rank(int64_t plane, int64_t i) const {
    const int64_t number = i / kRankBits;
    return call.ranks[table[plane].rank + number] + ones(call.bytes + table[plane].byte, number * kRankBits, i);
  }

  // The sum at a position of the row, plus `most`.
  __device__ uint32_t sum(int64_t position) const {
    const uint32_t most = call.of.most;
    if (bit(0, position / kGroup) == 0) return most;
    const int64_t in_groups = rank(0, position / kGroup) * kGroup + position % kGroup;
    if (bit(1, in_groups) == 0) return most;
    int64_t at = rank(1, in_groups);
    const bool positive = bit(kSigns, at) != 0;
    uint32_t size = 1;
    for (; size < most && bit(kSigns + size, at) != 0; ++size) at = rank(kSigns + size, at);
    return positive ? most + size : most - size;
  }
};

__global__ void __launch_bounds__(kThreads) read_kernel(const __grid_constant__ ReadPlanesCall call) {
  const PlaneRows& of = call.of;
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (number >= of.rows * of.words) return;
  const int64_t row = number / of.words, word = number % of.words, begin = call.begins[row];
  if (call.broken[row]) return;
  uint32_t value = 0;
  if (call.begins[row + 1] - begin == row_bytes(of)) {
    const uint8_t* from = call.bytes + begin + word * static_cast<int64_t>(sizeof(uint32_t));
    for (int k = 3; k >= 0; --k) value = value << kByte | from[k];
  } else {
    const PlaneReader reader{call, table_of(call, row)};
    for (int place = of.places - 1; place >= 0; --place) {
      value = value * of.radix + reader.sum(place * of.words + word);
    }
  }
  call.words[number] = value;
}

}  // namespace

int64_t plane_counts(const PlaneRows& of) { return of.rows * kinds_of(of) * (blocks_of_row(of) + 1); }
int64_t plane_tables(const PlaneRows& of) {
  return of.rows * planes_of(of) * static_cast<int64_t>(sizeof(PlaneTable) / sizeof(int64_t));
}
int64_t plane_ranks(const PlaneRows& of) { return of.rows * ranks_of_row(of); }

cudaError_t launch_write_planes_cuda(WritePlanesCall call, cudaStream_t stream) {
  const int64_t blocks = call.of.rows * blocks_of_row(call.of);
  cudaError_t error = launch_blocks(count_kernel, call, blocks, stream);
  if (error == cudaSuccess) error = launch_blocks(add_counts_kernel, call, call.of.rows * kinds_of(call.of), stream);
  if (error == cudaSuccess) error = launch_blocks(length_kernel, call, blocks_of(call.of.rows, kThreads), stream);
  if (error == cudaSuccess) error = launch_blocks(write_kernel, call, blocks, stream);
  return error;
}

cudaError_t launch_read_planes_cuda(ReadPlanesCall call, cudaStream_t stream) {
  const cudaError_t error = launch_blocks(index_kernel, call, call.of.rows, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks(read_kernel, call, blocks_of(call.of.rows * call.of.words, kThreads), stream);
}

}  // namespace csgd
