// SPDX-License-Identifier: Apache-2.0
// The operators as plain Python functions. torch.ops.csgd_cuda.csgd_ boxes each tensor of its lists, 0.1 us apiece:
// with five lists more than half of the host's time for a model of small tensors. These unpack the lists themselves
// and then call the same operators through the same dispatcher.
#include "python_call.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "csgd.h"

namespace py = pybind11;

namespace csgd {
namespace {

using Operator = decltype(csgd_<run_nowhere>);

std::vector<at::Tensor> tensors_of(const char* name, const py::handle& from) {
  const auto items =
      py::reinterpret_steal<py::object>(PySequence_Fast(from.ptr(), "csgd_: a list of tensors is expected"));
  if (!items) throw py::error_already_set();
  PyObject** item = PySequence_Fast_ITEMS(items.ptr());
  std::vector<at::Tensor> tensors(static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_TYPE(THPVariable_Check(item[i]), name, "[", i, "] must be a tensor, got ", Py_TYPE(item[i])->tp_name);
    tensors[i] = THPVariable_Unpack(item[i]);
  }
  return tensors;
}

void add_operator(py::module_& m, const char* name) {
  const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow((std::string("csgd_cuda::") + name).c_str(), "").typed<Operator>();
  const auto call = [handle](const py::object& params, const py::object& grads, const py::object& momentum_buffers,
                             const py::object& steps, const py::object& lipschitz_bounds,
                             const std::vector<int64_t>& indices, const std::vector<int64_t>& shards, double lr,
                             double momentum, double dampening, double weight_decay, bool nesterov, double calibration,
                             std::optional<double> lipschitz, double bound_decay, const std::string& rounding,
                             int64_t seed, bool maximize, bool fresh_momentum,
                             const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& grad_scale,
                             const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& tallies) {
    const auto p = tensors_of("params", params), g = tensors_of("grads", grads);
    const auto m = tensors_of("momentum_buffers", momentum_buffers), s = tensors_of("steps", steps);
    const auto l = tensors_of("lipschitz_bounds", lipschitz_bounds);
    const py::gil_scoped_release no_gil;
    handle.call(p, g, m, s, l, indices, shards, lr, momentum, dampening, weight_decay, nesterov, calibration, lipschitz,
                bound_decay, rounding, seed, maximize, fresh_momentum, lr_tensor, grad_scale, found_inf, tallies);
  };
  m.def(name, torch::wrap_pybind_function(call), py::arg("params"), py::arg("grads"), py::arg("momentum_buffers"),
        py::arg("steps"), py::arg("lipschitz_bounds"), py::arg("indices"), py::arg("shards"), py::kw_only(),
        py::arg("lr"), py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("calibration"), py::arg("lipschitz"), py::arg("bound_decay"), py::arg("rounding"), py::arg("seed"),
        py::arg("maximize"), py::arg("fresh_momentum"), py::arg("lr_tensor"), py::arg("grad_scale"),
        py::arg("found_inf"), py::arg("tallies"),
        "torch.ops.csgd_cuda's operator of this name, called at less expense.");
}

}  // namespace

void add_operators(py::module_& m) {
  add_operator(m, "csgd_");
  add_operator(m, "check_csgd");
}

}  // namespace csgd
