// SPDX-License-Identifier: Apache-2.0
/*
  The arguments of an operator are written down once, as a list with one of them in a line:

    #define CSGD_HALVE_ARGUMENTS(POSITIONAL, KEYWORD)     \
      POSITIONAL("Tensor(a!)[]", at::TensorList, tensors) \
      KEYWORD("float", double, factor)
    CSGD_DEFINE_ARGUMENTS(HalveArgs, CSGD_HALVE_ARGUMENTS);

  A line has the type in torch's schema, where "(a!)" marks a tensor that the operator changes in place; the type in
  C++, as the dispatcher passes it; and the name. From the list follow the struct HalveArgs, the schema (schema), the
  function that the dispatcher calls (unboxed), and the function of the Python module (python_function.h).
*/
#pragma once

#include <string>

namespace csgd {

struct Argument {
  const char* type;  // in the schema
  const char* name;
  bool keyword_only;
};

// The types of a list of arguments. The first one is void, only because a list made by a macro has a comma before each
// type.
template <class... Types>
struct TypeList {};

#define CSGD_ARGUMENT_FIELD(schema_type, cpp_type, name) cpp_type name;
#define CSGD_ARGUMENT_TYPE(schema_type, cpp_type, name) , cpp_type
#define CSGD_POSITIONAL_ARGUMENT(schema_type, cpp_type, name) {schema_type, #name, false},
#define CSGD_KEYWORD_ARGUMENT(schema_type, cpp_type, name) {schema_type, #name, true},

#define CSGD_DEFINE_ARGUMENTS(Name, LIST)                                                                     \
  struct Name {                                                                                               \
    LIST(CSGD_ARGUMENT_FIELD, CSGD_ARGUMENT_FIELD)                                                            \
    using Types = ::csgd::TypeList<void LIST(CSGD_ARGUMENT_TYPE, CSGD_ARGUMENT_TYPE)>;                        \
    static constexpr ::csgd::Argument kArguments[] = {LIST(CSGD_POSITIONAL_ARGUMENT, CSGD_KEYWORD_ARGUMENT)}; \
  }

// The schema of an operator, for instance "halve_(Tensor(a!)[] tensors, *, float factor) -> ()".
template <class Args>
std::string schema(const std::string& name, const std::string& result) {
  std::string text;
  bool keyword_only = false;
  for (const Argument& argument : Args::kArguments) {
    if (!text.empty()) text += ", ";
    if (argument.keyword_only && !keyword_only) text += "*, ";
    keyword_only = argument.keyword_only;
    text += std::string(argument.type) + " " + argument.name;
  }
  return name + "(" + text + ") -> " + result;
}

template <class Args, auto function, class Types = typename Args::Types>
struct Unboxed;

template <class Args, auto function, class... Types>
struct Unboxed<Args, function, TypeList<void, Types...>> {
  static auto call(Types... arguments) { return function(Args{arguments...}); }
};

// The function to give to torch's dispatcher, which passes the arguments one by one. It calls `function` with an Args.
template <class Args, auto function>
constexpr auto* unboxed = &Unboxed<Args, function>::call;

}  // namespace csgd
