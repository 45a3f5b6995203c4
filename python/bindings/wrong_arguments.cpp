#include "wrong_arguments.hpp"

#include <string>

#include "errors.hpp"
#include "foreign.hpp"

namespace rmsnorm::python {
namespace {

// The names that parameters have in other libraries.
constexpr struct {
  const char* name;
  const char* parameter;
} other_names[] = {
    {"epsilon", "eps"},
    {"variance_epsilon", "eps"},
    {"norm_eps", "eps"},
    {"rms_norm_eps", "eps"},
    {"layer_norm_eps", "eps"},
    {"layer_norm_epsilon", "eps"},
    {"dim", "axis"},
    {"dims", "axis"},
    {"axes", "axis"},
    {"begin_norm_axis", "axis"},
    {"normalized_shape", "axis"},
    {"gamma", "weight"},
    {"scale", "weight"},
    {"weights", "weight"},
    {"w", "weight"},
    {"beta", "bias"},
    {"b", "bias"},
    {"zero_centered_gamma", "weight_offset"},
    {"add_unit_offset", "weight_offset"},
    {"offset", "weight_offset"},
    {"input", "x"},
    {"inputs", "x"},
    {"hidden_states", "x"},
    {"a", "x"},
    {"residuals", "residual"},
    {"dtype", "out_dtype"},
    {"output", "out"},
    {"y", "out"},
    {"grad_output", "dy"},
    {"dout", "dy"},
    {"rsigma", "rstd"},
    {"inv_rms", "rstd"},
    {"variance", "mean_square"},
    {"cuda_stream", "stream"},
    {"num_threads", "n"},
};

std::string names_of(const Definition& function, int first, int last) {
  std::string text;
  for (int i = first; i < last; ++i) {
    if (i > first) text += ", ";
    text += function.parameters[i].name;
  }
  return text;
}

bool has(const Definition& function, const std::string& name) {
  for (int i = 0; i < function.count; ++i)
    if (name == function.parameters[i].name) return true;
  return false;
}

// A hint for a message; empty where code of others that it needs raises, as modules do that cannot
// be imported any more while the interpreter ends.
template <class Ask>
std::string hint(Ask ask) {
  try {
    return ask();
  } catch (const nb::python_error& error) {
    if (!error.matches(PyExc_Exception)) throw;
    return {};
  }
}

// The parameter whose name is spelt most alike; empty where none is close.
std::string nearest_name(const Definition& function, nb::handle keyword) {
  nb::list names;
  for (int i = 0; i < function.count; ++i) names.append(function.parameters[i].name);
  // No name is near a longer one, which would take difflib long.
  if (PyUnicode_GetLength(keyword.ptr()) > 64) return {};
  const nb::object close =
      nb::module_::import_("difflib").attr("get_close_matches")(keyword, names, 1);
  return nb::len(close) == 0 ? std::string() : str_text(nb::object(close[0]));
}

std::string name_meant(const Definition& function, nb::handle keyword) {
  for (const auto& other : other_names)
    if (has(function, other.parameter) &&
        PyUnicode_CompareWithASCIIString(keyword.ptr(), other.name) == 0)
      return other.parameter;
  return hint([&] { return nearest_name(function, keyword); });
}

// Classes of arrays may be registered as numbers.
bool is_number(nb::handle value) {
  if (find_attribute(value, "__dlpack__").is_valid()) return false;
  const nb::object number = nb::module_::import_("numbers").attr("Number");
  const int result =
      PyObject_IsSubclass(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), number.ptr());
  if (result < 0) throw nb::python_error();
  return result == 1;
}

// Returns "rms_norm(x, weight, eps=1e-05)" for the number at this position, where integers are
// axes, and nothing for other values, for numbers longer than any that is meant, and for functions
// without options.
std::string call_with_keyword(const Definition& function, nb::handle value, int position) {
  return hint([&]() -> std::string {
    if (!has(function, "eps") || !is_number(value)) return {};
    const char* keyword = PyLong_Check(value.ptr()) ? "axis" : "eps";
    const std::string number = str_text(value);
    if (number.size() > 24) return {};
    return std::string(function.texts.name) + "(" + names_of(function, 0, position) + ", " +
           keyword + "=" + number + ")";
  });
}

}  // namespace

void raise_unknown_keyword(const Definition& function, nb::handle keyword) {
  std::string text = str_text(keyword) + ": is no argument of " + function.texts.name;
  const std::string meant = name_meant(function, keyword);
  text += meant.empty() ? "." : "; did you mean " + meant + "?";
  text += function.count == 0 ? " Expected no argument" : " Expected one of: ";
  raise(PyExc_TypeError, "%s", (text + names_of(function, 0, function.count)).c_str());
}

void raise_given_twice(const Definition& function, int parameter, const char* how) {
  raise(PyExc_TypeError, "%s: was given to %s %s", function.parameters[parameter].name,
        function.texts.name, how);
}

void raise_missing(const Definition& function, int parameter) {
  raise(PyExc_TypeError, "%s: is missing; %s needs it", function.parameters[parameter].name,
        function.texts.name);
}

void raise_too_many(const Definition& function, PyObject* const* arguments, Py_ssize_t given) {
  const int positional = function.positional;
  std::string text = std::string(function.texts.name) + ": expected at most " +
                     std::to_string(positional) + " arguments by position";
  if (positional > 0) text += " (" + names_of(function, 0, positional) + ")";
  text += ", got " + std::to_string(given);
  if (positional < function.count)
    text += "; by keyword come " + names_of(function, positional, function.count);
  const std::string call = call_with_keyword(function, arguments[positional], positional);
  if (!call.empty()) text += ", as in " + call;
  raise(PyExc_TypeError, "%s", text.c_str());
}

void explain_number(const Definition& function, PyObject* const* arguments, Py_ssize_t given) {
  for (int i = 0; i < given; ++i) {
    const Parameter& parameter = function.parameters[i];
    if (!parameter.default_value.is_valid()) continue;
    const std::string call = call_with_keyword(function, arguments[i], i);
    if (call.empty()) continue;
    raise(PyExc_TypeError, "%s: expected an array, got %s; options come by keyword: %s",
          parameter.name, type_text(arguments[i]).c_str(), call.c_str());
  }
}

}  // namespace rmsnorm::python
