// SPDX-License-Identifier: Apache-2.0
// The kernels of the calibration of a gradient, from their own source.
#include "compiled.h"
#include "csrc/cuda/calibrate_grad_cuda.h"

#ifdef CSGD_STORAGE
namespace csgd {
namespace {
template <class S>
cudaError_t launch(CalibrateGradCall&, cudaStream_t);
template <>
cudaError_t launch<LeftOut<0>>(CalibrateGradCall&, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch<LeftOut<1>>(CalibrateGradCall&, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch<LeftOut<2>>(CalibrateGradCall&, cudaStream_t) {
  return cudaErrorInvalidValue;
}
}  // namespace
}  // namespace csgd
#endif

#include "csrc/cuda/calibrate_grad_cuda.cu"
