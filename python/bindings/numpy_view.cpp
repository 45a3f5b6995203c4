// NumPy arrays, without NumPy at build time. float16, float32 and float64 in native byte order by
// the C structs of NumPy's binary interface
// (https://numpy.org/doc/stable/reference/c-api/types-and-structures.html), in 5 ns; what is
// unusual by __array_struct__ (https://numpy.org/doc/stable/reference/arrays.interface.html), which
// makes and frees two objects in 65 ns, and carries ml_dtypes arrays, which export neither a buffer
// nor DLPack.
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

// PyArray_Descr and PyArrayObject_fields, as far as versions agree on them.
struct Descr {
  PyObject head;
  PyTypeObject* scalar;
  char kind;
  char type;
  char byte_order;
  char former_flags;
  int type_number;
};
struct ArrayFields {
  PyObject head;
  void* data;
  int rank;
  Py_ssize_t* sizes;
  Py_ssize_t* strides;  // in bytes
  PyObject* base;
  const Descr* descr;
  int flags;
};

constexpr char native_byte_order = '=';
constexpr int number_of_float = 11;
constexpr int number_of_double = 12;
constexpr int number_of_half = 23;

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

DType dtype_of_array(const ArrayInterface& array, const ArrayView& view) {
  if ((array.flags & flag_native_byte_order) != 0) {
    if (array.kind == 'f' && array.itemsize == 4) return DType::f32;
    if (array.kind == 'f' && array.itemsize == 8) return DType::f64;
    if (array.itemsize == 2 && is_bfloat16(view.source, array.kind)) return DType::bf16;
    if (array.kind == 'f' && array.itemsize == 2) return DType::f16;
  }
  raise_unsupported_dtype(str_text(numpy()->dtype.of(view.source)), view);
}

// The memory of an array whose dtype is in the view: from either struct.
template <class Array>
void read_strided(const Array& array, ArrayView& view) {
  view.data = array.data;
  if (array.rank > max_dimensions)
    raise(PyExc_ValueError, "%s: has %d dimensions, more than %d", view.name, array.rank,
          max_dimensions);
  const auto itemsize = static_cast<Py_ssize_t>(size_in_bytes(view.dtype));
  const int shift = itemsize == 8 ? 3 : itemsize == 4 ? 2 : 1;
  for (int d = 0; d < array.rank; ++d) {
    if ((array.strides[d] & (itemsize - 1)) != 0 && array.sizes[d] > 1)
      raise(PyExc_ValueError,
            "%s: its stride of %lld bytes is not a multiple of its element size %d (a field of a "
            "packed record?); pass a copy",
            view.name, static_cast<long long>(array.strides[d]), static_cast<int>(itemsize));
    view.sizes[d] = array.sizes[d];
    view.strides[d] = array.strides[d] >> shift;
  }
  view.rank = array.rank;
  if (view.access == Access::write && (array.flags & flag_writeable) == 0)
    raise(PyExc_ValueError, "%s: is read-only; expected an array that can be written", view.name);
}

// False where __array_struct__ must tell. It calls arrays read-only that NumPy lets be written for
// now, with a warning: the negative flags, of what np.broadcast_arrays returns.
bool dtype_of_fields(const ArrayFields& array, DType& dtype) {
  if (array.flags < 0 || array.descr->byte_order != native_byte_order) return false;
  switch (array.descr->type_number) {
    case number_of_float: dtype = DType::f32; return true;
    case number_of_double: dtype = DType::f64; return true;
    case number_of_half: dtype = DType::f16; return true;
    default: return false;
  }
}

}  // namespace

void read_numpy(ArrayView& view) {
  view.device = {dlpack::cpu, 0};
  const auto& fields = *reinterpret_cast<const ArrayFields*>(view.source.ptr());
  if (numpy()->has_known_abi && dtype_of_fields(fields, view.dtype))
    return read_strided(fields, view);

  const nb::object capsule = numpy()->array_struct.of(view.source);
  auto* array = static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (array == nullptr) throw nb::python_error();
  view.dtype = dtype_of_array(*array, view);
  read_strided(*array, view);
}

}  // namespace rmsnorm::python
