#include "wrong_arguments.hpp"

#include <string>

#include "errors.hpp"

namespace rmsnorm::python {
namespace {

// What other libraries call the parameters.
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

// By spelling; empty where nothing is close.
std::string nearest_name(const Definition& function, nb::handle keyword) {
  nb::list names;
  for (int i = 0; i < function.count; ++i) names.append(function.parameters[i].name);
  const nb::object close =
      nb::module_::import_("difflib").attr("get_close_matches")(keyword, names, 1);
  return nb::len(close) == 0 ? std::string() : str_text(nb::object(close[0]));
}

std::string name_meant(const Definition& function, nb::handle keyword) {
  for (const auto& other : other_names)
    if (has(function, other.parameter) &&
        PyUnicode_CompareWithASCIIString(keyword.ptr(), other.name) == 0)
      return other.parameter;
  return nearest_name(function, keyword);
}

bool is_number(nb::handle value) {
  return nb::isinstance(value, nb::module_::import_("numbers").attr("Number"));
}

// "rms_norm(x, weight, eps=1e-05)" for the number at this position; integers are axes. Empty for
// other values and functions.
std::string call_with_keyword(const Definition& function, nb::handle value, int position) {
  if (!is_number(value) || !has(function, "eps")) return {};
  const char* keyword = PyLong_Check(value.ptr()) ? "axis" : "eps";
  return std::string(function.texts.name) + "(" + names_of(function, 0, position) + ", " + keyword +
         "=" + str_text(value) + ")";
}

}  // namespace

void raise_unknown_keyword(const Definition& function, nb::handle keyword) {
  const std::string meant = name_meant(function, keyword);
  const std::string hint = meant.empty() ? "" : "; did you mean " + meant + "?";
  raise(PyExc_TypeError, "%s: is no argument of %s%s Expected %s%s", str_text(keyword).c_str(),
        function.texts.name, meant.empty() ? "." : hint.c_str(),
        function.count == 0 ? "no argument" : "one of: ",
        names_of(function, 0, function.count).c_str());
}

void raise_given_twice(const Definition& function, int parameter) {
  raise(PyExc_TypeError, "%s: was given to %s by position and by keyword",
        function.parameters[parameter].name, function.texts.name);
}

void raise_missing(const Definition& function, int parameter) {
  raise(PyExc_TypeError, "%s: is missing; %s needs it", function.parameters[parameter].name,
        function.texts.name);
}

void raise_too_many(const Definition& function, PyObject* const* arguments, Py_ssize_t given) {
  const int positional = function.positional;
  const std::string call = call_with_keyword(function, arguments[positional], positional);
  const std::string taken = names_of(function, 0, positional);
  const std::string keywords = names_of(function, positional, function.count);
  raise(PyExc_TypeError, "%s: expected at most %d arguments by position%s%s%s, got %d%s%s%s%s",
        function.texts.name, positional, positional > 0 ? " (" : "", taken.c_str(),
        positional > 0 ? ")" : "", static_cast<int>(given),
        keywords.empty() ? "" : "; by keyword come ", keywords.c_str(),
        call.empty() ? "" : ", as in ", call.c_str());
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
