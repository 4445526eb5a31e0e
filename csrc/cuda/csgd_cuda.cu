// SPDX-License-Identifier: Apache-2.0
// The fused step on a GPU: one pass over memory from the gradient to the calibrated update, and a whole model in one
// launch.
#include <cuda_runtime.h>

#include "block8.cuh"
#include "blocks.cuh"
#include "csgd_cuda.h"
#include "warp_pass.cuh"

namespace csgd {
namespace {

// The records of a launch are passed as a kernel parameter. So nothing is copied to the device first, and nothing must
// be kept until the kernel has run. T: opmath. Tensor_: CsgdTensor or CsgdShard, of which fewer fit.
template <int kBytes, class T, class Tensor_>
struct Launch {
  using Tensor = Tensor_;
  struct Header {
    CsgdOptions options;
    OptionScalars<T> numbers;  // instructions read them directly from the kernel parameter
    PhiloxRoundKeys keys;
    int64_t chunk;  // elements that a block takes; a multiple of kPass
    int64_t count;
  };
  static constexpr int kTensors = (kBytes - static_cast<int>(sizeof(Header))) / static_cast<int>(sizeof(Tensor));
  Header header;
  Tensor tensors[kTensors];
};
constexpr int kSmallLaunch = 4096;   // bytes of a kernel parameter, with every driver
constexpr int kLargeLaunch = 32764;  // likewise, from CUDA 12.1 on
static_assert(Launch<kLargeLaunch, double, CsgdTensor>::kTensors >= 500, "a model of 500 tensors goes in one launch");

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

// The number of blocks that a multiprocessor is to hold, by which the compiler limits their registers. Found by trying:
// with one more the compiler spills registers. In float32 a fourth block would fit, but would have to prove itself on a
// GPU.
template <class S, class Parts>
constexpr int kBlocksAtOnce = 2;
template <bool kWeightDecay, bool kMomentum, bool kNesterov>
constexpr int kBlocksAtOnce<float, StaticParts<kWeightDecay, kMomentum, kNesterov>> = 3;
template <bool kMomentum>
constexpr int kBlocksAtOnce<BFloat16, StaticParts<false, kMomentum, false>> = 3;
template <bool kMomentum>
constexpr int kBlocksAtOnce<Float16, StaticParts<false, kMomentum, false>> = 3;
template <>
constexpr int kBlocksAtOnce<BFloat16, StaticParts<true, false, false>> = 3;
template <>
constexpr int kBlocksAtOnce<Float16, StaticParts<true, false, false>> = 3;

template <class S, class Parts, class L>
__global__ void __launch_bounds__(kThreads, (kBlocksAtOnce<S, Parts>)) csgd_kernel(const __grid_constant__ L launch) {
  using T = typename Storage<S>::Opmath;
  const CsgdOptions& options = launch.header.options;
  if (overflowed(options)) return;
  const int number = find_tensor(launch);
  const auto& tensor = launch.tensors[number];
  const Parts parts = parts_of<Parts>(options);
  const bool aligned = aligned16(tensor.param) && aligned16(tensor.grad) && aligned16(tensor.momentum_buffer);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - tensor.first_block) * launch.header.chunk;
  const int64_t end = begin + launch.header.chunk < tensor.numel ? begin + launch.header.chunk : tensor.numel;
  Partial<T> partial{0, 0};
  // The elements that do not fill a pass of a warp are left to the loop below.
  const int64_t passes_end = aligned && shares_calls(tensor) ? end - (end - begin) % kWarpPass : begin;
  WarpPasses<S, Parts> passes(parts, tensor, begin, passes_end);
  const StepScalars<T> scalars = step_scalars<T>(options, launch.header.numbers, tensor);
  passes.step(launch.header, parts, scalars, first_call(tensor), partial);
  for (int64_t i = passes_end + int64_t{threadIdx.x} * kPerThread; i < end; i += kPass) {
    const int count = end - i < kPerThread ? static_cast<int>(end - i) : kPerThread;
    step8<S>(launch.header, parts, tensor, scalars, i, count, aligned && count == kPerThread, partial);
  }
  partial = reduce_block(partial);
  if (threadIdx.x == 0) finish_tensor(options, tensor, partial, blocks_of_tensor(launch, number));
}

template <class S, class Parts, class L>
cudaError_t launch_kernel(L& launch, int64_t blocks, cudaStream_t stream) {
  void* arguments[] = {&launch};
  const auto kernel = csgd_kernel<S, Parts, L>;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

// Launches the kernel of this combination of the rule's parts where there is one: for whole tensors in large launches,
// which nearly all steps are. Otherwise launches the kernel that decides while running.
template <class S, class L>
cudaError_t launch_parts(L& launch, int64_t blocks, cudaStream_t stream) {
  if constexpr (sizeof(L) > kSmallLaunch && std::is_same_v<typename L::Tensor, CsgdTensor>) {
    return with_static_parts(launch.header.options,
                             [&](auto parts) { return launch_kernel<S, decltype(parts)>(launch, blocks, stream); });
  } else {
    return launch_kernel<S, RuntimeParts>(launch, blocks, stream);
  }
}

template <class S, class L>
cudaError_t launch_all(const CsgdOptions& options, const typename L::Tensor* tensors, int64_t count,
                       cudaStream_t stream, int64_t* launches) {
  L launch;
  launch.header.options = options;
  launch.header.numbers = option_scalars<typename Storage<S>::Opmath>(options);
  launch.header.keys = philox_round_keys(options.seed);
  int64_t elements = 0;
  for (int64_t k = 0; k < count; ++k) elements += tensors[k].numel;
  cudaError_t error = choose_chunk(elements, &launch.header.chunk);
  for (int64_t first = 0; error == cudaSuccess && first < count;) {
    int64_t blocks = 0, taken = 0;
    while (first + taken < count && taken < L::kTensors) {
      const auto& tensor = tensors[first + taken];
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

template <class S, class Tensor>
cudaError_t launch_storage(const CsgdOptions& options, const Tensor* tensors, int64_t count, cudaStream_t stream,
                           int64_t* launches) {
  using T = typename Storage<S>::Opmath;
  static const bool large = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010 && CUDART_VERSION >= 12010;
  }();
  return large ? launch_all<S, Launch<kLargeLaunch, T, Tensor>>(options, tensors, count, stream, launches)
               : launch_all<S, Launch<kSmallLaunch, T, Tensor>>(options, tensors, count, stream, launches);
}

template <class Tensor>
cudaError_t launch_tensors(DType dtype, const CsgdOptions& options, const Tensor* tensors, int64_t count,
                           cudaStream_t stream, int64_t* launches) {
  if (count == 0) return cudaSuccess;
  return with_storage(
      dtype, [&](auto tag) { return launch_storage<decltype(tag)>(options, tensors, count, stream, launches); });
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
