#include "results.hpp"

#include <nanobind/ndarray.h>

#include <cstdint>
#include <new>

#include "errors.hpp"
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
  return like.source.attr("new_empty")(
      shape_tuple(sizes, rank),
      nb::arg("dtype") = nb::handle(torch()->dtypes[static_cast<int>(dtype)]));
}

// Fills `view` with memory of ours, to be handed over when it has been written.
void allocate_here(DType dtype, const std::int64_t* sizes, int rank, ArrayView& view) {
  std::int64_t count = 1;
  for (int d = rank - 1; d >= 0; --d) {
    view.sizes[d] = sizes[d];
    view.strides[d] = count;
    count *= sizes[d];
  }
  view.rank = rank;
  view.dtype = dtype;
  view.device = {dlpack::cpu, 0};
  const std::int64_t bytes = count * size_in_bytes(dtype);
  view.data = ::operator new(static_cast<std::size_t>(bytes > 0 ? bytes : 1), xla_alignment);
  view.owner =
      nb::capsule(view.data, [](void* data) noexcept { ::operator delete(data, xla_alignment); });
}

nb::object exported(const ArrayView& view) {
  std::size_t sizes[max_dimensions];
  for (int d = 0; d < view.rank; ++d) sizes[d] = static_cast<std::size_t>(view.sizes[d]);
  const nb::dlpack::dtype dtype = {
      static_cast<std::uint8_t>(view.dtype == DType::bf16 ? dlpack::bfloat : dlpack::floating),
      static_cast<std::uint8_t>(8 * size_in_bytes(view.dtype)), 1};
  return nb::cast(nb::ndarray<nb::array_api>(view.data, static_cast<std::size_t>(view.rank), sizes,
                                             view.owner, view.strides, dtype));
}

// Without its x64 mode JAX turns a float64 array into a float32 one as it takes it over.
void require_jax_dtype(DType dtype) {
  if (dtype == DType::f64 && !nb::cast<bool>(nb::handle(jax()->config).attr("jax_enable_x64")))
    raise(
        PyExc_ValueError,
        "x: the result or its rstd is a float64 JAX array, which takes jax_enable_x64; enable it, "
        "or pass no float64 array and no out_dtype of float64");
}

nb::object array_namespace(const ArrayView& like) {
  nb::object get = nb::getattr(like.source, "__array_namespace__", nb::none());
  nb::object space = get.is_none() ? nb::none() : get();
  if (!nb::hasattr(space, "from_dlpack"))
    raise(PyExc_TypeError,
          "x: %s has no __array_namespace__ with from_dlpack to make the result with; give out=",
          type_text(like.source).c_str());
  return space;
}

// Autograd finds by a tensor's version that a value saved for the backward pass was overwritten,
// and raises instead of returning a wrong gradient.
void count_write(nb::handle tensor) {
  nb::object tensors = nb::make_tuple(tensor);
  PyObject* arguments[] = {tensors.ptr()};
  checked(PyObject_Vectorcall(torch()->increment_version, arguments, 1, nullptr));
}

}  // namespace

void Output::accept(nb::handle out, const char* name) {
  if (out.is_none()) return;
  read_array(out, name, Access::write, view_);
  if (view_.framework == Framework::torch && torch()->increment_version == nullptr)
    raise(PyExc_TypeError, "%s: writing to a torch tensor needs torch 2.1 or later", name);
  array_ = nb::borrow(out);
}

void Output::allocate(const ArrayView& like, DType dtype, const std::int64_t* sizes, int rank) {
  like_ = &like;
  if (like.framework == Framework::numpy) {
    array_ = new_numpy(dtype, sizes, rank);
    return read_numpy(array_, "result", Access::write, view_);
  }
  if (like.framework == Framework::torch) {
    array_ = new_torch(like, dtype, sizes, rank);
    return read_array(array_, "result", Access::write, view_);
  }
  if (like.framework == Framework::jax) require_jax_dtype(dtype);
  if (like.framework == Framework::other) array_namespace(like);
  allocate_here(dtype, sizes, rank, view_);
}

nb::object Output::take() {
  if (like_ == nullptr && view_.framework == Framework::torch) count_write(array_);
  if (array_.is_valid()) return std::move(array_);
  if (like_->framework == Framework::jax) return nb::handle(jax()->from_dlpack)(exported(view_));
  return array_namespace(*like_).attr("from_dlpack")(exported(view_));
}

}  // namespace rmsnorm::python
