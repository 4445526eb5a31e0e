// SPDX-License-Identifier: Apache-2.0
// What the files of this folder add to the Python module, each defined in the file of its name.
#pragma once

#include <pybind11/pybind11.h>

namespace csgd {

// Operators of torch.ops.csgd_cuda as functions: csgd_, calibrated_adamw_ (adamw.cpp), calibrate_grad.
void add_csgd(pybind11::module_& m);
void add_adamw(pybind11::module_& m);
void add_calibrate_grad(pybind11::module_& m);

// The functions of csgd_cuda/optim/plan.py that are written in C++, too.
void add_plan(pybind11::module_& m);

}  // namespace csgd
