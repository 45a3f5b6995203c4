// Options in: Python numbers, flags and names, with errors that name the option.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <rmsnorm/contract.hpp>

namespace rmsnorm::python {

namespace nb = nanobind;

double read_number(nb::handle value, const char* name);
std::int32_t read_integer(nb::handle value, const char* name);
bool read_flag(nb::handle value, const char* name);
Rounding read_rounding(nb::handle value);

// A dtype by name ("bfloat16") or as an object of NumPy, ml_dtypes, JAX or torch; none for None.
std::optional<DType> read_dtype(nb::handle value, const char* name);

}  // namespace rmsnorm::python
