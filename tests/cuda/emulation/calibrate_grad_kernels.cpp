// SPDX-License-Identifier: Apache-2.0
// The kernels of the calibration of a gradient, from their own source.
#include "compiled.h"
#include "csrc/cuda/calibrate_grad_cuda.cu"
