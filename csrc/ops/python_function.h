// SPDX-License-Identifier: Apache-2.0
// Operators as plain Python functions. torch.ops.csgd_cuda.csgd_ boxes each tensor of its lists, which takes 0.1 us for
// each, and pybind11 takes 0.15 us for each argument: for a model of small tensors more than the step itself. The
// functions made here read their arguments themselves and then call the same operator through the same dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/MaybeOwned.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"

namespace csgd {

// An argument as it was given.
struct Given {
  const char* name;
  PyObject* value;

  void check(bool accepted, const char* expected) const {
    TORCH_CHECK_TYPE(accepted, name, " must be ", expected, ", got ", Py_TYPE(value)->tp_name);
  }
};

// A snapshot of a list, which keeps its items alive whatever another thread does to the list.
inline pybind11::object items_of(const Given& list, const char* expected) {
  list.check(PyList_Check(list.value) || PyTuple_Check(list.value), expected);
  PyObject* items = PySequence_Tuple(list.value);
  if (items == nullptr) throw python_error();
  return pybind11::reinterpret_steal<pybind11::object>(items);
}

// A Python object, read as an argument that is passed on as T.
template <class T>
class FromPython;

template <>
class FromPython<double> {
 public:
  FromPython(const Given& given) : value_(PyFloat_AsDouble(given.value)) {
    if (value_ == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      given.check(false, "a number");
    }
  }
  double get() const { return value_; }

 private:
  double value_;
};

// Unsigned integers of 64 bits are passed on as the signed ones of the same bits, as seeds are.
template <>
class FromPython<int64_t> {
 public:
  FromPython(const Given& given) {
    int overflow = 0;
    value_ = PyLong_AsLongLongAndOverflow(given.value, &overflow);
    if (overflow > 0) value_ = static_cast<int64_t>(PyLong_AsUnsignedLongLong(given.value));
    if (value_ == -1 && (overflow < 0 || PyErr_Occurred())) {
      PyErr_Clear();
      given.check(false, "an integer of 64 bits");
    }
  }
  int64_t get() const { return value_; }

 private:
  int64_t value_;
};

template <>
class FromPython<bool> {
 public:
  FromPython(const Given& given) : value_(given.value == Py_True) { given.check(PyBool_Check(given.value), "a bool"); }
  bool get() const { return value_; }

 private:
  bool value_;
};

template <>
class FromPython<std::string_view> {
 public:
  FromPython(const Given& given) {
    given.check(PyUnicode_Check(given.value), "a str");
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(given.value, &size);
    if (text == nullptr) throw python_error();
    value_ = {text, static_cast<size_t>(size)};
  }
  std::string_view get() const { return value_; }

 private:
  std::string_view value_;
};

template <>
class FromPython<const at::Tensor&> {
 public:
  FromPython(const Given& given) {
    given.check(THPVariable_Check(given.value), "a tensor");
    value_ = THPVariable_Unpack(given.value);
  }
  const at::Tensor& get() const { return value_; }

 private:
  at::Tensor value_;
};

template <class T>
class FromPython<std::optional<T>> {
 public:
  FromPython(const Given& given) {
    if (given.value != Py_None) value_ = FromPython<T>(given).get();
  }
  std::optional<T> get() const { return value_; }

 private:
  std::optional<T> value_;
};

template <>
class FromPython<const std::optional<at::Tensor>&> {
 public:
  FromPython(const Given& given) {
    if (given.value != Py_None) value_ = FromPython<const at::Tensor&>(given).get();
  }
  const std::optional<at::Tensor>& get() const { return value_; }

 private:
  std::optional<at::Tensor> value_;
};

// The tensors are borrowed from the items: to own a tensor that only Python refers to takes the GIL each time.
template <>
class FromPython<at::TensorList> {
  using Borrowing = c10::MaybeOwnedTraits<at::Tensor>;

