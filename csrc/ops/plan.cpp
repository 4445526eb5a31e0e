// SPDX-License-Identifier: Apache-2.0
// What csgd_cuda/optim/plan.py does for each parameter in each step, which takes Python 0.4 us, as long as the step of
// 64 elements.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <utility>

#include "bindings.h"

namespace py = pybind11;

namespace csgd {
namespace {

py::object owned(PyObject* reference) {
  if (reference == nullptr) throw python_error();
  return py::reinterpret_steal<py::object>(reference);
}

py::object gradient_of(PyObject* param) {
  // A subclass may have a `grad` of its own.
  if (!THPVariable_CheckExact(param)) return owned(PyObject_GetAttrString(param, "grad"));
  return owned(THPVariable_Wrap(THPVariable_Unpack(param).grad()));
}

// None where there is none.
py::object entry_of(PyObject* dict, PyObject* key) {
  PyObject* entry = PyDict_GetItemWithError(dict, key);
  if (entry == nullptr && PyErr_Occurred()) throw python_error();
  return py::reinterpret_borrow<py::object>(entry == nullptr ? Py_None : entry);
}

// Finds the states of parameters one after another. To hash a tensor takes a call of a Python function. So the states
// are walked along with the parameters, for most optimizers have made them in that order.
class States {
 public:
  explicit States(PyObject* states) : states_(states) {}

  // None where there is none.
  py::object of(const py::object& param) {
    PyObject* key = nullptr;
    PyObject* state = nullptr;
    while (in_order_) {
      in_order_ = PyDict_Next(states_, &place_, &key, &state) != 0;
      if (in_order_ && key == param.ptr()) return py::reinterpret_borrow<py::object>(state);
    }
    return entry_of(states_, param.ptr());
  }

 private:
  PyObject* states_;
  Py_ssize_t place_ = 0;
  bool in_order_ = true;
};

py::object gather(const py::list& params, const py::object& states, const py::tuple& names) {
  if (!PyDict_Check(states.ptr())) return py::none();
  const auto count = static_cast<Py_ssize_t>(params.size());
  const auto entries = static_cast<Py_ssize_t>(names.size());
  py::list lists;
  for (Py_ssize_t k = 0; k <= entries; ++k) lists.append(py::list(count));
  const auto set = [&lists](Py_ssize_t list, Py_ssize_t place, py::object&& item) {
    PyList_SET_ITEM(PyList_GET_ITEM(lists.ptr(), list), place, item.release().ptr());
  };
  States of_optimizer(states.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    const py::object param = params[i];
    py::object gradient = gradient_of(param.ptr());
    const py::object state = of_optimizer.of(param);
    if (gradient.is_none() || !PyDict_Check(state.ptr())) return py::none();
    set(0, i, std::move(gradient));
    for (Py_ssize_t k = 0; k < entries; ++k) {
      py::object entry = entry_of(state.ptr(), PyTuple_GET_ITEM(names.ptr(), k));
      if (entry.is_none()) return py::none();
      set(1 + k, i, std::move(entry));
    }
  }
  return lists;
}

bool same(const py::list& a, const py::list& b) {
  PyObject** items = PySequence_Fast_ITEMS(a.ptr());
  return a.size() == b.size() && std::equal(items, items + a.size(), PySequence_Fast_ITEMS(b.ptr()));
}

}  // namespace

void add_plan(py::module_& m) {
  m.def("gather", &gather, py::arg("params"), py::arg("states"), py::arg("names"),
        "The gradients of parameters, and the entries of these names in their states, as lists; None where one lacks.");
  m.def("same", &same, py::arg("a"), py::arg("b"), "Whether two lists hold the very same objects.");
}

}  // namespace csgd
