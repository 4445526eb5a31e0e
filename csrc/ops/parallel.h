// SPDX-License-Identifier: Apache-2.0
// at::parallel_for on the threads of torch, whichever compiler made the extension.
#pragma once

#include <ATen/Parallel.h>

namespace csgd {

// at::parallel_for is a template over the OpenMP runtime of the compiler. That of Clang is not torch's own, and
// torch.set_num_threads() does not set its number of threads.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
#if defined(_OPENMP) && defined(__clang__)
  omp_set_num_threads(at::get_num_threads());
#endif
  at::parallel_for(begin, end, grain, f);
}

}  // namespace csgd