 public:
  FromPython(const Given& given) : items_(items_of(given, "a list of tensors")) {
    const Py_ssize_t size = PyTuple_GET_SIZE(items_.ptr());
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* item = PyTuple_GET_ITEM(items_.ptr(), i);
      TORCH_CHECK_TYPE(THPVariable_Check(item), given.name, "[", i, "] must be a tensor, got ", Py_TYPE(item)->tp_name);
    }
    tensors_.reserve(static_cast<size_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      tensors_.push_back(Borrowing::createBorrow(THPVariable_Unpack(PyTuple_GET_ITEM(items_.ptr(), i))));
    }
  }
  ~FromPython() {
    for (at::Tensor& tensor : tensors_) Borrowing::destroyBorrow(tensor);
  }
  FromPython(const FromPython&) = delete;
  FromPython& operator=(const FromPython&) = delete;
  at::TensorList get() const { return tensors_; }

 private:
  pybind11::object items_;
  std::vector<at::Tensor> tensors_;
};

// Integers or floats.
template <class Number>
class FromPython<at::ArrayRef<Number>> {
 public:
  FromPython(const Given& given) {
    const pybind11::object items = items_of(given, "a list of numbers");
    values_.resize(static_cast<size_t>(PyTuple_GET_SIZE(items.ptr())));
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = FromPython<Number>({given.name, PyTuple_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i))}).get();
    }
  }
  at::ArrayRef<Number> get() const { return values_; }

 private:
  std::vector<Number> values_;
};

// The operator with the arguments Args as a function of a Python module.
template <class Args, class Result>
class PythonFunction {
 public:
  // The module keeps pointers to `name`.
  static void add(pybind11::module_& m, const char* name) {
    operator_name = "csgd_cuda::" + std::string(name);
    for (size_t i = 0; i < kCount; ++i) names[i] = PyUnicode_InternFromString(Args::kArguments[i].name);
    methods[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                  METH_FASTCALL | METH_KEYWORDS,
                  "torch.ops.csgd_cuda's operator of this name, called at less expense."};
    if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw python_error();
  }

 private:
  static constexpr size_t kCount = std::size(Args::kArguments);
  static constexpr size_t kPositional = [] {
    size_t count = 0;
    for (const Argument& argument : Args::kArguments) count += argument.keyword_only ? 0 : 1;
    return count;
  }();

  static inline std::string operator_name;
  static inline std::array<PyObject*, kCount> names;
  static inline PyMethodDef methods[2] = {};

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    HANDLE_TH_ERRORS
    const auto given = static_cast<size_t>(keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords));
    TORCH_CHECK_TYPE(static_cast<size_t>(positional) == kPositional && given == kCount - kPositional, operator_name,
                     " takes ", kPositional, " positional and ", kCount - kPositional, " keyword arguments, got ",
                     positional, " and ", given);
    std::array<PyObject*, kCount> in_order{};
    std::copy_n(values, kPositional, in_order.begin());
    for (size_t k = 0; k < given; ++k) {
      in_order[place_of(PyTuple_GET_ITEM(keywords, static_cast<Py_ssize_t>(k)))] = values[kPositional + k];
    }
    return call_in_order(in_order, typename Args::Types{}, std::make_index_sequence<kCount>{});
    END_HANDLE_TH_ERRORS
  }

  // The place of a keyword argument in the list.
  static size_t place_of(PyObject* name) {
    auto found = std::find(names.begin() + kPositional, names.end(), name);
    if (found == names.end()) {  // it may be an equal text that is another object
      found = std::find_if(names.begin() + kPositional, names.end(),
                           [name](PyObject* known) { return PyUnicode_Compare(known, name) == 0; });
    }
    TORCH_CHECK_TYPE(found != names.end(), operator_name, " has no keyword argument ", pybind11::handle(name));
    return static_cast<size_t>(found - names.begin());
  }

  template <class... Types, size_t... k>
  static PyObject* call_in_order(const std::array<PyObject*, kCount>& in_order, TypeList<void, Types...>,
                                 std::index_sequence<k...>) {
    static const auto handle =
        c10::Dispatcher::singleton().findSchemaOrThrow(operator_name.c_str(), "").template typed<Result(Types...)>();
    const std::tuple<FromPython<Types>...> arguments(Given{Args::kArguments[k].name, in_order[k]}...);
    const auto run = [&] {
      const pybind11::gil_scoped_release no_gil;
      return handle.call(std::get<k>(arguments).get()...);
    };
    if constexpr (std::is_void_v<Result>) {
      run();
      Py_RETURN_NONE;
    } else {
      return THPVariable_Wrap(run());
    }
  }
};

}  // namespace csgd
