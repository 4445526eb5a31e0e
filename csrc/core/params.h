// SPDX-License-Identifier: Apache-2.0
// The plain structs that csrc/ops passes to the loops and kernels. They need neither torch nor CUDA.
#pragma once

#include <cstdint>

#include "host_device.h"  // all sources include this file; none may be compiled with the flags that are refused there

namespace csgd {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// What a step counts for one tensor. The optimizer owns one of these for each parameter, so that a GPU launch needs no
// scratch memory and two launches never share any. Zero at the start.
struct StepTally {
  int64_t moved;  // out: coordinates that moved in the last applied step
  // All blocks of a GPU launch add to these three, which are zero again when the step is over.
  unsigned long long largest_bits;  // max |d| over finite d, as the bits of opmath
  unsigned long long moving;        // coordinates that moved so far
  unsigned long long blocks_done;
};

// One parameter tensor, seen as `numel` elements in memory order. All pointers live on one device.
struct StepTensor {
  void* param;           // numel elements of the tensor's dtype
  const void* grad;      // numel elements, same dtype and memory order
  int64_t* step;         // steps applied so far
  void* bound;           // Lipschitz bound, one opmath scalar; null when the constant is fixed
  StepTally* tally;      // may be null on a CPU
  int64_t numel;         // may be 0: the step and the bound advance all the same
  uint32_t index;        // position of the parameter over all param groups
  uint32_t first_block;  // on a GPU: the first block of the launch that works on it; set by the launcher
};

// The same with the buffers of its direction's state: each numel elements, same dtype and memory order; null where the
// options need none.
template <int kBuffers>
struct BufferedTensor : StepTensor {
  void* buffers[kBuffers];
};

constexpr int kMostBuffers = 2;  // of any direction

// Where the elements of a shard lie in the whole parameter. In memory order they form runs of consecutive positions,
// and the runs form groups. A tensor that is split along one dimension is one group; a second split makes several
// groups.
struct ShardLayout {
  int64_t offset;        // position of the first element
  int64_t run_length;    // elements of a run; 0: this is no shard but the whole parameter
  int64_t run_stride;    // positions from the start of a run to the start of the next one in its group
  int64_t group_runs;    // runs in a group
  int64_t group_stride;  // positions from the start of a group to the start of the next one
};

// A parameter tensor, or the part of it that one process holds.
struct StepShard : BufferedTensor<kMostBuffers> {
  ShardLayout layout;
};

CSGD_HOST_DEVICE bool is_shard(const StepShard& tensor) { return tensor.layout.run_length != 0; }

// The options that the steps of all directions have. Doubles are rounded once to opmath where they are used.
struct StepOptions {
  double lr;
  const float* lr_float32;   // a learning rate given as a tensor on the parameters' device; null: use `lr`
  const double* lr_float64;  // likewise
  double weight_decay;
  double calibration;       // c
  double lipschitz;         // the fixed Lipschitz constant, where StepTensor::bound is null
  double bound_decay;       // beta
  const float* grad_scale;  // the gradients given are *grad_scale times too large; null: they are right
  const float* found_inf;   // where it is not 0 the step changes nothing at all; null: the step always happens
  uint64_t seed;
  bool maximize;
  bool stochastic_rounding;  // of what is stored in float16 and bfloat16; false: round to nearest even
};

struct SgdOptions : StepOptions {
  double momentum;
  double one_minus_dampening;  // 1 - dampening, formed in double precision
  bool nesterov;
  bool fresh_momentum;  // the momentum buffers are new, even where `step` is not 0
};

struct AdamWOptions : StepOptions {
  double beta1;
  double beta2;
  double eps;
};

// What the calibration of a gradient counts. Behind this struct lies one more word for each channel. Zero at the start.
struct CalibrationTally {
  int64_t moved;  // out: coordinates passed on by the last call
  int64_t numel;  // out: numel of the last call
  // All blocks of a GPU launch add to these two, and to the words behind: max |d| of each channel, as the bits of
  // opmath.
  unsigned long long moving;
  unsigned long long blocks_done;
};

// One gradient to calibrate, seen as `numel` elements in memory order. All pointers live on one device.
struct CalibrateGradCall {
  const void* grad;         // numel elements of the tensor's dtype
  void* out;                // numel elements, same dtype and memory order
  const int64_t* index;     // a number that makes the draws of this layer differ from those of others
  int64_t* step;            // gradients calibrated so far
  double* bounds;           // Lipschitz bound of each channel, rounded to opmath; null when the constant is fixed
  CalibrationTally* tally;  // may be null on a CPU
  int64_t numel;            // may be 0: the step and the bounds advance all the same
  int64_t channels;         // 1: one bound for all elements
  int64_t inner;            // consecutive elements that share a channel
  double calibration;       // c
  double lipschitz;         // the fixed Lipschitz constant, where `bounds` is null
  double bound_decay;       // beta
  uint64_t seed;
  bool stochastic_rounding;  // of what is stored in float16 and bfloat16; false: round to nearest even
  uint32_t rank;             // of the process, below 2^16; each process has its own gradients and its own draws
  int64_t chunk;             // on a GPU: elements that a block takes; set by the launcher
};

}  // namespace csgd
