// Python objects as text for messages: in UTF-8, of at most 80 characters, whatever the object's
// own methods do.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace rmsnorm::python {

namespace nb = nanobind;

// repr(object), str(object). Where that fails the text says so; exceptions that are no Exception,
// as KeyboardInterrupt, pass through.
std::string repr_text(nb::handle object);
std::string str_text(nb::handle object);

// The shortest text of a number that is no other's: "%g" would show 0.9999999 as 1.
std::string number_text(double value);

// The type of an object as users know it: "list", "pandas.Series".
std::string type_text(nb::handle object);

// An attribute that is a string; None where there is none, or one that is no string.
nb::object string_attribute(nb::handle object, const char* name);

// A string of C or the value of an environment variable in quotes, bytes other than printable ASCII
// as \xNN. Null is empty. Takes no GIL.
std::string bytes_text(const char* value);
std::string environment_text(const char* variable);

}  // namespace rmsnorm::python
