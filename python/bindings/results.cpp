#include "results.hpp"

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#include "call.hpp"
#include "device_memory.hpp"
#include "errors.hpp"
#include "exported_array.hpp"
#include "frameworks.hpp"
#include "options.hpp"

namespace rmsnorm::python {
namespace {

// JAX takes over CPU memory by DLPack without a copy only where XLA's alignment holds: 64 bytes.
constexpr std::align_val_t xla_alignment{64};

nb::object shape_tuple(const std::int64_t* sizes, int rank) {
  nb::object shape = nb::steal(PyTuple_New(rank));
  if (!shape.is_valid()) throw nb::python_error();
  for (int d = 0; d < rank; ++d) {
    PyObject* size = PyLong_FromLongLong(sizes[d]);
    if (size == nullptr || PyTuple_SetItem(shape.ptr(), d, size) != 0) throw nb::python_error();
  }
  return shape;
}

nb::object checked(PyObject* object) {
  if (object == nullptr) throw nb::python_error();
  return nb::steal(object);
}

nb::object new_numpy(DType dtype, const std::int64_t* sizes, int rank) {
  PyObject* descr = numpy_dtype(dtype);
  if (descr == nullptr)
    raise(PyExc_ValueError,
          "result: its dtype is bfloat16, and NumPy arrays of that are made by ml_dtypes; import "
          "ml_dtypes first");
  nb::object shape = shape_tuple(sizes, rank);
  PyObject* arguments[] = {shape.ptr(), descr};
  return checked(PyObject_Vectorcall(numpy()->empty, arguments, 2, nullptr));
}

bool is_compact_with(const ArrayView& view, const std::int64_t* sizes, int rank) {
  if (view.rank != rank) return false;
  std::int64_t compact = 1;
  for (int d = rank - 1; d >= 0; --d) {
    if (view.sizes[d] != sizes[d] || view.strides[d] != compact) return false;
    compact *= sizes[d];
  }
  return true;
}

// Both ways ask x for the new tensor, so that torch.set_default_device and the like do not apply.
nb::object new_torch(const ArrayView& like, DType dtype, const std::int64_t* sizes, int rank) {
  if (like.dtype == dtype && is_compact_with(like, sizes, rank)) {
    PyObject* arguments[] = {like.source.ptr()};
    return checked(PyObject_Vectorcall(torch()->empty_like, arguments, 1, nullptr));
  }
  // A tuple's allocation may collect garbage, and thereby run code that waits for other threads.
  static PyObject* keywords = nullptr;
  if (keywords == nullptr)
    keywords = checked(PyTuple_Pack(1, PyUnicode_InternFromString("dtype"))).release().ptr();
  nb::object shape = shape_tuple(sizes, rank);
  PyObject* arguments[] = {like.source.ptr(), shape.ptr(),
                           torch()->dtypes[static_cast<int>(dtype)]};
  return checked(PyObject_Vectorcall(torch()->new_empty, arguments, 2, keywords));
}

nb::object new_cupy(const ArrayView& like, DType dtype, const std::int64_t* sizes, int rank) {
  PyObject* descr = numpy_dtype(dtype);
  if (descr == nullptr)
    raise(PyExc_ValueError,
          "result: its dtype is bfloat16, and CuPy arrays of that are made by ml_dtypes; import "
          "ml_dtypes first");
  nb::object device = nb::handle(cupy()->device)(like.device.id);
  device.attr("__enter__")();
  nb::object shape = shape_tuple(sizes, rank);
  PyObject* arguments[] = {shape.ptr(), descr};
  PyObject* array = PyObject_Vectorcall(cupy()->empty, arguments, 2, nullptr);
  if (array == nullptr) {
    nb::python_error error;
    device.attr("__exit__")(nb::none(), nb::none(), nb::none());
    throw error;
  }
  nb::object result = nb::steal(array);
  device.attr("__exit__")(nb::none(), nb::none(), nb::none());
  return result;
}

nb::object host_memory(std::int64_t bytes, void** data) {
  *data = ::operator new(static_cast<std::size_t>(bytes), xla_alignment, std::nothrow);
  if (*data == nullptr)
    raise(PyExc_MemoryError, "result: allocating %lld bytes failed", static_cast<long long>(bytes));
  return nb::capsule(*data, [](void* p) noexcept { ::operator delete(p, xla_alignment); });
}

// At least one. An array whose elements are repeated may claim more of them than any memory has.
std::int64_t bytes_of(const ArrayView& view) {
  if (std::count(view.sizes, view.sizes + view.rank, 0) > 0) return 1;
  std::int64_t bytes = size_in_bytes(view.dtype);
  for (int d = 0; d < view.rank; ++d) {
    if (view.sizes[d] > INT64_MAX / bytes)
      raise(PyExc_MemoryError, "result: its bytes are more than 64 bits count");
    bytes *= view.sizes[d];
  }
  return bytes;
}

// JAX may divide a CPU into several devices. It exports the arrays of each as those of DLPack's
// device 0 and takes arrays by the number of the device, which is asked of the array therefore.
std::int32_t jax_cpu(nb::handle array) {
  try {
    const nb::object devices = array.attr("devices")();
    const nb::object device = nb::module_::import_("builtins").attr("next")(nb::iter(devices));
    if (!nb::cast<bool>(device.attr("platform").equal(nb::str("cpu")))) return 0;
    return read_integer(device.attr("local_hardware_id"), "x");
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "x: its devices() failed");
  }
}

// Fills `view` with memory of ours, to be handed over when it has been written.
void allocate_here(const ArrayView& like, DType dtype, const Placement& placement,
                   const std::int64_t* sizes, int rank, ArrayView& view) {
  std::copy_n(sizes, rank, view.sizes);
  view.rank = rank;
  view.dtype = dtype;
  set_compact_strides(view);
  const std::int64_t bytes = bytes_of(view);
  if (placement.on_cuda) {
    view.device = {dlpack::cuda, placement.device};
    view.owner = new_device_memory(bytes, placement);
    view.data = device_memory_in(view.owner).data();
  } else {
    view.device = {dlpack::cpu, like.framework == Framework::jax ? jax_cpu(like.source) : 0};
    view.owner = host_memory(bytes, &view.data);
  }
}

bool jax_has_x64() {
  try {
    const nb::object enabled = nb::handle(jax()->config).attr("jax_enable_x64");
    const int truth = PyObject_IsTrue(enabled.ptr());
    if (truth < 0) throw nb::python_error();
    return truth == 1;
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_RuntimeError, "x: asking JAX for its jax_enable_x64 failed");
  }
}

