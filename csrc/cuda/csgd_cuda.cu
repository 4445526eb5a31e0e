// SPDX-License-Identifier: Apache-2.0
// The fused step on a GPU: one pass over memory from the gradient to the calibrated update, and a whole model in one
// launch.
#include <cuda_runtime.h>

#include "blocks.cuh"
#include "csgd_cuda.h"
#include "step.cuh"

namespace csgd {
namespace {

// The records of a launch are passed as a kernel parameter. So nothing is copied to the device first, and nothing must
// be kept until the kernel has run. T: opmath. Tensor_: CsgdTensor or CsgdShard, of which fewer fit.
template <class T, class Tensor_>
struct Launch {
  using Tensor = Tensor_;
  struct Header {
    CsgdOptions options;
    OptionScalars<T> numbers;  // instructions read them directly from the kernel parameter
    PhiloxRoundKeys keys;
    int64_t chunk;  // elements that a block takes; a multiple of kPass
    int64_t count;
  };
  static constexpr int kBytes = 32764;  // that a kernel parameter may have, from CUDA 12.1 on
  static constexpr int kTensors = (kBytes - static_cast<int>(sizeof(Header))) / static_cast<int>(sizeof(Tensor));
  Header header;
  Tensor tensors[kTensors];
};
static_assert(Launch<double, CsgdTensor>::kTensors >= 500, "a model of 500 tensors goes in one launch");

// Thread 0 of each block adds the block's part to the tally of its tensor. The last block to arrive here completes the
// step. Every other block has read the step and the bound by then, and is done with the tally, so all of these can be
// overwritten.
template <class T>
__device__ __forceinline__ void finish_tensor(const CsgdOptions& options, const CsgdTensor& tensor,
                                              const Partial<T>& partial, uint32_t blocks) {
  CsgdTally* tally = tensor.tally;
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

// Parts: StaticParts in the kernels for one combination of the rule's parts, else RuntimeParts.
template <class Parts>
__device__ __forceinline__ Parts parts_of(const CsgdOptions& options) {
  if constexpr (std::is_same_v<Parts, RuntimeParts>) {
    return runtime_parts(options);
  } else {
    return {};
  }
}

// The number of blocks that a multiprocessor is to hold, by which the compiler limits their registers: as many as it
// can without spilling registers. The draws of shards take more of these.
template <class S, class Tensor>
constexpr int kBlocksAtOnce = std::is_same_v<Tensor, CsgdShard> ? 2
                              : sizeof(S) == sizeof(float)      ? 4
                                                                : 3;

template <class S, class Parts, class Tensor>
__global__ void __launch_bounds__(kThreads, (kBlocksAtOnce<S, Tensor>))
    csgd_kernel(const __grid_constant__ Launch<typename Storage<S>::Opmath, Tensor> launch) {
  using T = typename Storage<S>::Opmath;
  const auto& header = launch.header;
  if (overflowed(header.options)) return;
  const int number = find_tensor(launch);
  const Tensor& tensor = launch.tensors[number];
  const SgdDirection<Parts> direction(parts_of<Parts>(header.options));
  const StepScalars<T> scalars = step_scalars<T>(header.options, header.numbers, tensor);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensor.first_block) * header.chunk;
  Partial<T> partial{0, 0};
  step_part(header, direction, tensor, scalars, BlockPart<S>(tensor, begin, header.chunk), partial);
  partial = reduce_block(partial);
  if (threadIdx.x == 0) finish_tensor(header.options, tensor, partial, blocks_of_tensor(launch, number));
}

template <class S, class Parts, class L>
cudaError_t launch_kernel(L& launch, int64_t blocks, cudaStream_t stream) {
  void* arguments[] = {&launch};
  const auto kernel = csgd_kernel<S, Parts, typename L::Tensor>;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

// Whole tensors, which nearly all steps have, are stepped by a kernel for this combination of the rule's parts. The
// kernel of shards decides while running.
template <class S, class L>
cudaError_t launch_parts(L& launch, int64_t blocks, cudaStream_t stream) {
  if constexpr (std::is_same_v<typename L::Tensor, CsgdTensor>) {
    return with_static_parts(launch.header.options,
                             [&](auto parts) { return launch_kernel<S, decltype(parts)>(launch, blocks, stream); });
  } else {
    return launch_kernel<S, RuntimeParts>(launch, blocks, stream);
  }
}

template <class S, class Tensor>
cudaError_t launch_all(const CsgdOptions& options, const Tensor* tensors, int64_t count, cudaStream_t stream,
                       int64_t* launches) {
  using T = typename Storage<S>::Opmath;
  Launch<T, Tensor> launch;
  launch.header.options = options;
  launch.header.numbers = option_scalars<T>(options);
  launch.header.keys = philox_round_keys(options.seed);
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += tensors[k].numel;
  cudaError_t error = choose_chunk(elements, &launch.header.chunk);
  for (int64_t first = 0; error == cudaSuccess && first < count;) {
    int64_t blocks = 0, taken = 0;
    while (first + taken < count && taken < launch.kTensors) {
      const Tensor& tensor = tensors[first + taken];
      const int64_t more = blocks_of(tensor.numel, launch.header.chunk);
      if (blocks + more > kMostBlocks) break;
      launch.tensors[taken] = tensor;
      launch.tensors[taken].first_block = static_cast<uint32_t>(blocks);
      blocks += more;
      ++taken;
    }
    if (taken == 0) return cudaErrorInvalidValue;  // a tensor of more than 2^47 elements
    launch.header.count = taken;
    error = launch_parts<S>(launch, blocks, stream);
    if (launches != nullptr) *launches += 1;
    first += taken;
  }
  return error;
}

template <class Tensor>
cudaError_t launch_tensors(DType dtype, const CsgdOptions& options, const Tensor* tensors, int64_t count,
                           cudaStream_t stream, int64_t* launches) {
  if (count == 0) return cudaSuccess;
  return with_storage(dtype,
                      [&](auto tag) { return launch_all<decltype(tag)>(options, tensors, count, stream, launches); });
}

}  // namespace

cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdTensor* tensors, int64_t count,
                             cudaStream_t stream, int64_t* launches) {
  return launch_tensors(dtype, options, tensors, count, stream, launches);
}

cudaError_t launch_csgd_cuda(DType dtype, const CsgdOptions& options, const CsgdShard* shards, int64_t count,
                             cudaStream_t stream, int64_t* launches) {
  return launch_tensors(dtype, options, shards, count, stream, launches);
}

#define CSGD_TEXT_OF(...) #__VA_ARGS__
#define CSGD_TEXT(...) CSGD_TEXT_OF(__VA_ARGS__)
const char* cuda_architectures() { return CSGD_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace csgd
