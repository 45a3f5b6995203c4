// torch tensors by DLPack's C exchange API: 40 ns against 6 us for __dlpack__, which torch
// implements in Python.
#include <string>

#include "array_view.hpp"
#include "errors.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

bool requires_grad(nb::handle source, const Torch& torch) {
  return torch.requires_grad.of(source).ptr() == Py_True &&
         nb::handle(torch.is_grad_enabled)().ptr() == Py_True;
}

// Sparse, nested and meta tensors, and those inside transforms of torch.func. torch's own error is
// kept as the cause.
[[noreturn]] void raise_without_memory(nb::handle source, const char* name) {
  nb::python_error cause;
  const auto text = [&](const char* attribute) {
    return std::string(nb::str(nb::getattr(source, attribute, nb::str("?"))).c_str());
  };
  raise_from(cause, PyExc_TypeError,
             "%s: expected a strided torch tensor with memory of its own, got layout %s, dtype %s, "
             "device %s; inside transforms of torch.func call rmsnorm.torch",
             name, text("layout").c_str(), text("dtype").c_str(), text("device").c_str());
}

// The negative bit marks the lazily negated imaginary part of a complex tensor, and DLPack does not
// carry it. Such a view steps over the real parts, so every stride of it is even: one odd stride
// saves the 70 ns of asking.
void refuse_negative_bit(nb::handle source, const char* name, const ArrayView& view) {
  for (int d = 0; d < view.rank; ++d)
    if (view.sizes[d] > 1 && (view.strides[d] & 1) != 0) return;
  if (source.attr("is_neg")().ptr() == Py_True)
    raise(PyExc_ValueError,
          "%s: has torch's negative bit set (a lazy conjugate); pass %s.resolve_neg()", name, name);
}

}  // namespace

void read_torch(nb::handle source, const char* name, ArrayView& view) {
  const Torch& framework = *torch();
  if (framework.exchange != nullptr) {
    dlpack::TensorView tensor;
    if (framework.exchange->view_from_object(source.ptr(), &tensor) != 0)
      raise_without_memory(source, name);
    read_tensor_view(tensor, source, name, view);
  } else {
    // torch's __dlpack__ refuses whatever requires grad, under no_grad as well.
    read_dlpack(source.attr("detach")(), name, Access::write, view);
    view.source = source;
  }
  view.framework = Framework::torch;
  view.requires_grad = requires_grad(source, framework);
  refuse_negative_bit(source, name, view);
}

}  // namespace rmsnorm::python
