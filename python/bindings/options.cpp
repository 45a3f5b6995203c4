#include "options.hpp"

#include <string>

#include "errors.hpp"
#include "foreign.hpp"

namespace rmsnorm::python {
namespace {

std::optional<DType> dtype_named(const std::string& text) {
  for (int t = 0; t < dtype_count; ++t)
    if (text == name(static_cast<DType>(t))) return static_cast<DType>(t);
  return std::nullopt;
}

// The name of a dtype object, without regard to whether it is supported; empty for other objects.
// What an object says that it is decides: nothing of its memory is read.
std::string dtype_object_name(nb::handle value) {
  const std::string type = type_text(value);
  if (type == "torch.dtype") {
    const std::string text = str_text(value);
    return text.substr(text.find('.') + 1);
  }
  if (type.rfind("numpy.dtype", 0) == 0) {  // numpy.dtypes.Float32DType since NumPy 1.25
    const nb::object native = find_attribute(value, "isnative");
    return attribute_text(value, native.ptr() == Py_True ? "name" : "str");
  }
  // Scalar types: numpy.float32, ml_dtypes.bfloat16, jax.numpy.float32.
  const std::string module = attribute_text(value, "__module__");
  if (module == "numpy" || module == "ml_dtypes" || module == "jax.numpy")
    return attribute_text(value, "__name__");
  return {};
}

}  // namespace

double read_number(nb::handle value, const char* name) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AsDouble(value.ptr());
  if (PyBool_Check(value.ptr())) raise(PyExc_TypeError, "%s: expected a number, got bool", name);
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    nb::python_error cause;
    if (cause.matches(PyExc_OverflowError))
      raise_from(cause, PyExc_ValueError, "%s: expected a number within the range of a double",
                 name);
    raise_from(cause, PyExc_TypeError, "%s: expected a number, got %s", name,
               type_text(value).c_str());
  }
  return number;
}

std::int32_t read_integer(nb::handle value, const char* name) {
  if (PyLong_CheckExact(value.ptr())) {
    int overflow = 0;
    const long number = PyLong_AsLongAndOverflow(value.ptr(), &overflow);
    if (overflow == 0 && number >= INT32_MIN && number <= INT32_MAX)
      return static_cast<std::int32_t>(number);
  }
  if (PyBool_Check(value.ptr())) raise(PyExc_TypeError, "%s: expected an integer, got bool", name);
  const nb::object integer = nb::steal(PyNumber_Index(value.ptr()));
  if (!integer.is_valid()) {
    nb::python_error cause;
    raise_from(cause, PyExc_TypeError, "%s: expected an integer, got %s", name,
               type_text(value).c_str());
  }
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0 || number < INT32_MIN || number > INT32_MAX)
    raise(PyExc_ValueError, "%s: expected an integer of 32 bits, got %s", name,
          repr_text(integer).c_str());
  return static_cast<std::int32_t>(number);
}

bool read_flag(nb::handle value, const char* name) {
  if (!PyBool_Check(value.ptr()))
    raise(PyExc_TypeError, "%s: expected True or False, got %s", name, type_text(value).c_str());
  return value.ptr() == Py_True;
}

Rounding read_rounding(nb::handle value) {
  if (!PyUnicode_Check(value.ptr()))
    raise(PyExc_TypeError, "rounding: expected a string, got %s", type_text(value).c_str());
  const auto is = [&](const char* text) {
    return PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
  };
  if (is("once")) return Rounding::once;
  if (is("before_weight")) return Rounding::before_weight;
  if (is("rstd")) return Rounding::rstd;
  raise(PyExc_ValueError, "rounding: expected 'once', 'before_weight' or 'rstd', got %s",
        repr_text(value).c_str());
}

std::optional<DType> read_dtype(nb::handle value, const char* name) {
  constexpr const char* expected = "float16, bfloat16, float32 or float64";
  if (value.is_none()) return std::nullopt;
  if (PyUnicode_Check(value.ptr())) {
    if (const auto dtype = dtype_named(nb::str(value).c_str())) return dtype;
    raise(PyExc_ValueError, "%s: expected %s, got %s", name, expected, repr_text(value).c_str());
  }
  const std::string object_name = dtype_object_name(value);
  if (const auto dtype = dtype_named(object_name)) return dtype;
  raise(PyExc_TypeError, "%s: expected %s, as a string or a dtype, got %s", name, expected,
        object_name.empty() ? repr_text(value).c_str() : object_name.c_str());
}

}  // namespace rmsnorm::python
