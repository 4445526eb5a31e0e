// SPDX-License-Identifier: Apache-2.0
// The launchers of the kernels of hard thresholding: plain structs and CUDA runtime types, no torch. None of them waits
// for the GPU; where *found_inf is not 0 (null: it is) they change nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../core/hard_threshold.h"

namespace csgd {

// Keeps the largest elements of each selection; of one selection all tensors are of float64 or none. Masks, one entry
// for each element, become false where elements are dropped. `scratch`: one for each selection, zero at the start.
cudaError_t launch_hard_threshold_select_cuda(std::vector<ThresholdTensor> tensors, SelectionScratch* scratch,
                                              const float* found_inf, cudaStream_t stream);

// norms[c] = the sum of the squares of channel c, in float64 and in one order.
cudaError_t launch_hard_threshold_norms_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream);

// Drops what the masks, one entry for each channel, say.
cudaError_t launch_hard_threshold_masks_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                             cudaStream_t stream);

// Keeps the two largest of each four consecutive channels.
cudaError_t launch_hard_threshold_two_of_four_cuda(std::vector<ThresholdTensor> tensors, const float* found_inf,
                                                   cudaStream_t stream);

}  // namespace csgd
