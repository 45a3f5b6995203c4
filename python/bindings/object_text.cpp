#include "object_text.hpp"

#include <cstdio>
#include <cstdlib>

namespace rmsnorm::python {
namespace {

constexpr Py_ssize_t longest_text = 80;

nb::object checked(PyObject* object) {
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

// A string of Python may hold surrogates, which UTF-8 has no code for, and zeros, which would end a
// message.
std::string utf8(nb::handle string) {
  const nb::object shown =
      checked(PyUnicode_Replace(string.ptr(), nb::str("\0", 1).ptr(), nb::str("\\x00").ptr(), -1));
  const nb::object bytes =
      checked(PyUnicode_AsEncodedString(shown.ptr(), "utf-8", "backslashreplace"));
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw nb::python_error();
  return {data, static_cast<std::size_t>(size)};
}

// The characters are counted as they are shown, in which an escaped surrogate has six. Only so many
// of a long string are looked at.
std::string clipped(nb::handle string) {
  const std::string start = utf8(checked(PyUnicode_Substring(string.ptr(), 0, longest_text + 1)));
  const nb::object shown =
      checked(PyUnicode_DecodeUTF8(start.data(), static_cast<Py_ssize_t>(start.size()), nullptr));
  if (PyUnicode_GetLength(shown.ptr()) <= longest_text) return utf8(shown);
  return utf8(checked(PyUnicode_Substring(shown.ptr(), 0, longest_text - 3))) + "...";
}

std::string text_by(PyObject* (*make)(PyObject*), nb::handle object) {
  try {
    return clipped(checked(make(object.ptr())));
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_Exception)) throw;
  }
  return "an object of type " + type_text(object) + " that cannot be shown";
}

std::string name_of(nb::handle type, const char* attribute) {
  const nb::object name = string_attribute(type, attribute);
  return name.is_none() ? "?" : clipped(name);
}

}  // namespace

std::string repr_text(nb::handle object) { return text_by(PyObject_Repr, object); }

std::string str_text(nb::handle object) { return text_by(PyObject_Str, object); }

std::string number_text(double value) {
  char* const text = PyOS_double_to_string(value, 'r', 0, 0, nullptr);
  if (text == nullptr) throw nb::python_error();
  std::string copy = text;
  PyMem_Free(text);
  return copy;
}

std::string type_text(nb::handle object) {
  const nb::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  const std::string module = name_of(type, "__module__");
  const std::string qualified = name_of(type, "__qualname__");
  return module == "builtins" ? qualified : module + "." + qualified;
}

nb::object string_attribute(nb::handle object, const char* name) {
  PyObject* found = PyObject_GetAttrString(object.ptr(), name);
  if (found == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw nb::python_error();
    PyErr_Clear();
    return nb::none();
  }
  nb::object value = nb::steal(found);
  return PyUnicode_Check(found) ? value : nb::none();
}

std::string bytes_text(const char* value) {
  std::string text = "'";
  for (; value != nullptr && *value != '\0'; ++value) {
    if (text.size() > static_cast<std::size_t>(longest_text)) return text + "...'";
    char escaped[5];
    const auto byte = static_cast<unsigned char>(*value);
    std::snprintf(escaped, sizeof(escaped), byte < 0x20 || byte > 0x7e ? "\\x%02x" : "%c", byte);
    text += escaped;
  }
  return text + "'";
}

std::string environment_text(const char* variable) { return bytes_text(std::getenv(variable)); }

}  // namespace rmsnorm::python
