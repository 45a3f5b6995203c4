// The functions of the package: objects that are called like functions of C and that have what
// functions of Python have. They pickle and copy by name, tell inspect their signature, and say by
// name which argument is wrong. A call costs what one of nanobind's functions does, less its search
// through overloads.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <utility>

namespace rmsnorm::python {

namespace nb = nanobind;

struct Parameter {
  const char* name;
  const char* annotation;      // Python source, in the names of rmsnorm._typing
  nb::object default_value{};  // invalid: the argument is required
};

constexpr int max_parameters = 18;

// Computes a result from one argument for each parameter.
using Compute = nb::object (*)(PyObject* const* arguments);

struct Texts {
  const char* name;
  const char* doc;
  const char* returns;  // an annotation
};

struct Definition {
  Texts texts;
  int positional;  // so many parameters may be given by position
  Compute compute;
  int count;
  Parameter parameters[max_parameters];
};

// Adds rmsnorm.NAME to the module.
void add_function(nb::module_& m, const Definition& definition);

namespace detail {

template <auto function>
struct Spread;

// Calls a function of C++ with one handle for each argument.
template <class... Handles, nb::object (*function)(Handles...)>
struct Spread<function> {
  static constexpr int count = sizeof...(Handles);
  static nb::object compute(PyObject* const* arguments) {
    return compute(arguments, std::index_sequence_for<Handles...>());
  }

 private:
  template <std::size_t... index>
  static nb::object compute([[maybe_unused]] PyObject* const* arguments,
                            std::index_sequence<index...>) {
    return function(Handles(arguments[index])...);
  }
};

}  // namespace detail

// The same for a function that takes a handle for each of the parameters, in their order.
template <auto function, class... Parameters>
void define_function(nb::module_& m, const Texts& texts, int positional,
                     const Parameters&... parameters) {
  using Spread = detail::Spread<function>;
  static_assert(sizeof...(parameters) == Spread::count);
  static_assert(Spread::count <= max_parameters);
  add_function(m, {texts, positional, Spread::compute, Spread::count, {parameters...}});
}

}  // namespace rmsnorm::python
