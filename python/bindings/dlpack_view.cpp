// Any other array by the DLPack protocol of the Python array API standard. What a producer says is
// checked before it is used; that its memory is as large as it says cannot be.
#include <cstdint>
#include <string>

#include "array_view.hpp"
#include "errors.hpp"
#include "foreign.hpp"
#include "options.hpp"

namespace rmsnorm::python {
namespace {

// ---- what is in a tensor ----

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

// A type code with the number of bits that goes without saying; 0 where it is part of the name.
struct CodeName {
  dlpack::TypeCode code;
  const char* name;
  int bits;
};
constexpr CodeName code_names[] = {
    {dlpack::signed_integer, "int", 0},
    {dlpack::unsigned_integer, "uint", 0},
    {dlpack::floating, "float", 0},
    {dlpack::opaque, "opaque handle", 0},
    {dlpack::bfloat, "bfloat", 0},
    {dlpack::complex, "complex", 0},
    {dlpack::boolean, "bool", 8},
    {dlpack::float8_e3m4, "float8_e3m4", 8},
    {dlpack::float8_e4m3, "float8_e4m3", 8},
    {dlpack::float8_e4m3b11fnuz, "float8_e4m3b11fnuz", 8},
    {dlpack::float8_e4m3fn, "float8_e4m3fn", 8},
    {dlpack::float8_e4m3fnuz, "float8_e4m3fnuz", 8},
    {dlpack::float8_e5m2, "float8_e5m2", 8},
    {dlpack::float8_e5m2fnuz, "float8_e5m2fnuz", 8},
    {dlpack::float8_e8m0fnu, "float8_e8m0fnu", 8},
    {dlpack::float6_e2m3fn, "float6_e2m3fn", 6},
    {dlpack::float6_e3m2fn, "float6_e3m2fn", 6},
    {dlpack::float4_e2m1fn, "float4_e2m1fn", 4},
};

std::string element_text(dlpack::DataType t) {
  const std::string bits = std::to_string(t.bits);
  for (const CodeName& known : code_names) {
    if (known.code != t.code) continue;
    if (known.bits == 0) return known.name + bits;
    return known.bits == t.bits ? known.name : known.name + (" of " + bits + " bits");
  }
  return "DLPack type code " + std::to_string(t.code) + " of " + bits + " bits";
}

// "int32", "float8_e4m3fn", and of vectors "float32x4".
std::string dtype_text(dlpack::DataType t) {
  return t.lanes == 1 ? element_text(t) : element_text(t) + "x" + std::to_string(t.lanes);
}

void* data_of(const dlpack::TensorView& tensor, const char* name) {
  if (tensor.data == nullptr) return nullptr;
  if (tensor.byte_offset > UINTPTR_MAX - reinterpret_cast<std::uintptr_t>(tensor.data))
    raise(PyExc_ValueError, "%s: its DLPack tensor begins %llu bytes behind an address, beyond all",
          name, static_cast<unsigned long long>(tensor.byte_offset));
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

void require_shape(const dlpack::TensorView& tensor, const char* name) {
  if (tensor.rank < 0 || tensor.rank > max_dimensions)
    raise(PyExc_ValueError, "%s: its DLPack tensor has %d dimensions; expected 0 to %d", name,
          static_cast<int>(tensor.rank), max_dimensions);
  if (tensor.rank > 0 && tensor.sizes == nullptr)
    raise(PyExc_ValueError, "%s: its DLPack tensor has %d dimensions and no shape", name,
          static_cast<int>(tensor.rank));
}

[[noreturn]] void raise_negative_size(const ArrayView& view) {
  int d = 0;
  while (view.sizes[d] >= 0) ++d;
  raise(PyExc_ValueError, "%s: its DLPack tensor has the size %lld in dimension %d; expected >= 0",
        view.name, static_cast<long long>(view.sizes[d]), d);
}

// ---- the protocol ----

[[noreturn]] void raise_failed(nb::python_error& error, const char* name, const char* method) {
  raise_from(error, PyExc_TypeError, "%s: its %s failed", name, method);
}

bool has_method(nb::handle source, const char* name, const char* method) {
  try {
    return find_attribute(source, method).is_valid();
  } catch (nb::python_error& error) {
    raise_failed(error, name, method);
  }
}

dlpack::Device read_device(nb::handle pair, const char* name) {
  if (PySequence_Check(pair.ptr()) == 0 || nb::len(pair) != 2)
    raise(PyExc_TypeError, "%s: expected a device type and number, got %s", name,
          repr_text(pair).c_str());
  return {read_integer(pair[0], name), read_integer(pair[1], name)};
}

dlpack::Device device_of(nb::handle source, const char* name) {
  if (PyType_Check(source.ptr()) || !has_method(source, name, "__dlpack__") ||
      !has_method(source, name, "__dlpack_device__"))
    raise(PyExc_TypeError,
          "%s: expected an array (NumPy, torch, JAX or anything with __dlpack__), got %s", name,
          type_text(source).c_str());
  try {
    return read_device(source.attr("__dlpack_device__")(), name);
  } catch (nb::python_error& error) {
    raise_failed(error, name, "__dlpack_device__");
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
    if (!refuses_arguments(error)) raise_failed(error, name, "__dlpack__");
  }
  try {
    return source.attr("__dlpack__")(**keywords);
  } catch (nb::python_error& error) {
    raise_failed(error, name, "__dlpack__");
  }
}

void require_usable(const dlpack::ManagedTensor&, const ArrayView&) {}

void require_usable(const dlpack::VersionedTensor& managed, const ArrayView& view) {
  if (managed.version.major != dlpack::major_version)
    raise(PyExc_TypeError, "%s: exports DLPack %u, expected %u", view.name,
          static_cast<unsigned>(managed.version.major),
          static_cast<unsigned>(dlpack::major_version));
  if (view.access == Access::write && (managed.flags & dlpack::flag_read_only) != 0)
    raise(PyExc_ValueError, "%s: is read-only; expected an array that can be written", view.name);
  if (view.access == Access::write && (managed.flags & dlpack::flag_is_copied) != 0)
    raise(PyExc_ValueError,
          "%s: its __dlpack__ returned a copy, which would be written in its place", view.name);
}

// Takes the tensor out of a capsule, which nobody else can do any more then, and reads it. The
// view's owner calls the deleter.
template <class Managed>
void consume(nb::handle capsule, const char* capsule_name, const char* used_name, ArrayView& view) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), capsule_name));
  if (managed == nullptr) throw nb::python_error();
  require_usable(*managed, view);
  nb::capsule owner(managed, [](void* pointer) noexcept {
    auto* tensor = static_cast<Managed*>(pointer);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  });
  PyCapsule_SetName(capsule.ptr(), used_name);
  view.owner = std::move(owner);
  read_tensor_view(managed->tensor, view);
}

