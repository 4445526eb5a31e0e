// SPDX-License-Identifier: Apache-2.0
// The kernels of the gradient exchange, from their own source.
#include "compiled.h"
#include "csrc/cuda/exchange_cuda.cu"