// Without its x64 mode JAX turns a float64 array into a float32 one as it takes it over.
void require_jax_dtype(DType dtype) {
  if (dtype == DType::f64 && !jax_has_x64())
    raise(
        PyExc_ValueError,
        "x: the result or its rstd is a float64 JAX array, which takes jax_enable_x64; enable it, "
        "or pass no float64 array and no out_dtype of float64");
}

// Whether the elements follow each other in row-major order.
bool is_dense(const ArrayView& view) {
  if (std::count(view.sizes, view.sizes + view.rank, 0) > 0) return true;
  std::int64_t stride = 1;
  for (int d = view.rank - 1; d >= 0; --d) {
    if (view.sizes[d] != 1 && view.strides[d] != stride) return false;
    stride *= view.sizes[d];
  }
  return true;
}

// Whether an argument begins where a new array does, whose library or what its user put in between
// then gave it memory that is taken.
bool is_shared(const Call& call, const ArrayView& result) {
  bool shared = false;
  const std::int64_t* sizes = result.sizes;
  if (std::count(sizes, sizes + result.rank, 0) > 0) return false;
  call.for_each_array([&](Argument, const ArrayView& view) {
    shared = shared || (&view != &result && view.present() && view.data == result.data);
  });
  return shared;
}

}  // namespace

