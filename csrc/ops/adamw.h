// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Adds calibrated_adamw_, the operator of torch.ops.csgd_cuda, as a function.
void add_adamw(pybind11::module_& m);

}  // namespace csgd
