// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Adds csgd_ and check_csgd, the operators of torch.ops.csgd_cuda, as functions.
void add_csgd(pybind11::module_& m);

}  // namespace csgd
