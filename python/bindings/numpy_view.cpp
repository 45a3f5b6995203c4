// NumPy arrays by __array_struct__ (https://numpy.org/doc/stable/reference/arrays.interface.html):
// documented, needs no NumPy at build time, carries ml_dtypes arrays, which export neither a buffer
// nor DLPack, and costs 30 ns (the buffer protocol: 26 ns, nb::ndarray: 75 ns).
#include "array_view.hpp"
#include "errors.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

struct ArrayInterface {
  int two;
  int rank;
  char kind;
  int itemsize;
  int flags;
  Py_ssize_t* sizes;
  Py_ssize_t* strides;  // in bytes
  void* data;
  PyObject* descr;
};

constexpr int flag_native_byte_order = 0x200;
constexpr int flag_writeable = 0x400;

// ml_dtypes' scalars are NumPy user types, which have kind 'V' like any record. Their dtype is one
// object, unless it was unpickled or given metadata: then its scalar type decides.
bool is_bfloat16(nb::handle source, char kind) {
  if (kind != 'V') return false;
  PyObject* bfloat16 = ml_dtypes_bfloat16();
  if (bfloat16 == nullptr) return false;
  const nb::object dtype = numpy()->dtype.of(source);
  return dtype.ptr() == numpy_dtype(DType::bf16) || dtype.attr("type").is(nb::handle(bfloat16));
}

DType dtype_of_array(const ArrayInterface& array, nb::handle source, const char* name) {
  if ((array.flags & flag_native_byte_order) == 0) raise_unsupported_dtype(source, name);
  if (array.kind == 'f' && array.itemsize == 4) return DType::f32;
  if (array.kind == 'f' && array.itemsize == 8) return DType::f64;
  if (array.itemsize == 2 && is_bfloat16(source, array.kind)) return DType::bf16;
  if (array.kind == 'f' && array.itemsize == 2) return DType::f16;
  raise_unsupported_dtype(source, name);
}

}  // namespace

void read_numpy(nb::handle source, const char* name, Access access, ArrayView& view) {
  nb::object capsule = numpy()->array_struct.of(source);
  auto* array = static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (array == nullptr) throw nb::python_error();

  view.source = source;
  view.framework = Framework::numpy;
  view.device = {dlpack::cpu, 0};
  view.dtype = dtype_of_array(*array, source, name);
  view.data = array->data;
  if (array->rank > max_dimensions)
    raise(PyExc_ValueError, "%s: has %d dimensions, more than %d", name, array->rank,
          max_dimensions);
  const auto itemsize = static_cast<Py_ssize_t>(array->itemsize);
  const int shift = itemsize == 8 ? 3 : itemsize == 4 ? 2 : 1;
  for (int d = 0; d < array->rank; ++d) {
    if ((array->strides[d] & (itemsize - 1)) != 0 && array->sizes[d] > 1)
      raise(PyExc_ValueError,
            "%s: its stride of %lld bytes is not a multiple of its element size %d (a field of a "
            "packed record?); pass a copy",
            name, static_cast<long long>(array->strides[d]), array->itemsize);
    view.sizes[d] = array->sizes[d];
    view.strides[d] = array->strides[d] >> shift;
  }
  view.rank = array->rank;
  if (access == Access::write && (array->flags & flag_writeable) == 0)
    raise(PyExc_ValueError, "%s: is read-only; expected an array that can be written", name);
}

}  // namespace rmsnorm::python
