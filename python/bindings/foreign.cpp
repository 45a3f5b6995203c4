#include "foreign.hpp"

namespace rmsnorm::python {
namespace {

// Of what PyObject_Str or PyObject_Repr returned.
std::string text_in(PyObject* string) {
  const nb::object owner = nb::steal(string);
  Py_ssize_t size = 0;
  const char* text = string == nullptr ? nullptr : PyUnicode_AsUTF8AndSize(string, &size);
  if (text != nullptr) return {text, static_cast<std::size_t>(size)};
  clear_exception();
  return "?";
}

}  // namespace

void clear_exception() {
  if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_Exception) == 0)
    throw nb::python_error();
  PyErr_Clear();
}

nb::object find_attribute(nb::handle object, const char* name) {
  PyObject* found = PyObject_GetAttrString(object.ptr(), name);
  if (found == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw nb::python_error();
    PyErr_Clear();
  }
  return nb::steal(found);
}

std::string str_text(nb::handle object) { return text_in(PyObject_Str(object.ptr())); }

std::string repr_text(nb::handle object) { return text_in(PyObject_Repr(object.ptr())); }

std::string attribute_text(nb::handle object, const char* name) {
  const nb::object found = nb::steal(PyObject_GetAttrString(object.ptr(), name));
  if (found.is_valid()) return str_text(found);
  clear_exception();
  return "?";
}

std::string type_text(nb::handle object) {
  const nb::handle type = object.type();
  const std::string name = attribute_text(type, "__qualname__");
  const std::string module = attribute_text(type, "__module__");
  return module == "builtins" ? name : module + "." + name;
}

}  // namespace rmsnorm::python
