#include "autograd.hpp"

#include <utility>

#include "errors.hpp"
#include "foreign.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

nb::object answer(PyObject* function) {
  nb::object result = nb::steal(PyObject_Vectorcall(function, nullptr, 0, nullptr));
  if (!result.is_valid()) throw nb::python_error();
  return result;
}

// A variable of a module of torch's, by its globals: an attribute costs 20 ns more. Null where
// there is none.
PyObject* global(PyObject* globals, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(globals, name);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw nb::python_error();
  return value;
}

// make_fx, and what is built on it, records by a dispatch mode. That any mode is entered costs less
// to ask than which.
bool is_recorded_by_make_fx() {
  static PyObject* const flag = PyUnicode_InternFromString("_is_in_torch_dispatch_mode");
  if (torch()->dispatch_globals == nullptr) return false;
  if (global(torch()->dispatch_globals, flag) == Py_False) return false;
  PyObject* proxy_mode = torch_proxy_mode();
  return proxy_mode != nullptr && !answer(proxy_mode).is_none();
}

// A recorder of torch's operators would record the allocation of the result and not what is written
// to it.
void refuse_tracing() {
  const char* recorder = nullptr;
  if (torch()->is_tracing != nullptr && answer(torch()->is_tracing).ptr() == Py_True)
    recorder = "torch.jit.trace";
  else if (is_recorded_by_make_fx())
    recorder = "make_fx";
  if (recorder != nullptr)
    raise(PyExc_RuntimeError,
          "x: %s cannot record this call, which is no torch operator; those are in rmsnorm.torch",
          recorder);
}

// Forward-mode tangents of torch live only inside torch.autograd.forward_ad.dual_level(). Whether
// there is one is asked once for all arrays of a call.
bool tangents_exist() {
  static PyObject* const current_level = PyUnicode_InternFromString("_current_level");
  if (torch()->forward_ad == nullptr) return false;
  PyObject* level = global(torch()->forward_ad_globals, current_level);
  const bool exist = level == nullptr || PyLong_AsLong(level) >= 0;
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return exist;
}

// A function of torch's that has no public name; null where this torch has none.
nb::object function_of_torch(const char* module, const char* name) {
  return find_attribute(nb::module_::import_(module), name);
}

// Whether a tensor stands for another one, whose derivatives a transform of torch.func or
// functionalization follows.
bool is_wrapped(nb::handle tensor) {
  for (const auto& [module, name] :
       {std::pair("torch._C._functorch", "is_functorch_wrapped_tensor"),
        std::pair("torch", "_is_functional_tensor")}) {
    const nb::object ask = function_of_torch(module, name);
    if (ask.is_valid() && ask(tensor).is(nb::bool_(true))) return true;
  }
  return false;
}

bool shows_tangent(nb::handle tensor) {
  const nb::object dual = nb::handle(torch()->forward_ad).attr("unpack_dual")(tensor);
  return !nb::getattr(dual, "tangent").is_none();
}

// In forward mode.
bool has_tangent(nb::handle tensor) {
  if (shows_tangent(tensor)) return true;
  // Transforms of torch.func hide the tangents of tensors that come from outside of them.
  const nb::object without_transforms =
      function_of_torch("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack");
  if (!without_transforms.is_valid() || is_wrapped(tensor)) return false;
  const nb::object context = without_transforms();
  context.attr("__enter__")();
  const auto leave = [&] { context.attr("__exit__")(nb::none(), nb::none(), nb::none()); };
  bool shown = false;
  try {
    shown = shows_tangent(tensor);
  } catch (nb::python_error&) {
    leave();
    throw;
  }
  leave();
  return shown;
}

bool requires_grad(nb::handle tensor) {
  return torch()->requires_grad.of(tensor).ptr() == Py_True &&
         nb::handle(torch()->is_grad_enabled)().ptr() == Py_True;
}

