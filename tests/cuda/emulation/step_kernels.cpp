// SPDX-License-Identifier: Apache-2.0
// The kernels of the step, from their own source, and what the program needs of them beside their launchers.
#include "compiled.h"
#include "csrc/cuda/step_cuda.cu"
#include "step_cases.h"

namespace csgd {

int64_t tensors_of_launch(bool adamw) {
  return adamw ? Launch<AdamW, float, Whole<AdamW>>::kTensors : Launch<Sgd, float, Whole<Sgd>>::kTensors;
}

template <class S>
bool round_eight(const float (&values)[8], uint32_t draw, S (&rounded)[8]) {
  if (!are_ordinary<S>(values)) return false;
  Vector<S> vector;
  const uint32_t word = draw | draw << 16;
  round_ordinary({{word, word, word, word}, 0}, values, vector);
  std::memcpy(rounded, vector.value, sizeof rounded);
  return true;
}
template bool round_eight(const float (&)[8], uint32_t, BFloat16 (&)[8]);
template bool round_eight(const float (&)[8], uint32_t, Float16 (&)[8]);

}  // namespace csgd
