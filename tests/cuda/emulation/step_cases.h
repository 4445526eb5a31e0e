// SPDX-License-Identifier: Apache-2.0
// What step_against_cpu_loop.cpp tries: sizes around every boundary, alignments, dtypes, options and shards.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "compare.h"
#include "csrc/core/params.h"
#include "csrc/cuda/blocks.cuh"

namespace csgd {

// The elements before the data of each array, which misalign it.
struct Offsets {
  int param = 0, grad = 0, buffers[kMostBuffers] = {};
};

struct Case {
  std::string name;
  DType dtype;
  SgdOptions options;
  std::vector<int64_t> sizes;
  Offsets offsets;
  int64_t launches;      // expected of each step
  ShardLayout layout{};  // of all of them
  bool special = false;  // some gradients are infinite, NaN or the largest of the dtype
  bool tiny = false;     // all gradients but those of the first step are the least that the dtype has
  int multiprocessors = 2;
  int steps = 3;
  bool adamw = false;  // by the direction of AdamW; of `options` then those count that all steps have
};

inline AdamWOptions adamw_options(const Case& c) {
  AdamWOptions o{};
  static_cast<StepOptions&>(o) = c.options;
  o.beta1 = 0.9;
  o.beta2 = 0.99;
  o.eps = 1e-8;
  return o;
}

inline bool is_shard(const Case& c) { return c.layout.run_length > 0; }

// What step_kernels.cpp defines: the number of tensors that a launch holds.
int64_t tensors_of_launch(bool adamw);

// Rounds eight values stochastically, as the kernels do it; false where they take the general way for such values.
template <class S>
bool round_eight(const float (&values)[8], uint32_t draw, S (&rounded)[8]);

inline SgdOptions base_options() {
  SgdOptions o{};
  o.lr = 0.1;
  o.momentum = 0.9;
  o.one_minus_dampening = 1.0;
  o.calibration = 1.0;
  o.bound_decay = 0.99;
  o.seed = 0x123456789ABCDEFull;
  o.stochastic_rounding = true;
  return o;
}

// A seed by which one of the first `numel` elements of a model moves in the second step even if n is 1.
inline uint64_t seed_with_a_draw_of_0(int64_t numel) {
  for (uint64_t seed = 0;; ++seed) {
    for (int64_t i = 0; i < numel; ++i) {
      const Philox4x32 call = draw_block(seed, kCalibrationStream, static_cast<uint64_t>(i / kDrawsPerCall), 0, 1);
      if (draw_lane(call, static_cast<int>(i % kDrawsPerCall)) == 0) return seed;
    }
  }
}

// Elements of which each block takes three passes or, with fewer threads, six, on a card of one multiprocessor.
constexpr int64_t kSeveralPasses = kThreads == 256 ? 100000 : kPass * 98;

inline std::vector<Case> several_passes() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({"several passes", dtype, base_options(), {kSeveralPasses, 3}, {}, 1});
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    all.push_back({"several passes, no momentum", dtype, base_options(), {kSeveralPasses, 3}, {}, 1});
    all.back().options.momentum = 0;
    all.push_back({"several passes, weight decay, nesterov", dtype, base_options(), {kSeveralPasses, 3}, {}, 1});
    all.back().options.weight_decay = 0.01;
    all.back().options.nesterov = true;
    all.push_back(
        {"several passes of a shard", dtype, base_options(), {kSeveralPasses, 3}, {}, 1, {80, 100000, 100000, 1, 1}});
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    all.push_back({"several passes, AdamW", dtype, base_options(), {kSeveralPasses, 3}, {}, 1});
    all.back().adamw = true;
  }
  for (Case& each : all) each.multiprocessors = 1;
  return all;
}

