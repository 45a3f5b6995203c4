#include "array_view.hpp"

#include <algorithm>

#include "errors.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

// Whether an object says that it is of that type, which may be anything with an __instancecheck__.
// It decides on words and on the framework of results, never on what memory is read.
bool claims_to_be(const ArrayView& view, PyObject* type) {
  if (type == nullptr) return false;
  const int is = PyObject_IsInstance(view.source.ptr(), type);
  if (is >= 0) return is == 1;
  nb::python_error cause;
  raise_from(cause, PyExc_TypeError, "%s: expected an array, got %s, whose class cannot be told",
             view.name, type_text(view.source).c_str());
}

void recognise(ArrayView& view, Framework framework) {
  view.framework = framework;
  view.rank = 0;
  view.pending = Pending::memory;
}

// JAX exports arrays on one device alone. What only says that it is one of JAX's may have no
// devices.
void refuse_several_devices(const ArrayView& view) {
  std::size_t count = 1;
  try {
    count = nb::len(nb::object(view.source.attr("devices")()));
  } catch (const nb::python_error& error) {
    if (!error.matches(PyExc_Exception)) throw;
  }
  if (count > 1)
    raise(PyExc_TypeError,
          "%s: is a JAX array on %d devices; expected one on one device. The functions of "
          "rmsnorm.jax take arrays on several",
          view.name, static_cast<int>(count));
}

void read_jax(ArrayView& view) {
  if (claims_to_be(view, jax()->tracer))
    raise(
        PyExc_TypeError,
        "%s: is a traced value, that is, inside jax.jit, grad or vmap; expected a concrete array. "
        "The functions of rmsnorm.jax take traced values",
        view.name);
  if (view.access == Access::write)
    raise(PyExc_TypeError,
          "%s: is a JAX array, and those are immutable; expected an array that can be written",
          view.name);
  try {
    read_dlpack(view.source, view);
  } catch (const nb::python_error& error) {
    if (error.matches(PyExc_Exception)) refuse_several_devices(view);
    throw;
  }
  view.framework = Framework::jax;
}

// Everything that is not exactly numpy.ndarray, torch.Tensor or torch.nn.Parameter.
void read_uncommon(ArrayView& view) {
  if (numpy() != nullptr && is_of_type(view.source, numpy()->ndarray)) {
    if (is_of_type(view.source, masked_array()))
      raise(PyExc_TypeError,
            "%s: is a masked array, whose mask would be ignored; pass its .data or .filled()",
            view.name);
    return recognise(view, Framework::numpy);
  }
  if (torch() != nullptr && is_of_type(view.source, torch()->tensor))
    raise(PyExc_TypeError,
          "%s: expected a plain torch.Tensor or torch.nn.Parameter, got its subclass %s", view.name,
          type_text(view.source).c_str());
  if (jax() != nullptr && claims_to_be(view, jax()->array)) return read_jax(view);
  read_dlpack(view.source, view);
  if (cupy() != nullptr && is_of_type(view.source, cupy()->ndarray))
    view.framework = Framework::cupy;
}

void read_native(ArrayView& view) {
  view.framework == Framework::numpy ? read_numpy(view) : read_torch(view);
}

bool is_native(const ArrayView& view) {
  return view.source.is_valid() && !view.owner.is_valid() &&
         (view.framework == Framework::numpy || view.framework == Framework::torch);
}

bool is_same_memory(const ArrayView& a, const ArrayView& b) {
  return a.data == b.data && a.dtype == b.dtype &&
         std::equal(a.sizes, a.sizes + a.rank, b.sizes, b.sizes + b.rank) &&
         std::equal(a.strides, a.strides + a.rank, b.strides);
}

}  // namespace

void read_array(nb::handle source, const char* name, Access access, ArrayView& view) {
  view.source = source;
  view.name = name;
  view.access = access;
  const PyTypeObject* type = Py_TYPE(source.ptr());
  if (const NumPy* np = numpy(); np != nullptr && type == np->ndarray)
    return recognise(view, Framework::numpy);
  if (const Torch* t = torch(); t != nullptr && (type == t->tensor || type == t->parameter)) {
    recognise(view, Framework::torch);
    return recognise_torch(view);
  }
  read_uncommon(view);
}

bool read_memory(ArrayView& view) {
  view.pending = Pending::nothing;
  read_native(view);
  return view.may_be_negated;
}

void require_unmoved(const ArrayView& view) {
  if (!is_native(view)) return;
  ArrayView now(view.accepted_dtypes);
  now.source = view.source;
  now.name = view.name;
  now.access = view.access;
  now.framework = view.framework;
  read_native(now);
  if (!is_same_memory(view, now))
    raise(PyExc_ValueError, "%s: its memory, shape or dtype changed while the call was prepared",
          view.name);
}

void set_compact_strides(ArrayView& view) {
  std::uint64_t stride = 1;
  for (int d = view.rank - 1; d >= 0; --d) {
    view.strides[d] = static_cast<std::int64_t>(stride);
    stride *= static_cast<std::uint64_t>(view.sizes[d]);
  }
}

}  // namespace rmsnorm::python
