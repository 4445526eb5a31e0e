// SPDX-License-Identifier: Apache-2.0
// The kernels of hard thresholding, from their own source.
#include "compiled.h"
#include "csrc/cuda/hard_threshold_cuda.cu"
