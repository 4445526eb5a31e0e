// SPDX-License-Identifier: Apache-2.0
// The launchers of the kernels of hard thresholding. They take plain structs and CUDA runtime types, and do not need
// torch. None of them waits for the GPU. Where found_inf is given and *found_inf is not 0, they change nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

// Keeps the largest elements of each selection. The tensors of one selection are all of float64 or none. A mask has an
// entry for each element, which becomes false where the element is dropped. `scratch` has one entry for each selection,
// zero at the start.
cudaError_t launch_hard_threshold_select_cuda(std::vector<ThresholdTensor> tensors, SelectionScratch* scratch,
                                              const float* found_inf, cudaStream_t stream);

// Sets norms[c] to the sum of the squares of channel c, in float64 and always added in the same order.
cudaError_t launch_hard_threshold_norms_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream);

// Drops the channels, or elements, that are false in the masks.
cudaError_t launch_hard_threshold_masks_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream);

// Keeps the two largest of each four consecutive channels.
cudaError_t launch_hard_threshold_two_of_four_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                                   cudaStream_t stream);

}  // namespace csgd
