// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Adds csgd_ and check_csgd, torch.ops.csgd_cuda's operators, as functions.
void add_operators(pybind11::module_& m);

}  // namespace csgd
