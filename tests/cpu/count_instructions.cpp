// SPDX-License-Identifier: Apache-2.0
// Steps a few chunks of one tensor, for valgrind to count the instructions. The set-up is the same for any number of
// chunks, so that two runs differ by the instructions of the chunks alone.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/core/storage.h"
#include "../../csrc/cpu/step_cpu.h"

namespace {

constexpr int64_t kMaxChunks = 4;
constexpr int64_t kNumel = kMaxChunks * csgd::kCpuChunk;

// Pseudo-random values in (-1, 1), most of them small, as gradients are; the same in every run. Or their squares.
template <class S>
void fill(std::vector<unsigned char>& bytes, uint32_t state, bool squared = false) {
  bytes.resize(kNumel * sizeof(S));
  for (int64_t i = 0; i < kNumel; ++i) {
    state = state * 1664525u + 1013904223u;
    const double uniform = static_cast<int32_t>(state) * 0x1p-31;
    const double cube = uniform * uniform * uniform;
    const auto value = static_cast<typename csgd::Storage<S>::Opmath>(squared ? cube * cube : cube);
    const S stored = csgd::Storage<S>::store_nearest(value);
    std::memcpy(&bytes[i * sizeof(S)], &stored, sizeof(S));
  }
}

struct Memory {
  std::vector<unsigned char> param, grad, buffers[csgd::kMostBuffers];
};

template <class S>
csgd::DType fill_all(Memory& memory, csgd::DType dtype) {
  fill<S>(memory.param, 1);
  fill<S>(memory.grad, 2);
  for (uint32_t b = 0; b < csgd::kMostBuffers; ++b) fill<S>(memory.buffers[b], 3 + b, b == 1);
  return dtype;
}

csgd::DType make_memory(const std::string& dtype, Memory& memory) {
  if (dtype == "float32") return fill_all<float>(memory, csgd::DType::kFloat32);
  if (dtype == "float64") return fill_all<double>(memory, csgd::DType::kFloat64);
  if (dtype == "bfloat16") return fill_all<csgd::BFloat16>(memory, csgd::DType::kBFloat16);
  if (dtype == "float16") return fill_all<csgd::Float16>(memory, csgd::DType::kFloat16);
  std::fprintf(stderr, "unknown dtype %s\n", dtype.c_str());
  std::exit(2);
}

struct Options : csgd::SgdOptions {
  bool adamw = false;
};

// Sets one option, named as in the table of figures; false where there is no such option.
bool set_option(Options& options, const std::string& name) {
  if (name == "AdamW") {
    options.adamw = true;
  } else if (name == "momentum") {
    options.momentum = 0.9;
  } else if (name == "nesterov") {
    options.nesterov = true;
  } else if (name == "weight-decay") {
    options.weight_decay = 0.01;
  } else if (name == "c=0") {
    options.calibration = 0;
  } else if (name == "nearest") {
    options.stochastic_rounding = false;
  } else {
    return name == "plain";
  }
  return true;
}

template <class DirectionOptions>
int64_t step(csgd::DType dtype, const DirectionOptions& options, const csgd::StepShard& tensor, int64_t chunks) {
  const auto step_chunk = csgd::chunk_function<DirectionOptions>(dtype);
  int64_t moved = 0;
  for (int64_t k = 0; k < chunks; ++k) {
    moved += step_chunk(options, tensor, k * csgd::kCpuChunk, (k + 1) * csgd::kCpuChunk).moved;
  }
  return moved;
}

csgd::AdamWOptions adamw_options(const csgd::StepOptions& common) {
  csgd::AdamWOptions options{};
  static_cast<csgd::StepOptions&>(options) = common;
  options.beta1 = 0.9;
  options.beta2 = 0.999;
  options.eps = 1e-8;
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: count_instructions ISA DTYPE CHUNKS [OPTION...]\n"), 2;
  const std::string isa = argv[1];
  if (isa != "default" && !csgd::set_cpu_isa(argv[1])) return std::fprintf(stderr, "no %s here\n", argv[1]), 2;
  Memory memory;
  const csgd::DType dtype = make_memory(argv[2], memory);
  const int64_t chunks = std::atoi(argv[3]);
  if (chunks < 1 || chunks > kMaxChunks) return std::fprintf(stderr, "CHUNKS must be 1 to 4\n"), 2;

  Options options{};
  options.lr = 0.1;
  options.one_minus_dampening = 0.1;
  options.calibration = 1;
  options.lipschitz = 1;  // about the largest |d|, as in training; a quarter of the coordinates moves
  options.stochastic_rounding = true;
  options.seed = 1;
  for (int k = 4; k < argc; ++k) {
    if (!set_option(options, argv[k])) return std::fprintf(stderr, "unknown option %s\n", argv[k]), 2;
  }
  int64_t steps = 1;  // not the first step, in which the momentum is the gradient
  csgd::StepShard tensor{};
  tensor.param = memory.param.data();
  tensor.grad = memory.grad.data();
  for (int b = 0; b < csgd::kMostBuffers; ++b) tensor.buffers[b] = memory.buffers[b].data();
  tensor.step = &steps;
  tensor.numel = kNumel;

  const csgd::SgdOptions& sgd = options;
  const int64_t moved =
      options.adamw ? step(dtype, adamw_options(options), tensor, chunks) : step(dtype, sgd, tensor, chunks);
  std::printf("%lld of %lld elements moved\n", static_cast<long long>(moved),
              static_cast<long long>(chunks * csgd::kCpuChunk));
  return moved > 0 ? 0 : 1;
}
