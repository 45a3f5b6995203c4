// torch tensors by DLPack's C exchange API: 40 ns against 6 us for __dlpack__, which torch
// implements in Python.
#include <cstdint>

#include "array_view.hpp"
#include "errors.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

// Sparse, nested and meta tensors, and those inside transforms of torch.func. torch's own error is
// kept as the cause.
[[noreturn]] void raise_without_memory(nb::handle source, const char* name) {
  nb::python_error cause;
  const auto text = [&](const char* attribute) { return str_text(source.attr(attribute)); };
  raise_from(cause, PyExc_TypeError,
             "%s: expected a strided torch tensor with memory of its own, got layout %s, dtype %s, "
             "device %s; inside transforms of torch.func call rmsnorm.torch",
             name, text("layout").c_str(), text("dtype").c_str(), text("device").c_str());
}

// The negative bit marks the lazily negated imaginary part of a complex tensor, and DLPack does not
// carry it. To ask each tensor would add a quarter to a small call. But such a view steps over the
// real parts, so that its strides are even, and it begins behind one, half a complex element off.
// One odd stride at a whole element thus saves asking: as_strided changes the strides, and the
// beginning only where it is given an offset as well.
bool may_be_negated(const ArrayView& view) {
  const auto complex_size = static_cast<std::uintptr_t>(2 * size_in_bytes(view.dtype));
  if (reinterpret_cast<std::uintptr_t>(view.data) % complex_size != 0) return true;
  for (int d = 0; d < view.rank; ++d)
    if (view.sizes[d] > 1 && (view.strides[d] & 1) != 0) return false;
  return true;
}

}  // namespace

void recognise_torch(ArrayView& view) {
  if (torch()->exchange != nullptr) return;
  refuse_negative_bit(view);
  // torch's __dlpack__ refuses whatever requires grad, under no_grad as well.
  read_dlpack(view.source.attr("detach")(), view);
  view.framework = Framework::torch;
}

void read_torch(ArrayView& view) {
  dlpack::TensorView tensor;
  if (torch()->exchange->view_from_object(view.source.ptr(), &tensor) != 0)
    raise_without_memory(view.source, view.name);
  read_tensor_view(tensor, view);
  view.may_be_negated = may_be_negated(view);
}

void refuse_negative_bit(const ArrayView& view) {
  PyObject* arguments[] = {view.source.ptr()};
  const nb::object negative =
      nb::steal(PyObject_Vectorcall(torch()->is_neg, arguments, 1, nullptr));
  if (!negative.is_valid()) throw nb::python_error();
  if (negative.ptr() == Py_True)
    raise(PyExc_ValueError,
          "%s: has torch's negative bit set (a lazy conjugate); pass %s.resolve_neg()", view.name,
          view.name);
}

}  // namespace rmsnorm::python
