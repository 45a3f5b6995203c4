#include "options.hpp"

#include <string>

#include "autograd.hpp"
#include "errors.hpp"
#include "foreign.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

bool is(nb::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) && PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

std::optional<DType> dtype_named(nb::handle string) {
  for (int t = 0; t < dtype_count; ++t)
    if (is(string, name(static_cast<DType>(t)))) return static_cast<DType>(t);
  return std::nullopt;
}

// The name of a dtype object, without regard to whether it is supported; None for other objects.
nb::object dtype_object_name(nb::handle value) {
  const std::string type = type_text(value);
  if (type == "torch.dtype") return nb::str(value).attr("removeprefix")("torch.");
  if (type.rfind("numpy.dtype", 0) == 0) {  // numpy.dtypes.Float32DType since NumPy 1.25
    const bool native = find_attribute(value, "isnative").ptr() == Py_True;
    return string_attribute(value, native ? "name" : "str");
  }
  // Scalar types: numpy.float32, ml_dtypes.bfloat16, jax.numpy.float32.
  const nb::object module = string_attribute(value, "__module__");
  for (const char* known : {"numpy", "ml_dtypes", "jax.numpy"})
    if (is(module, known)) return string_attribute(value, "__name__");
  return nb::none();
}

nb::object ask_for_name(nb::handle value, const char* name) {
  try {
    return dtype_object_name(value);
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "%s: asking %s for its name failed", name,
               type_text(value).c_str());
  }
}

}  // namespace

double read_number(nb::handle value, const char* name) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AsDouble(value.ptr());
  if (PyBool_Check(value.ptr())) raise(PyExc_TypeError, "%s: expected a number, got bool", name);
  refuse_lost_derivative(value, name);
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
  // The default, and what the compiler of Python makes of the word in a program, is this object.
  static PyObject* const once = PyUnicode_InternFromString("once");
  if (value.ptr() == once) return Rounding::once;
  if (!PyUnicode_Check(value.ptr()))
    raise(PyExc_TypeError, "rounding: expected a string, got %s", type_text(value).c_str());
  if (is(value, "once")) return Rounding::once;
  if (is(value, "before_weight")) return Rounding::before_weight;
  if (is(value, "rstd")) return Rounding::rstd;
  raise(PyExc_ValueError, "rounding: expected 'once', 'before_weight' or 'rstd', got %s",
        repr_text(value).c_str());
}

std::optional<DType> read_dtype(nb::handle value, const char* name) {
  constexpr const char* expected = "float16, bfloat16, float32 or float64";
  if (value.is_none()) return std::nullopt;
  if (PyUnicode_Check(value.ptr())) {
    if (const auto dtype = dtype_named(value)) return dtype;
    raise(PyExc_ValueError, "%s: expected %s, got %s", name, expected, repr_text(value).c_str());
  }
  const nb::object object_name = ask_for_name(value, name);
  if (const auto dtype = dtype_named(object_name)) return dtype;
  raise(PyExc_TypeError, "%s: expected %s, as a string or a dtype, got %s", name, expected,
        object_name.is_none() ? repr_text(value).c_str() : str_text(object_name).c_str());
}

}  // namespace rmsnorm::python
