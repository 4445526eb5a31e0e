// SPDX-License-Identifier: Apache-2.0
// The headers that all programs include and no fault changes, compiled once for each set of flags: without that the
// compiler would take longer for them than for a kernel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
