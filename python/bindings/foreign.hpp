// Questions to objects of the caller. Each may run code of the caller's, which may raise anything:
// what is no Exception (KeyboardInterrupt, SystemExit) always goes on to the caller as it is.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace rmsnorm::python {

namespace nb = nanobind;

// Forgets the Python error that is set, if any; one that is no Exception is thrown.
void clear_exception();

// Invalid where the object has no such attribute. Throws what else its lookup raises.
nb::object find_attribute(nb::handle object, const char* name);

// str() and repr() for messages, and str() of an attribute; "?" where they fail.
std::string str_text(nb::handle object);
std::string repr_text(nb::handle object);
std::string attribute_text(nb::handle object, const char* name);

// The type of an object as users know it: "list", "pandas.Series".
std::string type_text(nb::handle object);

}  // namespace rmsnorm::python
