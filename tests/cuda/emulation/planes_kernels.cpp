// SPDX-License-Identifier: Apache-2.0
// The kernels of planes of bits, from their own source.
#include "compiled.h"
#include "csrc/cuda/planes_cuda.cu"
