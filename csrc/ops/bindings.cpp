// SPDX-License-Identifier: Apache-2.0
// The Python module csgd_cuda._C: how it was built, and operators of torch.ops.csgd_cuda as functions.
#include "bindings.h"

#include <torch/version.h>

#include "../cpu/step_cpu.h"

#if CSGD_WITH_CUDA
#include "../cuda/step_cuda.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if CSGD_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = csgd::cuda_architectures();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
#if defined(__clang__)
  info["compiler"] = std::string(__VERSION__);
#elif defined(__GNUC__)
  info["compiler"] = std::string("GCC ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpu_isa"] = csgd::cpu_isa();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build information of csgd_cuda, and its operators as functions.";
  m.def("build_info", &build_info, "What this extension was built with, and the instruction set it uses here.");
  m.def("set_cpu_isa", &csgd::set_cpu_isa, py::arg("name"),
        "Use another instruction set on the CPU; False where this machine or build does not have it.");
  csgd::add_csgd(m);
  csgd::add_adamw(m);
  csgd::add_calibrate_grad(m);
  csgd::add_plan(m);
}
