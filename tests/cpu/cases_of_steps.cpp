// SPDX-License-Identifier: Apache-2.0
// The steps of CSGD and AdamW.
#include <algorithm>

#include "../../csrc/cpu/step_cpu.h"
#include "cases.h"

namespace cases {
namespace {

using namespace csgd;

// One whole tile of 16-bit numbers, then a part of one, then what does not fill a group of vectors.
constexpr int64_t kNumel = 2048 + 256 + 77;
constexpr int kSteps = 3;

// A direction, under the name that a case has for it. `buffers`: how many its state has.
template <class Options>
struct Direction {
  const char* name;
  int buffers;
  void (*set)(Options&);
};

constexpr Direction<SgdOptions> kSgd[] = {
    {"plain", 0, [](SgdOptions&) {}},
    {"decay", 0, [](SgdOptions& o) { o.weight_decay = 0.01; }},
    {"momentum", 1, [](SgdOptions& o) { o.momentum = 0.9; }},
    {"momentum-decay", 1, [](SgdOptions& o) { o.momentum = 0.9, o.weight_decay = 0.01; }},
    {"nesterov", 1, [](SgdOptions& o) { o.momentum = 0.9, o.nesterov = true; }},
    {"nesterov-decay", 1, [](SgdOptions& o) { o.momentum = 0.9, o.nesterov = true, o.weight_decay = 0.01; }},
};
constexpr Direction<AdamWOptions> kAdamW[] = {
    {"plain", 2, [](AdamWOptions&) {}},
    {"decay", 2, [](AdamWOptions& o) { o.weight_decay = 0.01; }},
    {"no-eps", 2, [](AdamWOptions& o) { o.eps = 0; }},
};

void set_defaults(SgdOptions& options) { options.one_minus_dampening = 1; }
void set_defaults(AdamWOptions& options) { options.beta1 = 0.9, options.beta2 = 0.999, options.eps = 1e-8; }

// c, and l where it is fixed. The bound that is not fixed is 0 in the first step, in which every coordinate moves. With
// l = 1e6 products of small gradients underflow.
struct Calibration {
  const char* name;
  double calibration;
  double lipschitz;
};
constexpr Calibration kCalibrations[] = {{"c=0", 0, 0}, {"c=0.3", 0.3, 0}, {"l=1e6", 1, 1e6}};

const float kGradScale = 3;
const double kLr = 0.01;

// Ways to call the step: "shard" takes a part of a parameter, beyond position 2^35; "scaled" a scale of the gradients,
// the sign of maximize and a learning rate in memory.
template <class Options>
void set_way(const std::string& way, Options& options, StepShard& tensor) {
  if (way == "shard") tensor.layout = {(int64_t{1} << 35) + 5, 37, 50, 3, 1000};
  if (way == "scaled") {
    options.grad_scale = &kGradScale;
    options.maximize = true;
    options.lr_float64 = &kLr;
  }
}

template <class S, class Options>
void run(DType dtype, Options options, StepShard tensor, int buffers, Fill fill, Memory& memory) {
  using T = typename Storage<S>::Opmath;
  tensor.param = memory.make<S>("param", kNumel, fill);
  tensor.grad = memory.make<S>("grad", kNumel, fill);
  for (int b = 0; b < buffers; ++b) tensor.buffers[b] = memory.make<S>("buffer" + std::to_string(b), kNumel, fill);
  tensor.step = memory.make<int64_t>("step", 1, Fill::kZeros);
  if (options.lipschitz == 0) tensor.bound = memory.make<T>("bound", 1, Fill::kZeros);
  tensor.tally = reinterpret_cast<StepTally*>(memory.make<int64_t>("tally", 4, Fill::kZeros));
  tensor.numel = kNumel;
  tensor.index = 7;
  for (int k = 0; k < kSteps; ++k) {
    const ChunkResult result = chunk_function<Options>(dtype)(options, tensor, 0, kNumel);
    finish_tensor(dtype, options, tensor, result);
  }
}

template <class Options, class Directions>
void of_directions(const char* optimizer, const Directions& directions, DType dtype, const Take& take) {
  for (const Direction<Options>& direction : directions)
    for (const char* rounding : {"stochastic", "nearest"})
      for (const Calibration& calibration : kCalibrations)
        for (const char* way : {"whole", "shard", "scaled"})
          for (const NamedFill& fill : kFills) {
            std::string name = optimizer;
            for (const char* word : {name_of(dtype), direction.name, rounding, calibration.name, way, fill.name}) {
              (name += ' ') += word;
            }
            take(name, [&](Memory& memory) {
              Options options{};
              set_defaults(options);
              options.lr = 0.1;
              options.calibration = calibration.calibration;
              options.lipschitz = calibration.lipschitz;
              options.bound_decay = 0.99;
              options.seed = 0xFEDCBA9876543210u;
              options.stochastic_rounding = rounding[0] == 's';
              direction.set(options);
              StepShard tensor{};
              set_way(way, options, tensor);
              with_storage(dtype, [&](auto tag) {
                run<decltype(tag)>(dtype, options, tensor, direction.buffers, fill.fill, memory);
              });
            });
          }
}

}  // namespace

void steps(const Take& take) {
  for (const csgd::DType dtype : csgd::kDTypes) {
    of_directions<csgd::SgdOptions>("csgd", kSgd, dtype, take);
    of_directions<csgd::AdamWOptions>("adamw", kAdamW, dtype, take);
  }
}

}  // namespace cases
