// Questions to objects of the caller. Each may run code of the caller's, which may raise anything:
// what is no Exception (KeyboardInterrupt, SystemExit) always goes on to the caller as it is.
#pragma once

#include <nanobind/nanobind.h>

namespace rmsnorm::python {

namespace nb = nanobind;

// Forgets the Python error that is set, if any; one that is no Exception is thrown.
void clear_exception();

// Invalid where the object has no such attribute. Throws what else its lookup raises.
nb::object find_attribute(nb::handle object, const char* name);

}  // namespace rmsnorm::python
