// Errors for arguments that do not fit a function's parameters.
#pragma once

#include <nanobind/nanobind.h>

#include "function.hpp"

namespace rmsnorm::python {

[[noreturn]] void raise_unknown_keyword(const Definition& function, nb::handle keyword);
[[noreturn]] void raise_given_twice(const Definition& function, int parameter, const char* how);
[[noreturn]] void raise_missing(const Definition& function, int parameter);

// `given` arguments came by position, more than the function takes.
[[noreturn]] void raise_too_many(const Definition& function, PyObject* const* arguments,
                                 Py_ssize_t given);

// The function raised a TypeError. Where one of the optional arguments that came by position is a
// number, as in rms_norm(x, weight, 1e-5), raises another that names the keyword for it.
void explain_number(const Definition& function, PyObject* const* arguments, Py_ssize_t given);

}  // namespace rmsnorm::python