inline std::vector<Case> cases() {
  // Allocated, as all else is that kernels read.
  static const std::vector<float> numbers = {2.0f, 0.0f, 3.0f, 0.2f};
  static const float &overflow = numbers[0], &no_overflow = numbers[1], &scale = numbers[2], &lr_tensor = numbers[3];
  // Around a vector, a Philox call, a warp's vectors, a block's pass, and several passes.
  const std::vector<int64_t> boundaries = {0, 1, 7, 8, 9, 255, 256, 257, 2047, 2048, 2049, 6143, 6145, 20000};
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({"boundaries", dtype, base_options(), boundaries, {}, 1});
  }
  const auto with = [&](const char* name, auto change, std::vector<int64_t> sizes, DType dtype, Offsets offsets = {}) {
    SgdOptions o = base_options();
    change(o);
    all.push_back({name, dtype, o, std::move(sizes), offsets, 1});
  };
  const std::vector<int64_t> some = {9, 2048, 5000};
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    all.push_back({.name = "infinite, NaN, too large",
                   .dtype = dtype,
                   .options = base_options(),
                   .sizes = some,
                   .offsets = {},
                   .launches = 1,
                   .special = true});
  }
  with("misaligned", [](SgdOptions&) {}, some, DType::kFloat32, {1, 1, {1, 1}});
  with("misaligned bfloat16", [](SgdOptions&) {}, some, DType::kBFloat16, {3, 3, {3, 3}});
  with("misaligned gradient", [](SgdOptions& o) { o.weight_decay = 0.01; }, some, DType::kFloat32, {0, 1});
  with("misaligned gradient, float16", [](SgdOptions&) {}, some, DType::kFloat16, {0, 5});
  with("misaligned parameter", [](SgdOptions& o) { o.weight_decay = 0.01; }, some, DType::kFloat64, {1});
  with("misaligned momentum", [](SgdOptions&) {}, some, DType::kBFloat16, {0, 0, {7}});
  with("no momentum", [](SgdOptions& o) { o.momentum = 0; }, some, DType::kFloat32);
  with("no momentum, bfloat16", [](SgdOptions& o) { o.momentum = 0; }, some, DType::kBFloat16);
  with("weight decay", [](SgdOptions& o) { o.weight_decay = 0.01; }, some, DType::kFloat32);
  with(
      "weight decay, nesterov, bfloat16", [](SgdOptions& o) { o.weight_decay = 0.01, o.nesterov = true; }, some,
      DType::kBFloat16);
  with(
      "weight decay, no momentum", [](SgdOptions& o) { o.weight_decay = 0.01, o.momentum = 0; }, some, DType::kFloat64);
  with("little moves", [](SgdOptions& o) { o.calibration = 1e3; }, some, DType::kFloat32);
  with("little moves, bfloat16", [](SgdOptions& o) { o.calibration = 1e3; }, some, DType::kBFloat16);
  // The bound is so large that 2^16 / T is below 1, and the product with the least d underflows: one draw moves it.
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    const double calibration = dtype == DType::kFloat64 ? 1e300 : 1e35;
    with(
        "underflow",
        [&](SgdOptions& o) { o.momentum = 0, o.calibration = calibration, o.seed = seed_with_a_draw_of_0(5000); },
        {5000}, dtype);
    all.back().tiny = true;
  }
  with(
      "nesterov, nearest", [](SgdOptions& o) { o.nesterov = true, o.stochastic_rounding = false; }, some,
      DType::kFloat16);
  with(
      "maximize, scaled", [&](SgdOptions& o) { o.maximize = true, o.grad_scale = &scale, o.found_inf = &no_overflow; },
      some, DType::kFloat32);
  with("overflow", [&](SgdOptions& o) { o.found_inf = &overflow; }, some, DType::kFloat32);
  with(
      "lr tensor, no calibration", [&](SgdOptions& o) { o.lr_float32 = &lr_tensor, o.calibration = 0; }, some,
      DType::kFloat64);
  const auto shard = [&](const char* name, DType dtype, ShardLayout layout) {
    all.push_back({name, dtype, base_options(), {0, 1, 7, 8, 9, 2049, 5000}, {}, 1, layout});
  };
  shard("shard of rows", DType::kFloat32, {8 * 1001, 5000, 5000, 1, 5000});
  shard("shard of rows, bfloat16, from within a block", DType::kBFloat16, {1003, 5000, 5000, 1, 5000});
  shard("shard of columns, blocks of 8", DType::kFloat32, {16, 24, 64, 1000, 64000});
  shard("shard of columns, blocks of 4", DType::kFloat32, {16, 6, 64, 1000, 64000});
  shard("shard of columns", DType::kFloat64, {5, 3, 10, 1000, 10000});
  shard("shard of columns, float16", DType::kFloat16, {(int64_t{1} << 36) - 40, 9, 27, 1000, 27000});
  shard("single columns", DType::kBFloat16, {2, 1, 7, 9999, 69993});
  shard("shard of two dimensions", DType::kFloat32, {33, 5, 12, 3, 60});
  // No element is at the position in its vector that its draw has in its call.
  shard("shard of rows from within a vector", DType::kFloat32, {8 * 1001 + 3, 5000, 5000, 1, 5000});
  shard("shard of rows from within a vector, float64", DType::kFloat64, {8 * 1001 + 5, 5000, 5000, 1, 5000});
  shard("shard of rows from the second vector of a call", DType::kFloat32, {8 * 1001 + 4, 5000, 5000, 1, 5000});
  shard("shard of rows, float64", DType::kFloat64, {(int64_t{1} << 36) - 40, 5000, 5000, 1, 5000});
  shard("shard of rows, no momentum", DType::kFloat32, {8 * 1001, 5000, 5000, 1, 5000});
  all.back().options.momentum = 0;
  shard("shard of rows, no momentum, bfloat16", DType::kBFloat16, {0, 5000, 5000, 1, 5000});
  all.back().options.momentum = 0;
  const auto adamw = [&](const char* name, auto change, std::vector<int64_t> sizes, DType dtype, Offsets offsets = {}) {
    with(name, change, std::move(sizes), dtype, offsets);
    all.back().adamw = true;
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    adamw("AdamW, boundaries", [](SgdOptions& o) { o.weight_decay = 0.01; }, boundaries, dtype);
    adamw("AdamW, infinite, NaN, too large", [](SgdOptions&) {}, some, dtype);
    all.back().special = true;
  }
  adamw("AdamW, misaligned", [](SgdOptions& o) { o.weight_decay = 0.01; }, some, DType::kFloat32, {1, 1, {1, 1}});
  adamw("AdamW, misaligned second buffer", [](SgdOptions&) {}, some, DType::kBFloat16, {0, 0, {0, 7}});
  adamw("AdamW, little moves", [](SgdOptions& o) { o.calibration = 1e3; }, some, DType::kBFloat16);
  adamw("AdamW, no calibration", [](SgdOptions& o) { o.calibration = 0; }, some, DType::kFloat64);
  adamw("AdamW, nearest", [](SgdOptions& o) { o.stochastic_rounding = false; }, some, DType::kFloat16);
  adamw(
      "AdamW, maximize, scaled",
      [&](SgdOptions& o) { o.maximize = true, o.grad_scale = &scale, o.found_inf = &no_overflow; }, some,
      DType::kFloat32);
  adamw("AdamW, overflow", [&](SgdOptions& o) { o.found_inf = &overflow; }, some, DType::kFloat32);
  const size_t sgd_shards = all.size();
  shard("AdamW, shard of rows from within a vector", DType::kFloat32, {8 * 1001 + 3, 5000, 5000, 1, 5000});
  shard("AdamW, shard of columns", DType::kFloat64, {5, 3, 10, 1000, 10000});
  shard("AdamW, shard of two dimensions", DType::kBFloat16, {33, 5, 12, 3, 60});
  for (size_t k = sgd_shards; k < all.size(); ++k) all[k].adamw = true;
  // A card of one multiprocessor: chunks of several passes, and blocks that come in any order.
  for (Case& each : several_passes()) all.push_back(std::move(each));
  all.push_back({"many tensors", DType::kFloat32, base_options(), std::vector<int64_t>(161, 40), {}, 1});
  return all;
}

}  // namespace csgd
