// SPDX-License-Identifier: Apache-2.0
// Parts of the rule, computed on the current GPU. The results are copied to the host.
#pragma once

#include <cuda_runtime_api.h>

#include "../../../csrc/core/philox.h"
#include "shortcuts.h"

namespace csgd {

cudaError_t philox4x32_10_on_gpu(Philox4x32 counter, uint64_t key, Philox4x32* result);

// Replaces each of `count` values on the host by take_shortcut() of it.
cudaError_t take_shortcuts_on_gpu(Shortcut shortcut, float* values, int64_t count);

}  // namespace csgd
