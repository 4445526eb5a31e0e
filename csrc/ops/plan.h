// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Adds the functions of csgd_cuda/optim/plan.py that are written in C++, too.
void add_plan(pybind11::module_& m);

}  // namespace csgd
