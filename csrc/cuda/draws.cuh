// SPDX-License-Identifier: Apache-2.0
// The draws of the elements of a vector. Threads whose vectors share a Philox call each make that call: in float32 two
// of them do, in float64 four. To exchange the result would take a barrier and about as many instructions.
#pragma once

#include "../core/shard.h"

namespace csgd {

// The draws of kCount elements (2, 4 or 8): that of element k lies in word[k % 4], of eight elements as draw_lane()
// says, of fewer in the half that `half` selects.
template <int kCount>
struct VectorDraws {
  static constexpr int kWords = kCount < 4 ? kCount : 4;
  uint32_t word[kWords];
  unsigned half;

  // Adds a draw behind the others, of which the first falls out.
  __device__ __forceinline__ void push(uint32_t draw) {
    const uint32_t first = word[0];
#pragma unroll
    for (int k = 0; k + 1 < kWords; ++k) word[k] = word[k + 1];
    word[kWords - 1] = kCount < 8 ? draw : first >> 16 | draw << 16;
  }

  // Selectors for __byte_perm: two bytes of a word, and above them the upper two of 2^23, which make integers() plus a
  // draw.
  static constexpr unsigned kLow = 0x7610, kHigh = 0x7632;

  __device__ __forceinline__ unsigned half_of(int k) const { return kCount < 8 ? half : k < 4 ? kLow : kHigh; }

  // The draw of element k.
  __device__ __forceinline__ uint32_t operator[](int k) const {
    return half_of(k) == kLow ? word[k % kWords] & 0xFFFFu : word[k % kWords] >> 16;
  }

  // 0xFFFF less the draw of element k, as BFloat16Format::stochastic_addend() has it. Of a word that is inverted first,
  // a GPU adds either half by one instruction.
  __device__ __forceinline__ uint32_t complement(int k) const {
    return k < 4 ? ~word[k % 4] & 0xFFFFu : ~word[k % 4] >> 16;
  }

  // integers() plus the draw of element k.
  template <class T>
  __device__ __forceinline__ T above(int k) const {
    const uint32_t bits = word[k % kWords];
    if constexpr (kCount == 8) {
      return bit_cast<T>(FloatBits<T>::kIntegers + (k < 4 ? bits & 0xFFFFu : bits >> 16));
    } else if constexpr (sizeof(T) == sizeof(float)) {
      return bit_cast<float>(__byte_perm(bits, FloatBits<float>::kIntegers, half_of(k)));
    } else {
      return bit_cast<double>(FloatBits<double>::kIntegers | __byte_perm(bits, 0, half_of(k)));
    }
  }
};

// The draws of the elements `within` ... `within + kCount - 1` of the eight that a Philox call serves; `within` is a
// multiple of kCount.
template <int kCount>
__device__ __forceinline__ VectorDraws<kCount> draws_within(const Philox4x32& call, int within) {
  VectorDraws<kCount> draws;
  draws.half = within < 4 ? VectorDraws<kCount>::kLow : VectorDraws<kCount>::kHigh;
#pragma unroll
  for (int k = 0; k < draws.kWords; ++k) {
    draws.word[k] = kCount == 2 && within % 4 != 0 ? call.word[k + 2] : call.word[k];
  }
  return draws;
}

// The draws of kCount elements from `first` on, a multiple of kCount.
template <int kCount, class Key>
__device__ __forceinline__ VectorDraws<kCount> vector_draws(const Key& key, Stream stream, const StepTensor& tensor,
                                                            int64_t first, uint32_t step) {
  const auto call = static_cast<uint64_t>(first) / kDrawsPerCall;
  return draws_within<kCount>(draw_block(key, stream, call, tensor.index, step),
                              static_cast<int>(static_cast<uint64_t>(first) % kDrawsPerCall));
}

// The same for a shard, whose elements may belong to several calls, one after the other. Past the shard's end the draws
// are those of positions that belong to other shards.
template <int kCount, class Key>
__device__ __forceinline__ VectorDraws<kCount> vector_draws(const Key& key, Stream stream, const StepShard& shard,
                                                            int64_t first, uint32_t step) {
  const ShardLayout& layout = shard.layout;
  int64_t run = layout.run_length >= shard.numel ? 0 : first / layout.run_length;  // a division takes long
  int64_t in_run = first - run * layout.run_length;
  int64_t position = run_position(layout, run) + in_run;
  uint64_t call = static_cast<uint64_t>(position) / kDrawsPerCall;
  Philox4x32 bits = draw_block(key, stream, call, shard.index, step);
  if (position % kCount == 0 && in_run + kCount <= layout.run_length) {
    return draws_within<kCount>(bits, static_cast<int>(position % kDrawsPerCall));
  }
  VectorDraws<kCount> draws = {};
  draws.half = VectorDraws<kCount>::kLow;
#pragma unroll 1
  for (int k = 0; k < kCount; ++k) {
    if (static_cast<uint64_t>(position) / kDrawsPerCall != call) {
      call = static_cast<uint64_t>(position) / kDrawsPerCall;
      bits = draw_block(key, stream, call, shard.index, step);
    }
    draws.push(draw_any_lane(bits, static_cast<int>(position % kDrawsPerCall)));
    ++position;
    if (++in_run == layout.run_length) {
      in_run = 0;
      position = run_position(layout, ++run);
    }
  }
  return draws;
}

}  // namespace csgd
