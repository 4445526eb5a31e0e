// SPDX-License-Identifier: Apache-2.0
// The kernels of the step, from their own source, and what the program needs of them beside their launchers.
#include "compiled.h"
#include "csgd_cases.h"
#include "csrc/cuda/csgd_cuda.h"

#ifdef CSGD_STORAGE
// One kernel instead of nine for each dtype: for records of one kind, CSGD_RECORD, in launches of 4 KB; it reads the
// options while running, as kernels for old drivers do, and has all that those for one combination of options have.
// Declared before the source that has the general template, these specializations take the place of its instances.
namespace csgd {
namespace {
template <class Tensor>
cudaError_t launch_tensors(DType, const CsgdOptions&, const Tensor*, int64_t, cudaStream_t, int64_t*);
template <>
cudaError_t launch_tensors(DType, const CsgdOptions&, const CsgdTensor*, int64_t, cudaStream_t, int64_t*);
template <>
cudaError_t launch_tensors(DType, const CsgdOptions&, const CsgdShard*, int64_t, cudaStream_t, int64_t*);
}  // namespace
}  // namespace csgd
#endif

#include "csrc/cuda/csgd_cuda.cu"

#ifdef CSGD_STORAGE
namespace csgd {
namespace {

template <class Tensor>
cudaError_t launch_compiled(const CsgdOptions& options, const Tensor* tensors, int64_t count, int64_t* launches) {
  if constexpr (std::is_same_v<Tensor, CSGD_RECORD>) {
    using T = Storage<CSGD_STORAGE>::Opmath;
    return launch_all<CSGD_STORAGE, Launch<kSmallLaunch, T, Tensor>>(options, tensors, count, nullptr, launches);
  } else {
    return cudaErrorInvalidValue;
  }
}

template <>
cudaError_t launch_tensors(DType, const CsgdOptions& options, const CsgdTensor* tensors, int64_t count, cudaStream_t,
                           int64_t* launches) {
  return launch_compiled(options, tensors, count, launches);
}

template <>
cudaError_t launch_tensors(DType, const CsgdOptions& options, const CsgdShard* tensors, int64_t count, cudaStream_t,
                           int64_t* launches) {
  return launch_compiled(options, tensors, count, launches);
}

}  // namespace
}  // namespace csgd
#endif

namespace csgd {

bool is_compiled_for(bool shards) {
#ifdef CSGD_STORAGE
  return shards == std::is_same_v<CSGD_RECORD, CsgdShard>;
#else
  return static_cast<void>(shards), true;
#endif
}

int64_t tensors_of_small_launch() { return Launch<kSmallLaunch, float, CsgdTensor>::kTensors; }
int64_t tensors_of_large_launch() { return Launch<kLargeLaunch, float, CsgdTensor>::kTensors; }

template <class S>
bool round_eight(const float (&values)[kPerThread], uint32_t draw, S (&rounded)[kPerThread]) {
  if (!are_ordinary<S>(values)) return false;
  Vector<S> vector;
  const uint32_t word = draw | draw << 16;
  round_ordinary({{word, word, word, word}}, values, vector);
  std::memcpy(rounded, vector.value, sizeof rounded);
  return true;
}
template bool round_eight(const float (&)[kPerThread], uint32_t, BFloat16 (&)[kPerThread]);
template bool round_eight(const float (&)[kPerThread], uint32_t, Float16 (&)[kPerThread]);

}  // namespace csgd
