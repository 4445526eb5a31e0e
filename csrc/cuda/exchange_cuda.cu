// SPDX-License-Identifier: Apache-2.0
// The gradient exchange on a GPU: from gradients to codes, to words, to sums of words, and back.
#include <cuda_runtime.h>

#include "blocks.cuh"
#include "exchange_cuda.h"
#include "vectors.cuh"

namespace csgd {
namespace {

// Encodes `count` (1 ... 8) elements from `position`, a multiple of 8, on.
template <class S>
__device__ __forceinline__ void encode8(const EncodeCall& call, double bound, const CodeUnits& units, int64_t position,
                                        int count) {
  Vector<S> stored[kPerThread / Vector<S>::kSize];
  load(static_cast<const S*>(call.grad) + position, count == kPerThread && aligned16(call.grad), count, stored);
  const auto block = static_cast<uint64_t>(position) / kDrawsPerCall;
  const Philox4x32 bits = draw_block(call.seed, kExchangeStream, block, call.index, call.step);
  const bool zero = codes_are_zero(bound);
  uint8_t codes[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const float g = Storage<S>::load(element(stored, k));
    const uint32_t draw = draw_lane(bits, k);
    bool above, decided;
    compare_in_float(units, cast_bits<float>(magnitude_bits(g)), draw_value<float>(own_digit(call, g, draw)), above,
                     decided);
    codes[k] = static_cast<uint8_t>(signed_code(g, above && !zero));
    if (!decided && !zero) codes[k] = exact_code(call, bound, g, position + k, draw);
  }
  // The codes of several gradients lie side by side, so their addresses need not be aligned.
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    if (k < count) call.codes[position + k] = codes[k];
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ EncodeCall call) {
  const double bound = *call.bound;
  const CodeUnits units = code_units(bound);
  const int64_t begin = int64_t{blockIdx.x} * call.chunk;
  const int64_t end = begin + call.chunk < call.numel ? begin + call.chunk : call.numel;
  for (int64_t i = begin + int64_t{threadIdx.x} * kPerThread; i < end; i += kPass) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    encode8<S>(call, bound, units, i, count);
  }
}

// In the kernels below each thread has one word, or one element.
__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackCall call) {
  const int64_t number = thread_number();
  if (number >= call.rows * call.words_per_row) return;
  const int64_t row = number / call.words_per_row, word = number % call.words_per_row;
  const int64_t left = call.numel - row * call.row, available = left < call.row ? left : call.row;
  const auto* digits = static_cast<const uint8_t*>(call.digits) + row * call.row;
  uint32_t value = 0;
  for (int place = call.places - 1; place >= 0; --place) {
    const int64_t at = place * call.words_per_row + word;
    value = value * call.radix + (at < available ? digits[at] : 0u);
  }
  call.words[number] = value;
}

// The sum of all ranks' codes of a coordinate, plus the number of ranks.
__device__ __forceinline__ uint32_t sum_of_codes(const AddCall& call, int64_t position) {
  const double inverse = inverse_power(kCodeRadix, static_cast<int>(position / call.code_words));
  double sum = 0.0;
  for (int64_t rank = 0; rank < call.ranks; ++rank) {
    const uint32_t word = call.codes[rank * call.code_words + position % call.code_words];
    double value = divided(static_cast<double>(word), inverse);
    sum += take_digit(value, double{kCodeRadix}, 1.0 / kCodeRadix);
  }
  return static_cast<uint32_t>(sum);
}

__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ AddCall call) {
  const PackCall& sums = call.sums;
  const int64_t word = thread_number();
  if (word >= sums.words_per_row) return;
  uint32_t value = 0;
  for (int place = sums.places - 1; place >= 0; --place) {
    const int64_t at = place * sums.words_per_row + word;
    value = value * sums.radix + (at < sums.row ? sum_of_codes(call, at) : 0u);
  }
  sums.words[word] = value;
}

template <class S>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ DecodeCall call) {
  const int64_t i = thread_number();
  if (i >= call.numel) return;
  const SumPlace at = sum_place(call, call.first + i);
  double word = divided(static_cast<double>(call.words[at.word]), inverse_power(call.radix, at.place));
  const double digit = take_digit(word, static_cast<double>(call.radix), inverse_power(call.radix, 1));
  const double value = (digit - static_cast<double>(call.ranks)) * *call.unit;
  static_cast<S*>(call.grad)[i] = Storage<S>::store_nearest(static_cast<float>(value));
}

}  // namespace

cudaError_t launch_encode_cuda(DType dtype, EncodeCall call, cudaStream_t stream) {
  const cudaError_t error = choose_chunk(call.numel, &call.chunk);
  if (error != cudaSuccess) return error;
  const int64_t blocks = blocks_of(call.numel, call.chunk);
  return with_coded_storage(
      dtype, [&](auto tag) { return launch_blocks(encode_kernel<decltype(tag)>, call, blocks, stream); });
}

cudaError_t launch_pack_cuda(PackCall call, cudaStream_t stream) {
  return launch_blocks(pack_kernel, call, blocks_of(call.rows * call.words_per_row, kThreads), stream);
}

cudaError_t launch_add_cuda(AddCall call, cudaStream_t stream) {
  return launch_blocks(add_kernel, call, blocks_of(call.sums.words_per_row, kThreads), stream);
}

cudaError_t launch_decode_cuda(DType dtype, DecodeCall call, cudaStream_t stream) {
  const int64_t blocks = blocks_of(call.numel, kThreads);
  return with_coded_storage(
      dtype, [&](auto tag) { return launch_blocks(decode_kernel<decltype(tag)>, call, blocks, stream); });
}

}  // namespace csgd