void Output::accept(nb::handle out, const char* name) {
  if (out.is_none()) return;
  read_array(out, name, Access::write, view_);
  if (view_.framework == Framework::torch && torch()->increment_version == nullptr)
    raise(PyExc_TypeError, "%s: writing to a torch tensor needs torch 2.1 or later", name);
  array_ = nb::borrow(out);
}

void Output::adopt(nb::object array, DType dtype, const std::int64_t* sizes, int rank) {
  array_ = std::move(array);
  read_array(array_, "result", Access::write, view_);
  if (view_.pending == Pending::memory && read_memory(view_)) refuse_negative_bit(view_);
  if (view_.pending == Pending::stream) read_on_stream(view_, placement_.stream);
  const bool in_place =
      placement_.on_cuda ? view_.on_cuda() && view_.device.id == placement_.device : view_.on_cpu();
  if (!in_place || view_.framework != call_.x.framework || view_.dtype != dtype ||
      view_.rank != rank || !std::equal(sizes, sizes + rank, view_.sizes) || !is_dense(view_) ||
      is_shared(call_, view_))
    raise(PyExc_RuntimeError,
          "result: new memory was asked of x's library, which gave %s in place of a compact array "
          "of dtype %s and the shape wanted, on x's device and apart from the arguments",
          type_text(array_).c_str(), name(dtype));
}

void Output::allocate(const Placement& placement, DType dtype, const std::int64_t* sizes,
                      int rank) {
  const ArrayView& like = call_.x;
  allocated_ = true;
  placement_ = placement;
  switch (like.framework) {
    case Framework::numpy: adopt(new_numpy(dtype, sizes, rank), dtype, sizes, rank); break;
    case Framework::torch: adopt(new_torch(like, dtype, sizes, rank), dtype, sizes, rank); break;
    case Framework::cupy: adopt(new_cupy(like, dtype, sizes, rank), dtype, sizes, rank); break;
    case Framework::jax:
      require_jax_dtype(dtype);
      importer_ = nb::borrow(jax()->from_dlpack);
      break;
    case Framework::other: importer_ = importer_of(like.source); break;
  }
  if (!array_.is_valid()) allocate_here(like, dtype, placement, sizes, rank, view_);
  require_unmoved(call_);
}

nb::object Output::take() {
  if (array_.is_valid()) return std::move(array_);
  return imported_array(importer_, export_array(view_, placement_));
}

void Output::try_import() const { imported_array(importer_, export_unwritten(view_)); }

PyObject* Output::written_tensor() const {
  return !allocated_ && view_.framework == Framework::torch ? array_.ptr() : nullptr;
}

void try_imports(const Call& call, std::initializer_list<const Output*> outputs) {
  bool writes_to_caller = false, imports = false;
  for (const Output* output : outputs) {
    writes_to_caller = writes_to_caller || output->accepted();
    imports = imports || output->is_imported();
  }
  if (!writes_to_caller || !imports) return;
  for (const Output* output : outputs)
    if (output->is_imported()) output->try_import();
  require_unmoved(call);
}

void count_writes(std::initializer_list<const Output*> outputs) {
  Py_ssize_t count = 0;
  for (const Output* output : outputs) count += output->written_tensor() != nullptr;
  if (count == 0) return;
  const nb::object tensors = checked(PyTuple_New(count));
  count = 0;
  for (const Output* output : outputs)
    if (PyObject* tensor = output->written_tensor(); tensor != nullptr)
      PyTuple_SetItem(tensors.ptr(), count++, Py_NewRef(tensor));
  PyObject* arguments[] = {tensors.ptr()};
  checked(PyObject_Vectorcall(torch()->increment_version, arguments, 1, nullptr));
}

}  // namespace rmsnorm::python
