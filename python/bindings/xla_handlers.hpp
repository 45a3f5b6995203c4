// Forward and backward as functions that XLA calls from compiled programs: rmsnorm.jax registers
// them, and says in the attributes of each call what its arguments and results are.
#pragma once

#include <nanobind/nanobind.h>

namespace rmsnorm::python::xla {

namespace nb = nanobind;

// xla_handlers(): for each of XLA's platforms that this build can compute on, by name, the names
// of the custom calls and capsules with their handlers.
void define_handlers(nb::module_& m);

}  // namespace rmsnorm::python::xla
