// SPDX-License-Identifier: Apache-2.0
#include "python_call.h"

#include "csgd.h"
#include "python_function.h"

namespace csgd {

void add_operators(pybind11::module_& m) {
  add_function<CsgdArgs>(m, "csgd_");
  add_function<CsgdArgs>(m, "check_csgd");
}

}  // namespace csgd
