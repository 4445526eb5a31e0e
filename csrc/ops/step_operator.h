// SPDX-License-Identifier: Apache-2.0
// An operator that makes the step of a direction, on the CPU and on CUDA. It is made of a struct that says what is the
// direction's own:
//     using Args = ...;                             its arguments, as in arguments.h
//     using Options = ...;                          those of csrc/core
//     static constexpr const char* kName = ...;     in torch.ops.csgd_cuda
//     static StepArgs common(const Args&);          the arguments that all steps have
//     static void check(const Args&);               the options of the direction alone
//     static Options options(const Args&);          likewise; the others are zero
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../core/update_rule.h"
#include "../cpu/step_cpu.h"
#include "parallel.h"
#include "step.h"

#if CSGD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/step_cuda.h"
#endif

namespace csgd {

// On the CPU: torch's threads divide the chunks of all tensors between them.

struct Chunk {
  size_t tensor;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kWorthThreads = 2 * kCpuChunk;  // with fewer elements, waking other threads costs more than it saves

inline std::vector<Chunk> chunks_of(const std::vector<PackedTensor>& tensors, int64_t* elements) {
  std::vector<Chunk> chunks;
  *elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].tensor.numel;
    for (int64_t begin = 0; begin < numel; begin += kCpuChunk) {
      chunks.push_back({i, begin, std::min(begin + kCpuChunk, numel)});
    }
    *elements += numel;
  }
  return chunks;
}

template <class Options>
void run_cpu(const PackedStep& step, const Options& options) {
  if (overflowed(options)) return;
  int64_t elements = 0;
  const std::vector<Chunk> chunks = chunks_of(step.tensors(), &elements);
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<ChunkResult> results(chunks.size());
  const auto run_chunks = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const PackedTensor& packed = step.tensors()[chunks[c].tensor];
      results[c] = chunk_function<Options>(packed.dtype)(options, packed.tensor, chunks[c].begin, chunks[c].end);
    }
  };
  if (elements < kWorthThreads) {
    run_chunks(0, count);
  } else {
    parallel_for(0, count, 1, run_chunks);
  }
  std::vector<ChunkResult> totals(step.tensors().size());
  for (int64_t c = 0; c < count; ++c) {
    ChunkResult& total = totals[chunks[c].tensor];
    total.largest_bits = std::max(total.largest_bits, results[c].largest_bits);
    total.moved += results[c].moved;
  }
  for (size_t i = 0; i < totals.size(); ++i) {
    finish_tensor(step.tensors()[i].dtype, options, step.tensors()[i].tensor, totals[i]);
  }
}

#if CSGD_WITH_CUDA
// Older drivers would refuse the launch, which passes more than 4 KB of arguments, only after other launches were made.
inline void check_driver(const char* name) {
  static const int version = [] {
    int of_driver = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&of_driver));
    return of_driver;
  }();
  TORCH_CHECK(version >= 12010, name,
              " needs an NVIDIA driver for CUDA 12.1 or later (R530 or later), and this one is ", "for CUDA ",
              version / 1000, ".", version % 1000 / 10, ": update it, or pass fused=False");
}

// On CUDA, on torch's current stream: a launch for the whole parameters of each dtype, and one for its shards.
template <class Options>
void run_cuda(const PackedStep& step, const Options& options) {
  const c10::cuda::CUDAGuard guard(step.first_param().device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = static_cast<int64_t>(step.tensors().size());
  at::Tensor own_tallies;  // freed in stream order, after the kernels
  if (step.tensors()[0].tensor.tally == nullptr) {
    own_tallies = step.first_param().new_zeros({count, kTallyWords}, at::kLong);
  }
  for (const DType dtype : kDTypes) {
    for (const bool shards : {false, true}) {
      std::vector<StepShard> tensors;
      for (int64_t i = 0; i < count; ++i) {
        StepShard tensor = step.tensors()[i].tensor;
        if (step.tensors()[i].dtype != dtype || is_shard(tensor) != shards) continue;
        if (own_tallies.defined()) {
          tensor.tally = reinterpret_cast<StepTally*>(own_tallies.data_ptr<int64_t>()) + i;
        }
        tensors.push_back(tensor);
      }
      C10_CUDA_CHECK(
          launch_step_cuda(dtype, options, tensors.data(), static_cast<int64_t>(tensors.size()), stream, nullptr));
    }
  }
}
#endif

template <class Step>
class StepOperator {
 public:
  using Args = typename Step::Args;
  using Options = typename Step::Options;

  // Defines the operator for every kind of tensor.
  static void define(torch::Library& m) {
    m.def(schema<Args>(Step::kName, "()").c_str(), {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides});
    // It has no gradient, and torch's own kernel for such operators would box the lists.
    implement(m, c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough());
    implement(m, c10::DispatchKey::CPU, unboxed<Args, run<run_cpu<Options>>>);
#if CSGD_WITH_CUDA
    implement(m, c10::DispatchKey::CUDA, unboxed<Args, run_on_cuda>);
#endif
    implement(m, c10::DispatchKey::CompositeExplicitAutograd, unboxed<Args, run_nowhere>);
  }

 private:
  template <class Function>
  static void implement(torch::Library& m, c10::DispatchKey key, Function&& function) {
    m.impl(Step::kName, torch::dispatch(key, std::forward<Function>(function)));
  }

  static void check(const Args& args, const StepArgs& common) {
    Step::check(args);
    check_step(common);
  }

  // Checks everything, then packs, runs, finishes.
  template <void (*run_packed)(const PackedStep&, const Options&)>
  static void run(const Args& args) {
    const StepArgs common = Step::common(args);
    check(args, common);
    if (common.check_only || common.params.empty()) return;
    const at::NoGradGuard no_grad;  // for the copies of tensors that are not dense
    PackedStep step(common);
    Options options = Step::options(args);
    set_options(common, &options);
    run_packed(step, options);
    step.finish();
  }

#if CSGD_WITH_CUDA
  static void run_on_cuda(const Args& args) {
    check_driver(Step::kName);
    run<run_cuda<Options>>(args);
  }
#endif

  // Sparse, complex and other tensors come here as well; the checks then say which one is wrong.
  static void run_nowhere(const Args& args) {
    check(args, Step::common(args));
    TORCH_CHECK(args.params.empty(), Step::kName, " has no kernel for tensors on ", args.params[0].device(),
                " in this build; see csgd_cuda.show_config()");
  }
};

}  // namespace csgd
