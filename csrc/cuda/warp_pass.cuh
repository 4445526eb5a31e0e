// SPDX-License-Identifier: Apache-2.0
// The step of a warp's pass: 256 consecutive elements, at addresses that allow 16-byte accesses. This loop is to reach
// the bandwidth of a GPU's memory:
//
// - An instruction of the warp reads or writes 512 consecutive bytes (vectors.cuh). In float32 the eight elements of a
//   Philox call then belong to two lanes, in float64 to four. Each lane makes one call, and the lanes exchange the
//   results through shared memory.
// - Gradients and momentum are copied ahead to shared memory, without using registers, so that the memory is busy while
//   a warp makes draws. With momentum they are copied one pass ahead in float32, three in 16 bits; in float64, where
//   one pass fills the room, while the draws of the same pass are made. A lane copies only what it will read itself, so
//   no lane waits for another.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "block8.cuh"

namespace csgd {

constexpr int64_t kWarpPass = 32 * kPerThread;

// Gradients and momentum on their way to shared memory. Without kMayHaveMomentum there is no room for momentum.
template <class S, bool kMayHaveMomentum>
class Ahead {
 public:
  // `grad`, `momentum_buffer`: the addresses of the lane's first vector in the first of `passes` passes. The momentum
  // buffer is read only with `momentum`.
  __device__ __forceinline__ Ahead(const S* grad, const S* momentum_buffer, bool momentum, int passes)
      : grad_(grad), momentum_buffer_(momentum_buffer), momentum_(kMayHaveMomentum && momentum), left_(passes) {
    CSGD_SHARED_ARRAY(Vector<S>, slots, kSlots * kSlotSize);
    slots_ = slots + threadIdx.x;
#pragma unroll
    for (unsigned slot = 0; slot < kSlots - 1; ++slot) copy(slot);
  }

  // Begins to fill the slot that the previous pass has emptied.
  __device__ __forceinline__ void refill() { copy((slot_ + kSlots - 1) % kSlots); }

  // Waits for the copies of the next pass and reads them.
  template <class T>
  __device__ __forceinline__ void take(T (&grad)[kPerThread], T (&momentum)[kPerThread]) {
    __pipeline_wait_prior(kSlots - 1);
    __syncwarp();  // lets the compiler move no read before the wait, and separates this pass's LaneDraws from the
                   // LaneDraws of the previous pass
    read(0, grad);
    if (momentum_) read(1, momentum);
    slot_ = (slot_ + 1) % kSlots;
  }

 private:
  static constexpr int kArray = Lanes<S>::kVectors * kThreads;           // vectors of a block's pass
  static constexpr int kSlotSize = (kMayHaveMomentum ? 2 : 1) * kArray;  // vectors
  // 32 KB of a block: with three blocks a multiprocessor then has 48 KB or more on the way, except in float64.
  static constexpr unsigned kSlots = std::max(1, 8 * kThreads / kSlotSize);

  __device__ __forceinline__ void copy(unsigned slot) {
    if (left_ > 0) {
#pragma unroll
      for (int v = 0; v < Lanes<S>::kVectors; ++v) {
        Vector<S>* to = slots_ + slot * kSlotSize + v * kThreads;
        __pipeline_memcpy_async(to, grad_ + v * Lanes<S>::kStride, sizeof(Vector<S>));
        if (momentum_) {
          __pipeline_memcpy_async(to + kArray, momentum_buffer_ + v * Lanes<S>::kStride, sizeof(Vector<S>));
        }
      }
      grad_ += kPass;
      momentum_buffer_ += kPass;
      --left_;
    }
    __pipeline_commit();
  }

  template <class T>
  __device__ __forceinline__ void read(int array, T (&to)[kPerThread]) const {
    LaneVectors<S> vectors;
#pragma unroll
    for (int v = 0; v < Lanes<S>::kVectors; ++v) vectors[v] = slots_[slot_ * kSlotSize + array * kArray + v * kThreads];
    widen<S>(vectors, to);
  }

