#include "array_view.hpp"

#include "errors.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

bool is_instance(nb::handle object, PyObject* type) {
  return type != nullptr && PyObject_IsInstance(object.ptr(), type) == 1;
}

// JAX exports arrays on one device alone.
void refuse_several_devices(nb::handle source, const char* name) {
  const std::size_t count = nb::len(nb::object(source.attr("devices")()));
  if (count > 1)
    raise(PyExc_TypeError,
          "%s: is a JAX array on %d devices; expected one on one device. The functions of "
          "rmsnorm.jax take arrays on several",
          name, static_cast<int>(count));
}

void read_jax(nb::handle source, const char* name, Access access, ArrayView& view) {
  if (is_instance(source, jax()->tracer))
    raise(
        PyExc_TypeError,
        "%s: is a traced value, that is, inside jax.jit, grad or vmap; expected a concrete array. "
        "The functions of rmsnorm.jax take traced values",
        name);
  if (access == Access::write)
    raise(PyExc_TypeError,
          "%s: is a JAX array, and those are immutable; expected an array that can be written",
          name);
  try {
    read_dlpack(source, name, access, view);
  } catch (const nb::python_error&) {
    refuse_several_devices(source, name);
    throw;
  }
  view.framework = Framework::jax;
}

// Everything that is not exactly numpy.ndarray, torch.Tensor or torch.nn.Parameter.
void read_uncommon(nb::handle source, const char* name, Access access, ArrayView& view) {
  if (numpy() != nullptr && is_instance(source, reinterpret_cast<PyObject*>(numpy()->ndarray))) {
    if (is_instance(source, masked_array()))
      raise(PyExc_TypeError,
            "%s: is a masked array, whose mask would be ignored; pass its .data or .filled()",
            name);
    return read_numpy(source, name, access, view);
  }
  if (torch() != nullptr && is_instance(source, reinterpret_cast<PyObject*>(torch()->tensor)))
    raise(PyExc_TypeError,
          "%s: expected a plain torch.Tensor or torch.nn.Parameter, got its subclass %s", name,
          type_text(source).c_str());
  if (jax() != nullptr && is_instance(source, jax()->array))
    return read_jax(source, name, access, view);
  read_dlpack(source, name, access, view);
  if (cupy() != nullptr && is_instance(source, cupy()->ndarray)) view.framework = Framework::cupy;
}

}  // namespace

void read_array(nb::handle source, const char* name, Access access, ArrayView& view) {
  const PyTypeObject* type = Py_TYPE(source.ptr());
  if (const NumPy* np = numpy(); np != nullptr && type == np->ndarray)
    return read_numpy(source, name, access, view);
  if (const Torch* t = torch(); t != nullptr && (type == t->tensor || type == t->parameter))
    return read_torch(source, name, view);
  read_uncommon(source, name, access, view);
}

}  // namespace rmsnorm::python
