// SPDX-License-Identifier: Apache-2.0
// The fused step on a GPU: one pass over memory from the gradient to the calibrated update, and a whole model in one
// launch.
#include <cuda_runtime.h>

#include "../core/adamw.h"
#include "../core/sgd.h"
#include "blocks.cuh"
#include "step.cuh"
#include "step_cuda.h"

namespace csgd {
namespace {

// The record of a whole parameter has no more buffers than the direction needs.
template <int kBuffers>
void set_record(BufferedTensor<kBuffers>& record, const StepShard& tensor) {
  static_cast<StepTensor&>(record) = tensor;
  std::copy_n(tensor.buffers, kBuffers, record.buffers);
}
void set_record(StepShard& record, const StepShard& tensor) { record = tensor; }

// The records of a launch are passed as a kernel parameter. So nothing is copied to the device first, and nothing must
// be kept until the kernel has run. Rule: Sgd or AdamW; T: opmath; Tensor_: BufferedTensor or StepShard, of which fewer
// fit.
template <class Rule, class T, class Tensor_>
struct Launch {
  using Tensor = Tensor_;
  struct Header {
    typename Rule::Options options;
    typename Rule::template OptionScalars<T> numbers;  // instructions read them directly from the kernel parameter
    PhiloxRoundKeys keys;
    int64_t chunk;  // elements that a block takes; a multiple of kPass
    int64_t count;
  };
  static constexpr int kBytes = 32764;  // that a kernel parameter may have, from CUDA 12.1 on
  static constexpr int kTensors = (kBytes - static_cast<int>(sizeof(Header))) / static_cast<int>(sizeof(Tensor));
  Header header;
  Tensor tensors[kTensors];
};
template <class Rule>
using Whole = BufferedTensor<Rule::kBuffers>;
static_assert(Launch<Sgd, double, Whole<Sgd>>::kTensors >= 500, "a model of 500 tensors goes in one launch");
static_assert(Launch<AdamW, double, Whole<AdamW>>::kTensors >= 440, "as many as the record of a second buffer leaves");

// Thread 0 of each block adds the block's part to the tally of its tensor. The last block to arrive here completes the
// step. Every other block has read the step and the bound by then, and is done with the tally, so all of these can be
// overwritten.
template <class T>
__device__ __forceinline__ void finish_tensor(const StepOptions& options, const StepTensor& tensor,
                                              const Partial<T>& partial, uint32_t blocks) {
  StepTally* tally = tensor.tally;
  atomicMax(&tally->largest_bits, static_cast<unsigned long long>(partial.largest_bits));
  atomicAdd(&tally->moving, static_cast<unsigned long long>(partial.moved));
  __threadfence();  // other blocks see the two atomics above before the one below
  if (atomicAdd(&tally->blocks_done, 1ULL) != blocks - 1) return;
  __threadfence();
  // By exchanging instead of loading, the values are read as the atomics of the other blocks wrote them, and are zero
  // for the next step.
  using Bits = typename FloatBits<T>::Type;
  const Bits largest_bits = static_cast<Bits>(atomicExch(&tally->largest_bits, 0ULL));
  const int64_t moved = static_cast<int64_t>(atomicExch(&tally->moving, 0ULL));
  atomicExch(&tally->blocks_done, 0ULL);
  advance(options, tensor, bit_cast<T>(largest_bits), moved);
}

// The scalars of the block's tensor. Where they take long one thread computes them for all.
template <class Rule, class T>
__device__ __forceinline__ typename Rule::template TensorScalars<T> tensor_scalars(
    const typename Rule::Options& options, const StepTensor& tensor) {
  if constexpr (Rule::kTensorScalarsTakeLong) {
    using Scalars = typename Rule::template TensorScalars<T>;
    CSGD_SHARED_ARRAY(Scalars, of_block, 1);
    if (threadIdx.x == 0) of_block[0] = Rule::template tensor_scalars<T>(options, *tensor.step);
    __syncthreads();
    return of_block[0];
  } else {
    return Rule::template tensor_scalars<T>(options, *tensor.step);
  }
}

// The number of blocks that a multiprocessor is to hold, by which the compiler limits their registers: as many as it
// can without spilling registers. The draws of shards take more of these, and so do two buffers in float64.
template <class S, class Rule, class Tensor>
constexpr int kBlocksAtOnce = std::is_same_v<Tensor, StepShard>                   ? 2
                              : sizeof(S) == sizeof(float)                        ? 4
                              : sizeof(S) == sizeof(double) && Rule::kBuffers > 1 ? 2
                                                                                  : 3;

template <class S, class Rule, class Direction, class Tensor>
__global__ void __launch_bounds__(kThreads, (kBlocksAtOnce<S, Rule, Tensor>))
    step_kernel(const __grid_constant__ Launch<Rule, typename Storage<S>::Opmath, Tensor> launch) {
  using T = typename Storage<S>::Opmath;
  const auto& header = launch.header;
  if (overflowed(header.options)) return;
  const int number = find_tensor(launch);
  const Tensor& tensor = launch.tensors[number];
  const StepScalars<T> scalars = step_scalars<T>(header.options, header.numbers, tensor);
  const Direction direction(header.options, header.numbers, tensor_scalars<Rule, T>(header.options, tensor));
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensor.first_block) * header.chunk;
  Partial<T> partial{0, 0};
  step_part(header, direction, tensor, scalars, BlockPart<S, Rule::kBuffers>(tensor, begin, header.chunk), partial);
  partial = reduce_block(partial);
  if (threadIdx.x == 0) finish_tensor(header.options, tensor, partial, blocks_of_tensor(launch, number));
}

template <class S, class Rule, class Direction, class L>
cudaError_t launch_kernel(L& launch, int64_t blocks, cudaStream_t stream) {
  void* arguments[] = {&launch};
  const auto kernel = step_kernel<S, Rule, Direction, typename L::Tensor>;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

// Whole tensors, which nearly all steps have, are stepped by a kernel for these options. The kernel of shards decides
// while running.
template <class S, class Rule, class L>
cudaError_t launch_direction(L& launch, int64_t blocks, cudaStream_t stream) {
  using T = typename Storage<S>::Opmath;
  if constexpr (std::is_same_v<typename L::Tensor, StepShard>) {
    return launch_kernel<S, Rule, typename Rule::template AnyDirection<T>>(launch, blocks, stream);
  } else {
    return with_direction<Rule, T>(launch.header.options, [&](auto tag) {
      return launch_kernel<S, Rule, typename decltype(tag)::Type>(launch, blocks, stream);
    });
  }
}

template <class S, class Rule, class Tensor>
cudaError_t launch_all(const typename Rule::Options& options, const StepShard* tensors, int64_t count,
                       cudaStream_t stream, int64_t* launches) {
  using T = typename Storage<S>::Opmath;
  Launch<Rule, T, Tensor> launch;
  launch.header.options = options;
  launch.header.numbers = Rule::template option_scalars<T>(options);
  launch.header.keys = philox_round_keys(options.seed);
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += tensors[k].numel;
  cudaError_t error = choose_chunk(elements, &launch.header.chunk);
  for (int64_t first = 0; error == cudaSuccess && first < count;) {
    int64_t blocks = 0, taken = 0;
    while (first + taken < count && taken < launch.kTensors) {
      const StepShard& tensor = tensors[first + taken];
      const int64_t more = blocks_of(tensor.numel, launch.header.chunk);
      if (blocks + more > kMostBlocks) break;
      set_record(launch.tensors[taken], tensor);
      launch.tensors[taken].first_block = static_cast<uint32_t>(blocks);
      blocks += more;
      ++taken;
    }
    if (taken == 0) return cudaErrorInvalidValue;  // a tensor of more than 2^47 elements
    launch.header.count = taken;
    error = launch_direction<S, Rule>(launch, blocks, stream);
    if (launches != nullptr) *launches += 1;
    first += taken;
  }
  return error;
}

template <class Rule>
cudaError_t launch_tensors(DType dtype, const typename Rule::Options& options, const StepShard* tensors, int64_t count,
                           cudaStream_t stream, int64_t* launches) {
  if (count == 0) return cudaSuccess;
  return with_storage(dtype, [&](auto tag) {
    using S = decltype(tag);
    return is_shard(tensors[0]) ? launch_all<S, Rule, StepShard>(options, tensors, count, stream, launches)
                                : launch_all<S, Rule, Whole<Rule>>(options, tensors, count, stream, launches);
  });
}

}  // namespace

cudaError_t launch_step_cuda(DType dtype, const SgdOptions& options, const StepShard* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches) {
  return launch_tensors<Sgd>(dtype, options, tensors, count, stream, launches);
}

cudaError_t launch_step_cuda(DType dtype, const AdamWOptions& options, const StepShard* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches) {
  return launch_tensors<AdamW>(dtype, options, tensors, count, stream, launches);
}

#define CSGD_TEXT_OF(...) #__VA_ARGS__
#define CSGD_TEXT(...) CSGD_TEXT_OF(__VA_ARGS__)
const char* cuda_architectures() { return CSGD_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace csgd
