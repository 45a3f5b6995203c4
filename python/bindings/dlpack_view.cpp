// Any other array by the DLPack protocol of the Python array API standard.
#include "array_view.hpp"
#include "errors.hpp"
#include "options.hpp"

namespace rmsnorm::python {
namespace {

bool dtype_of_tensor(dlpack::DataType t, DType& dtype) {
  if (t.lanes != 1) return false;
  if (t.code == dlpack::bfloat && t.bits == 16)
    dtype = DType::bf16;
  else if (t.code == dlpack::floating && t.bits == 16)
    dtype = DType::f16;
  else if (t.code == dlpack::floating && t.bits == 32)
    dtype = DType::f32;
  else if (t.code == dlpack::floating && t.bits == 64)
    dtype = DType::f64;
  else
    return false;
  return true;
}

dlpack::Device device_of(nb::handle source, const char* name) {
  if (PyType_Check(source.ptr()) || !nb::hasattr(source, "__dlpack__") ||
      !nb::hasattr(source, "__dlpack_device__"))
    raise(PyExc_TypeError,
          "%s: expected an array (NumPy, torch, JAX or anything with __dlpack__), got %s", name,
          type_text(source).c_str());
  try {
    nb::object device = source.attr("__dlpack_device__")();
    return {read_integer(device[0], name), read_integer(device[1], name)};
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "%s: its __dlpack_device__ failed", name);
  }
}

// The capsule, versioned where the producer knows versions. Producers that predate them raise
// TypeError at the unknown keyword. `keywords` are those of the device.
nb::object export_capsule(nb::handle source, const char* name, const nb::dict& keywords) {
  nb::dict versioned;
  versioned.update(keywords);
  versioned["max_version"] = nb::make_tuple(dlpack::major_version, dlpack::minor_version);
  try {
    return source.attr("__dlpack__")(**versioned);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError))
      raise_from(error, PyExc_TypeError, "%s: its __dlpack__ failed", name);
  }
  try {
    return source.attr("__dlpack__")(**keywords);
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "%s: its __dlpack__ failed", name);
  }
}

const dlpack::TensorView& tensor_in(const nb::object& capsule, const char* name, Access access) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor"))
    return static_cast<const dlpack::ManagedTensor*>(
               PyCapsule_GetPointer(capsule.ptr(), "dltensor"))
        ->tensor;
  if (!PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned"))
    raise(PyExc_TypeError, "%s: its __dlpack__ returned no DLPack capsule", name);
  auto* managed = static_cast<const dlpack::VersionedTensor*>(
      PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
  if (managed->version.major != dlpack::major_version)
    raise(PyExc_TypeError, "%s: exports DLPack %u, expected %u", name,
          static_cast<unsigned>(managed->version.major),
          static_cast<unsigned>(dlpack::major_version));
  if (access == Access::write && (managed->flags & dlpack::flag_read_only) != 0)
    raise(PyExc_ValueError, "%s: is read-only; expected an array that can be written", name);
  if (access == Access::write && (managed->flags & dlpack::flag_is_copied) != 0)
    raise(PyExc_ValueError,
          "%s: its __dlpack__ returned a copy, which would be written in its place", name);
  return managed->tensor;
}

}  // namespace

void read_tensor_view(const dlpack::TensorView& tensor, nb::handle source, const char* name,
                      ArrayView& view) {
  view.source = source;
  view.device = tensor.device;
  if (!dtype_of_tensor(tensor.dtype, view.dtype)) raise_unsupported_dtype(source, name);
  if (tensor.rank > max_dimensions)
    raise(PyExc_ValueError, "%s: has %d dimensions, more than %d", name,
          static_cast<int>(tensor.rank), max_dimensions);
  view.data =
      tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  std::int64_t compact = 1;
  for (int d = tensor.rank - 1; d >= 0; --d) {
    view.sizes[d] = tensor.sizes[d];
    view.strides[d] = tensor.strides != nullptr ? tensor.strides[d] : compact;
    compact *= tensor.sizes[d];
  }
  view.rank = tensor.rank;
}

void read_dlpack(nb::handle source, const char* name, Access access, ArrayView& view) {
  view.source = source;
  view.framework = Framework::other;
  view.device = device_of(source, name);
  if (!view.on_cpu()) {
    view.rank = 0;
    view.pending = view.on_cuda();
    view.access = access;
    return;
  }
  // An unconsumed capsule frees the export when it dies.
  view.owner = export_capsule(source, name, nb::dict());
  read_tensor_view(tensor_in(view.owner, name, access), source, name, view);
}

void read_on_stream(ArrayView& view, const char* name, std::uintptr_t stream) {
  nb::dict keywords;
  // DLPack's number for the legacy default stream, whose handle is 0, is 1.
  keywords["stream"] = nb::int_(stream == 0 ? std::uintptr_t{1} : stream);
  const nb::handle source = view.source;
  view.owner = export_capsule(source, name, keywords);
  read_tensor_view(tensor_in(view.owner, name, view.access), source, name, view);
  view.pending = false;
}

}  // namespace rmsnorm::python
