#include "results.hpp"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cuda_devices.hpp>
#include <memory>
#include <new>
#include <utility>

#include "call.hpp"
#include "errors.hpp"
#include "foreign.hpp"
#include "frameworks.hpp"

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
          "out_dtype: NumPy arrays of bfloat16 are made by ml_dtypes; import ml_dtypes first");
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
  static PyObject* const keywords = PyTuple_Pack(1, PyUnicode_InternFromString("dtype"));
  nb::object shape = shape_tuple(sizes, rank);
  PyObject* arguments[] = {like.source.ptr(), shape.ptr(),
                           torch()->dtypes[static_cast<int>(dtype)]};
  return checked(PyObject_Vectorcall(torch()->new_empty, arguments, 2, keywords));
}

nb::object new_cupy(const ArrayView& like, DType dtype, const std::int64_t* sizes, int rank) {
  PyObject* descr = numpy_dtype(dtype);
  if (descr == nullptr)
    raise(PyExc_ValueError,
          "out_dtype: CuPy arrays of bfloat16 are made by ml_dtypes; import ml_dtypes first");
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
  *data = ::operator new(static_cast<std::size_t>(bytes), xla_alignment);
  return nb::capsule(*data, [](void* p) noexcept { ::operator delete(p, xla_alignment); });
}

struct DeviceMemory {
  void* data;
  int device;
};

// In the stream's order. It is given back in the order of the default stream: the caller's may be
// gone by then.
nb::object device_memory(std::int64_t bytes, const Placement& placement, void** data) {
  auto memory = std::make_unique<DeviceMemory>(DeviceMemory{nullptr, placement.device});
  const int error =
      cuda::memory_allocate_async(&memory->data, static_cast<std::size_t>(bytes),
                                  reinterpret_cast<void*>(placement.stream), placement.device);
  if (error != 0)
    raise(PyExc_MemoryError, "result: allocating %lld bytes on cuda:%d failed: %s",
          static_cast<long long>(bytes), placement.device, cuda_text(error));
  *data = memory->data;
  return nb::capsule(memory.release(), [](void* p) noexcept {
    const std::unique_ptr<DeviceMemory> owned(static_cast<DeviceMemory*>(p));
    cuda::memory_free_async(owned->data, nullptr, owned->device);
  });
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

// Fills `view` with memory of ours, to be handed over when it has been written.
void allocate_here(DType dtype, const Placement& placement, const std::int64_t* sizes, int rank,
                   ArrayView& view) {
  std::copy_n(sizes, rank, view.sizes);
  view.rank = rank;
  view.dtype = dtype;
  set_compact_strides(view);
  const std::int64_t bytes = bytes_of(view);
  if (placement.on_cuda) {
    view.device = {dlpack::cuda, placement.device};
    view.owner = device_memory(bytes, placement, &view.data);
  } else {
    view.device = {dlpack::cpu, 0};
    view.owner = host_memory(bytes, &view.data);
  }
}

// What a consumer's from_dlpack is given for memory on CUDA: it asks for its own stream to wait for
// the one that the result is being written on.
class DeviceExport {
 public:
  DeviceExport(nb::object array, const Placement& placement)
      : array_(std::move(array)), placement_(placement) {}

  nb::object export_to(nb::handle stream, const nb::kwargs& keywords) const {
    // DLPack's numbers: 1 and 2 are default streams by those handles as well; -1 wants no order.
    const long long consumer = stream.is_none() ? 1 : nb::cast<long long>(stream);
    if (consumer != -1) {
      const int error =
          cuda::make_stream_wait(reinterpret_cast<void*>(consumer),
                                 reinterpret_cast<void*>(placement_.stream), placement_.device);
      if (error != 0)
        raise(PyExc_RuntimeError, "result: ordering two streams of cuda:%d failed: %s",
              placement_.device, cuda_text(error));
    }
    return array_.attr("__dlpack__")(**keywords);
  }
  nb::tuple device() const {
    return nb::make_tuple(static_cast<int>(dlpack::cuda), placement_.device);
  }

 private:
  nb::object array_;
  Placement placement_;
};

nb::object exported(const ArrayView& view, const Placement& placement) {
  std::size_t sizes[max_dimensions];
  for (int d = 0; d < view.rank; ++d) sizes[d] = static_cast<std::size_t>(view.sizes[d]);
  const nb::dlpack::dtype dtype = {
      static_cast<std::uint8_t>(view.dtype == DType::bf16 ? dlpack::bfloat : dlpack::floating),
      static_cast<std::uint8_t>(8 * size_in_bytes(view.dtype)), 1};
  nb::object array = nb::cast(
      nb::ndarray<nb::array_api>(view.data, static_cast<std::size_t>(view.rank), sizes, view.owner,
                                 view.strides, dtype, view.device.type, view.device.id));
  return placement.on_cuda ? nb::cast(DeviceExport(std::move(array), placement)) : array;
}

// Without its x64 mode JAX turns a float64 array into a float32 one as it takes it over.
void require_jax_dtype(DType dtype) {
  if (dtype == DType::f64 && !nb::cast<bool>(nb::handle(jax()->config).attr("jax_enable_x64")))
    raise(
        PyExc_ValueError,
        "x: the result or its rstd is a float64 JAX array, which takes jax_enable_x64; enable it, "
        "or pass no float64 array and no out_dtype of float64");
}

// Invalid for objects that have none.
nb::object namespace_of(nb::handle array) {
  try {
    const nb::object get = find_attribute(array, "__array_namespace__");
    return get.is_valid() ? get() : get;
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "x: its __array_namespace__ failed");
  }
}

