// SPDX-License-Identifier: Apache-2.0
// The kernels of hard thresholding, from their own source.
#include "compiled.h"
#include "csrc/cuda/hard_threshold_cuda.h"

#ifdef CSGD_STORAGE
#define CSGD_FOR_EACH_KERNEL(DO) \
  DO(histogram_kernel) DO(select_kernel) DO(norms_kernel) DO(masks_kernel) DO(two_of_four_kernel)
#define CSGD_LEAVE_OUT(kernel)              \
  template <class S>                        \
  void kernel(ThresholdLaunch);             \
  template <>                               \
  void kernel<LeftOut<0>>(ThresholdLaunch); \
  template <>                               \
  void kernel<LeftOut<1>>(ThresholdLaunch); \
  template <>                               \
  void kernel<LeftOut<2>>(ThresholdLaunch);
namespace csgd {
namespace {
struct ThresholdLaunch;
CSGD_FOR_EACH_KERNEL(CSGD_LEAVE_OUT)
}  // namespace
}  // namespace csgd
#undef CSGD_LEAVE_OUT
#endif

#include "csrc/cuda/hard_threshold_cuda.cu"

#ifdef CSGD_STORAGE
#define CSGD_LEAVE_OUT(kernel)                \
  template <>                                 \
  void kernel<LeftOut<0>>(ThresholdLaunch) {} \
  template <>                                 \
  void kernel<LeftOut<1>>(ThresholdLaunch) {} \
  template <>                                 \
  void kernel<LeftOut<2>>(ThresholdLaunch) {}
namespace csgd {
namespace {
CSGD_FOR_EACH_KERNEL(CSGD_LEAVE_OUT)
}  // namespace
}  // namespace csgd
#endif
