#include "foreign.hpp"

namespace rmsnorm::python {

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

bool refuses_arguments(const nb::python_error& error) {
  if (!error.matches(PyExc_TypeError)) return false;
  // The exception's own members: its class may have others of the same names.
  const nb::object cause = nb::steal(PyException_GetCause(error.value().ptr()));
  if (cause.is_valid()) return false;
  const nb::handle traceback = error.traceback();
  if (!traceback.is_valid() || find_attribute(traceback, "tb_next").is_none()) return true;
  const nb::object text = nb::steal(PyObject_Str(error.value().ptr()));
  if (!text.is_valid()) clear_exception();
  return text.is_valid() &&
         PyUnicode_Contains(text.ptr(), nb::str("unexpected keyword").ptr()) == 1;
}

}  // namespace rmsnorm::python
