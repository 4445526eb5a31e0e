// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Adds the hooks that run one element of the compiled rule on the host (and one Philox call on the GPU).
void add_rule_hooks(pybind11::module_& m);

}  // namespace csgd
