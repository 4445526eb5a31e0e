// SPDX-License-Identifier: Apache-2.0
// Operators as plain Python functions. torch.ops.csgd_cuda.csgd_ boxes each tensor of its lists, which takes 0.1 us for
// each: with five lists more than half of the host's time for a model of small tensors. The functions made here unpack
// the lists themselves and then call the same operator through the same dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"

namespace csgd {

// The type to which pybind11 converts a Python argument that is then passed on as T.
template <class T>
struct FromPython {
  using Type = std::decay_t<T>;
};
template <>
struct FromPython<at::TensorList> {
  using Type = pybind11::object;  // a list, which unpack() takes apart
};
template <>
struct FromPython<at::IntArrayRef> {
  using Type = std::vector<int64_t>;
};
template <>
struct FromPython<std::string_view> {
  using Type = std::string;
};

template <class Value>
const Value& unpack(const char*, const Value& value) {
  return value;
}

inline std::vector<at::Tensor> unpack(const char* name, const pybind11::object& list) {
  const auto items = pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(list.ptr(), ""));
  if (!items) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, name, " must be a list of tensors, got ", Py_TYPE(list.ptr())->tp_name);
  }
  PyObject** item = PySequence_Fast_ITEMS(items.ptr());
  std::vector<at::Tensor> tensors(static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr())));
  for (size_t i = 0; i < tensors.size(); ++i) {
    pybind11::detail::make_caster<at::Tensor> tensor;
    TORCH_CHECK_TYPE(tensor.load(item[i], false), name, "[", i, "] must be a tensor, got ", Py_TYPE(item[i])->tp_name);
    tensors[i] = std::move(tensor.operator at::Tensor&());
  }
  return tensors;
}

// kAll: the places of all arguments in the list. kPositional: those of the positional arguments. kKeyword: 0, 1, ...
// for the keyword-only arguments, which follow these.
template <class Args, class... Types, size_t... kAll, size_t... kPositional, size_t... kKeyword>
void add_function(pybind11::module_& m, const char* name, TypeList<void, Types...>, std::index_sequence<kAll...>,
                  std::index_sequence<kPositional...>, std::index_sequence<kKeyword...>) {
  namespace py = pybind11;
  const auto full_name = std::string("csgd_cuda::") + name;
  const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), "").template typed<void(Types...)>();
  const auto call = [handle](const typename FromPython<Types>::Type&... given) {
    const std::tuple<decltype(unpack(nullptr, given))...> arguments{unpack(Args::kArguments[kAll].name, given)...};
    const py::gil_scoped_release no_gil;
    std::apply([&](const auto&... each) { handle.call(each...); }, arguments);
  };
  m.def(name, torch::wrap_pybind_function(call), py::arg(Args::kArguments[kPositional].name)..., py::kw_only(),
        py::arg(Args::kArguments[sizeof...(kPositional) + kKeyword].name)...,
        "torch.ops.csgd_cuda's operator of this name, called at less expense.");
}

// Adds the operator of this name, which must return nothing, to the module as a function.
template <class Args>
void add_function(pybind11::module_& m, const char* name) {
  constexpr size_t kCount = std::size(Args::kArguments);
  constexpr size_t kPositional = [] {
    size_t count = 0;
    for (const Argument& argument : Args::kArguments) count += argument.keyword_only ? 0 : 1;
    return count;
  }();
  add_function<Args>(m, name, typename Args::Types{}, std::make_index_sequence<kCount>{},
                     std::make_index_sequence<kPositional>{}, std::make_index_sequence<kCount - kPositional>{});
}

}  // namespace csgd