  const S* grad_;
  const S* momentum_buffer_;
  bool momentum_;
  int left_;           // passes whose copies have not begun
  unsigned slot_ = 0;  // of the next pass
  Vector<S>* slots_;
};

// integers() plus the calibration draws of the lane's elements, given the draws of the Philox call that this lane made.
// `words`: room for the draws of each lane of the warp, which the other lanes read. The barrier in take() separates the
// reads of one pass from the writes of the next.
template <class S, class T>
class LaneDraws {
 public:
  __device__ __forceinline__ LaneDraws(const Philox4x32& own, Vector<uint32_t>* words) {
    if constexpr (Lanes<S>::kOwnDraws) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) word_[k] = own.word[k & 3];
    } else {
      words[lane()] = {{own.word[0], own.word[1], own.word[2], own.word[3]}};
      __syncwarp();
      // Of a call a vector needs kEach draws: that many words from this one on, of each the same half.
      const int within = lane() * Lanes<S>::kEach % kPerThread;
      half_ = within < 4 ? kLowHalf : kHighHalf;
      const auto* from = words + lane() * Lanes<S>::kEach / kPerThread;
#pragma unroll
      for (int v = 0; v < Lanes<S>::kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < Lanes<S>::kEach; ++e) {
          word_[v * Lanes<S>::kEach + e] = from[v * Lanes<S>::kStride / kPerThread].value[within % 4 + e];
        }
      }
    }
  }

  __device__ __forceinline__ T operator()(int k) const {
    return half_above<T>(word_[k], !Lanes<S>::kOwnDraws ? half_ : k < 4 ? kLowHalf : kHighHalf);
  }

 private:
  uint32_t word_[kPerThread];
  unsigned half_;
};

// The passes of one warp over the elements begin ... end - 1 that a block takes; their number is a multiple of
// kWarpPass.
template <class S, class Parts>
class WarpPasses {
 public:
  // Begins to copy the first passes.
  __device__ __forceinline__ WarpPasses(const Parts& parts, const CsgdTensor& tensor, int64_t begin, int64_t end)
      : tensor_(tensor),
        position_(begin + threadIdx.x / 32 * kWarpPass),
        passes_(static_cast<int>((end - position_ + kPass - kWarpPass) / kPass)),
        ahead_(static_cast<const S*>(tensor.grad) + lane_position(), momentum_buffer() + lane_position(),
               parts.momentum, passes_) {
    if constexpr (!Lanes<S>::kOwnDraws) {
      CSGD_SHARED_ARRAY(Vector<uint32_t>, words, kThreads);
      words_ = words + threadIdx.x / 32 * 32;
    }
  }

  // `call`: the number of the Philox call that serves the first eight elements of the tensor.
  template <class T, class Header>
  __device__ __forceinline__ void step(const Header& header, const Parts& parts, const StepScalars<T>& scalars,
                                       uint64_t call, Partial<T>& partial) {
    const bool stochastic = header.options.stochastic_rounding;
    S* param_at = static_cast<S*>(tensor_.param) + lane_position();
    S* momentum_at = momentum_buffer() + lane_position();
    call += static_cast<uint64_t>(position_) / kDrawsPerCall + static_cast<uint64_t>(lane());
#pragma unroll 1
    for (int pass = 0; pass < passes_; ++pass) {
      const auto draws_of = [&](Stream stream) {
        return draw_block(header.keys, stream, call, tensor_.index, scalars.step);
      };
      T grad[kPerThread], param[kPerThread] = {}, momentum[kPerThread] = {}, d[kPerThread], above[kPerThread];
      LaneVectors<S> param_vectors = {};
      if (parts.weight_decay) {
        load_vectors(param_at, 0xFFu, param_vectors);
        widen<S>(param_vectors, param);
      }
      ahead_.refill();
      // In float32 and float64 the draws are made before the wait. In 16 bits three passes are already on their way,
      // and registers are scarce, so they are made after it.
      Philox4x32 own;
      if constexpr (!Lanes<S>::kOwnDraws) own = draws_of(kCalibrationStream);
      ahead_.take(grad, momentum);
      if constexpr (Lanes<S>::kOwnDraws) own = draws_of(kCalibrationStream);
      const LaneDraws<S, T> draw(own, words_);
      const uint32_t move = decide8(parts, scalars, draw, grad, param, momentum, d, above, partial);
      partial.moved += __popc(move);
      if (parts.momentum) {
        LaneVectors<S> momentum_vectors;
        narrow<S>(stochastic, [&] { return draws_of(kMomentumStream); }, momentum, 0xFFu, momentum_vectors);
        store_vectors(momentum_at, 0xFFu, momentum_vectors);
      }
      if (move != 0) {  // if none moves, the parameter's memory is not touched
        if (!parts.weight_decay) load_vectors(param_at, move, param_vectors);
        widen<S>(param_vectors, param);
        move8(scalars, d, above, move, param);
        narrow<S>(stochastic, [&] { return draws_of(kParamStream); }, param, move, param_vectors);
        store_vectors(param_at, move, param_vectors);
      }
      param_at += kPass;
      momentum_at += kPass;
      call += kPass / kDrawsPerCall;
    }
  }

 private:
  __device__ __forceinline__ int64_t lane_position() const { return position_ + lane() * Lanes<S>::kEach; }
  __device__ __forceinline__ S* momentum_buffer() const { return static_cast<S*>(tensor_.momentum_buffer); }

  const CsgdTensor& tensor_;
  int64_t position_;  // of the first pass
  int passes_;
  Ahead<S, Parts::kMayHaveMomentum> ahead_;
  Vector<uint32_t>* words_ = nullptr;
};

}  // namespace csgd
