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

// Whether a callee does not take the arguments that it was given: a TypeError of the call or of the
// callee's own code, or one that says so of what it handed them on to, and not what became of
// another error in there.
bool refuses_arguments(const nb::python_error& error);

}  // namespace rmsnorm::python