[[noreturn]] void raise_no_tensor(nb::handle capsule, const char* name) {
  if (!PyCapsule_CheckExact(capsule.ptr()))
    raise(PyExc_TypeError, "%s: its __dlpack__ returned %s; expected a DLPack capsule", name,
          type_text(capsule).c_str());
  const char* const capsule_name = PyCapsule_GetName(capsule.ptr());
  raise(PyExc_TypeError,
        "%s: its __dlpack__ returned a capsule named %s; expected 'dltensor' or "
        "'dltensor_versioned', not used before",
        name, bytes_text(capsule_name).c_str());
}

// Reads the export and requires it to be where the producer said that it is.
void read_export(ArrayView& view, nb::handle source, const nb::dict& keywords) {
  const dlpack::Device stated = view.device;
  const bool stated_on_cpu = view.on_cpu();
  const nb::object capsule = export_capsule(source, view.name, keywords);
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0)
    consume<dlpack::VersionedTensor>(capsule, "dltensor_versioned", "used_dltensor_versioned",
                                     view);
  else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0)
    consume<dlpack::ManagedTensor>(capsule, "dltensor", "used_dltensor", view);
  else
    raise_no_tensor(capsule, view.name);
  // Pinned memory is the host's, by either name.
  const bool agree = view.device.type == stated.type && view.device.id == stated.id;
  if (!agree && !(stated_on_cpu && view.on_cpu()))
    raise(PyExc_ValueError, "%s: its __dlpack_device__ says %s and its capsule %s", view.name,
          device_text(stated).c_str(), device_text(view.device).c_str());
}

}  // namespace

void read_tensor_view(const dlpack::TensorView& tensor, ArrayView& view) {
  view.device = tensor.device;
  if (!dtype_of_tensor(tensor.dtype, view.dtype))
    raise_unsupported_dtype(dtype_text(tensor.dtype), view);
  require_shape(tensor, view.name);
  view.data = data_of(tensor, view.name);
  view.rank = tensor.rank;
  std::int64_t signs = 0;
  for (int d = 0; d < view.rank; ++d) signs |= view.sizes[d] = tensor.sizes[d];
  if (signs < 0) raise_negative_size(view);
  if (tensor.strides == nullptr) return set_compact_strides(view);
  for (int d = 0; d < view.rank; ++d) view.strides[d] = tensor.strides[d];
}

void read_dlpack(nb::handle source, ArrayView& view) {
  view.framework = Framework::other;
  view.device = device_of(source, view.name);
  view.rank = 0;
  view.pending = view.on_cuda() ? Pending::stream : Pending::nothing;
  if (view.on_cpu()) read_export(view, source, nb::dict());
}

void read_on_stream(ArrayView& view, std::uintptr_t stream) {
  nb::dict keywords;
  // DLPack's number for the legacy default stream, whose handle is 0, is 1.
  keywords["stream"] = nb::int_(stream == 0 ? std::uintptr_t{1} : stream);
  read_export(view, view.source, keywords);
  view.pending = Pending::nothing;
}

}  // namespace rmsnorm::python
