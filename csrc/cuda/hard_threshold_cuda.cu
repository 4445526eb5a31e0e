// SPDX-License-Identifier: Apache-2.0
// Hard thresholding on a GPU: one launch for each digit of the threshold, and one that drops the elements below it.
#include <cuda_runtime.h>

#include "hard_threshold_cuda.h"
#include "hard_threshold_kernels.cuh"

namespace csgd {
namespace {

using Kernel = void (*)(ThresholdLaunch);

// Runs a kernel over the tensors of all dtypes, whose items(tensor) are divided between the blocks. kernel_for(S{}) is
// the kernel for elements that are stored as S.
template <class KernelFor, class Items>
cudaError_t launch_all(KernelFor kernel_for, const std::vector<ThresholdTensor>& tensors, Items items,
                       ThresholdLaunch::Header header, cudaStream_t stream) {
  ThresholdLaunch launch;
  launch.header = header;
  for (const DType dtype : kDTypes) {
    const Kernel kernel = with_storage(dtype, kernel_for);
    for (size_t next = 0; next < tensors.size();) {
      int64_t blocks = 0;
      launch.header.count = 0;
      for (; next < tensors.size() && launch.header.count < ThresholdLaunch::kTensors; ++next) {
        if (tensors[next].dtype != dtype || items(tensors[next]) == 0) continue;
        const int64_t more = blocks_of(items(tensors[next]), header.chunk);
        if (more > kMostBlocks) return cudaErrorInvalidValue;
        if (blocks + more > kMostBlocks) break;
        launch.tensors[launch.header.count] = tensors[next];
        launch.tensors[launch.header.count++].first_block = static_cast<uint32_t>(blocks);
        blocks += more;
      }
      if (launch.header.count == 0) continue;
      void* arguments[] = {&launch};
      const cudaError_t error =
          cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t chunk_for(const std::vector<ThresholdTensor>& tensors, int64_t* chunk) {
  int64_t elements = 0;
  for (const ThresholdTensor& tensor : tensors) elements += tensor.numel;
  return choose_chunk(elements, chunk);
}

// Sets the number of blocks that work on each selection in one pass.
void count_blocks(std::vector<ThresholdTensor>& tensors, int64_t chunk) {
  for (size_t first = 0; first < tensors.size();) {  // the tensors of a selection follow each other
    size_t end = first;
    int64_t blocks = 0;
    for (; end < tensors.size() && tensors[end].selection == tensors[first].selection; ++end) {
      if (tensors[end].numel != 0) blocks += blocks_of(tensors[end].numel, chunk);
    }
    for (; first < end; ++first) tensors[first].selection_blocks = blocks;
  }
}

}  // namespace

cudaError_t launch_hard_threshold_select_cuda(std::vector<ThresholdTensor> tensors, SelectionScratch* scratch,
                                              const float* found_inf, cudaStream_t stream) {
  ThresholdLaunch::Header header{found_inf, scratch, {}, 0, 0};
  cudaError_t error = chunk_for(tensors, &header.chunk);
  count_blocks(tensors, header.chunk);
  // Keys of 32 and of 64 bits have different digits, so float64 tensors have passes of their own.
  const auto doubles = std::stable_partition(tensors.begin(), tensors.end(),
                                             [](const auto& tensor) { return tensor.dtype != DType::kFloat64; });
  for (const auto& alike :
       {std::vector<ThresholdTensor>(tensors.begin(), doubles), std::vector<ThresholdTensor>(doubles, tensors.end())}) {
    for (const DigitPass& pass : digit_passes(alike)) {
      header.pass = pass;
      if (error == cudaSuccess)
        error = launch_all([](auto tag) -> Kernel { return histogram_kernel<decltype(tag)>; }, alike, numel_of, header,
                           stream);
    }
    if (error == cudaSuccess)
      error =
          launch_all([](auto tag) -> Kernel { return select_kernel<decltype(tag)>; }, alike, numel_of, header, stream);
  }
  return error;
}

cudaError_t launch_hard_threshold_norms_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream) {
  return launch_all([](auto tag) -> Kernel { return norms_kernel<decltype(tag)>; }, tensors, channels_of,
                    {found_inf, nullptr, {}, kWarps, 0}, stream);
}

cudaError_t launch_hard_threshold_masks_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream) {
  return launch_all([](auto tag) -> Kernel { return masks_kernel<decltype(tag)>; }, tensors, numel_of,
                    {found_inf, nullptr, {}, kPass, 0}, stream);
}

cudaError_t launch_hard_threshold_two_of_four_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                                   cudaStream_t stream) {
  return launch_all([](auto tag) -> Kernel { return two_of_four_kernel<decltype(tag)>; }, tensors, fours_of,
                    {found_inf, nullptr, {}, kThreads, 0}, stream);
}

}  // namespace csgd