void refuse_lost_tangent(nb::handle source, const char* name) {
  if (!has_tangent(source)) return;
  raise(PyExc_RuntimeError,
        "%s: carries a forward-mode tangent, which would be lost; pass the primal, or call "
        "rmsnorm.torch, whose operators have tangents",
        name);
}

bool is_torch(const ArrayView& view) {
  return view.present() && view.framework == Framework::torch;
}

// The module whose functions take a call to the operators; kept for the life of the process.
// Two threads may import it at once: a static that the import initialises would let one wait for
// the other without giving up the GIL, which the import needs.
nb::handle operators() {
  static PyObject* module = nullptr;
  if (module == nullptr) {
    nb::object imported = nb::module_::import_("rmsnorm.torch.dispatch");
    module = imported.release().ptr();
  }
  return module;
}

nb::handle or_none(const ArrayView& view) {
  return view.present() ? view.source : nb::handle(Py_None);
}

}  // namespace

void read_requires_grad(Call& call) {
  call.for_each_array([](Argument, ArrayView& view) {
    if (is_torch(view)) view.requires_grad = requires_grad(view.source);
  });
}

bool is_differentiable(const Call& call, nb::handle stream) {
  const bool requires_grad = call.x.requires_grad || call.residual.requires_grad ||
                             call.weight.requires_grad || call.bias.requires_grad;
  if (!requires_grad || !stream.is_none() || call.y.present() || call.residual_out.present())
    return false;
  for (const ArrayView* view : {&call.x, &call.residual, &call.weight, &call.bias})
    if (view->present() && !is_torch(*view)) return false;
  return true;
}

nb::object differentiable_rms_norm(Call& call, nb::handle rounding, std::optional<DType> out_dtype,
                                   bool with_rstd) {
  const nb::handle dtype =
      out_dtype ? nb::handle(torch()->dtypes[static_cast<int>(*out_dtype)]) : nb::handle(Py_None);
  return operators().attr("rms_norm")(with_rstd, call.x.source, or_none(call.weight),
                                      or_none(call.bias), call.eps, call.first_axis() - call.x.rank,
                                      call.weight_offset, rounding, call.partial, dtype);
}

nb::object differentiable_add_rms_norm(Call& call, nb::handle rounding, bool with_rstd) {
  return operators().attr("add_rms_norm")(
      with_rstd, call.x.source, call.residual.source, or_none(call.weight), or_none(call.bias),
      call.eps, call.first_axis() - call.x.rank, call.weight_offset, rounding, call.round_residual);
}

void require_no_derivatives(const Call& call) {
  bool from_torch = false;
  call.for_each_array([&](Argument, const ArrayView& view) {
    if (!is_torch(view)) return;
    from_torch = true;
    if (!view.requires_grad) return;
    const char* name = view.name;
    raise(PyExc_RuntimeError,
          "%s: requires grad, and its gradient would be lost: calls with out, residual_out, stream "
          "or arrays of other frameworks are not differentiated, and only rms_norm and "
          "add_rms_norm are; call under torch.no_grad(), or pass %s.detach()",
          name, name);
  });
  if (!from_torch) return;
  refuse_tracing();
  if (!tangents_exist()) return;
  call.for_each_array([](Argument, const ArrayView& view) {
    if (is_torch(view)) refuse_lost_tangent(view.source, view.name);
  });
}

void refuse_lost_derivative(nb::handle option, const char* name) {
  if (torch() == nullptr || !is_of_type(option, torch()->tensor)) return;
  const char* derivative = nullptr;
  if (is_wrapped(option))
    derivative = "that a transform follows, whose derivatives";
  else if (requires_grad(option))
    derivative = "that requires grad, and its gradient";
  else if (tangents_exist() && has_tangent(option))
    derivative = "with a forward-mode tangent, which";
  if (derivative != nullptr)
    raise(PyExc_TypeError, "%s: expected a number, got a tensor %s would be lost; pass %s.item()",
          name, derivative, name);
}

}  // namespace rmsnorm::python