nb::object array_namespace(const ArrayView& like) {
  const nb::object space = namespace_of(like.source);
  if (!space.is_valid() || !find_attribute(space, "from_dlpack").is_valid())
    raise(PyExc_TypeError,
          "x: %s has no __array_namespace__ with from_dlpack to make the result with; give out=",
          type_text(like.source).c_str());
  return space;
}

}  // namespace

void Output::accept(nb::handle out, const char* name) {
  if (out.is_none()) return;
  read_array(out, name, Access::write, view_);
  if (view_.framework == Framework::torch && torch()->increment_version == nullptr)
    raise(PyExc_TypeError, "%s: writing to a torch tensor needs torch 2.1 or later", name);
  array_ = nb::borrow(out);
}

void Output::adopt(nb::object array) {
  array_ = std::move(array);
  read_array(array_, "result", Access::write, view_);
  if (view_.pending == Pending::memory) read_memory(view_);
  if (view_.pending == Pending::stream) read_on_stream(view_, placement_.stream);
}

void Output::allocate(const Placement& placement, DType dtype, const std::int64_t* sizes,
                      int rank) {
  const ArrayView& like = call_.x;
  allocated_ = true;
  placement_ = placement;
  switch (like.framework) {
    case Framework::numpy: adopt(new_numpy(dtype, sizes, rank)); break;
    case Framework::torch: adopt(new_torch(like, dtype, sizes, rank)); break;
    case Framework::cupy: adopt(new_cupy(like, dtype, sizes, rank)); break;
    case Framework::jax: require_jax_dtype(dtype); break;
    case Framework::other: array_namespace(like); break;
  }
  if (!array_.is_valid()) allocate_here(dtype, placement, sizes, rank, view_);
  require_unmoved(call_);
}

nb::object Output::take() {
  if (array_.is_valid()) return std::move(array_);
  nb::object from_dlpack = call_.x.framework == Framework::jax
                               ? nb::borrow(jax()->from_dlpack)
                               : array_namespace(call_.x).attr("from_dlpack");
  return from_dlpack(exported(view_, placement_));
}

PyObject* Output::written_tensor() const {
  return !allocated_ && view_.framework == Framework::torch ? array_.ptr() : nullptr;
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

void define_device_export(nb::module_& m) {
  nb::class_<DeviceExport>(m, "_DeviceExport")
      .def("__dlpack__", &DeviceExport::export_to, nb::kw_only(),
           nb::arg("stream").none() = nb::none(), nb::arg("keywords"))
      .def("__dlpack_device__", &DeviceExport::device);
}

}  // namespace rmsnorm::python
