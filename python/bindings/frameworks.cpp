#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

// The module if the program has imported it, null otherwise; never imports.
nb::object imported(const char* name) {
  nb::object key = nb::steal(PyUnicode_FromString(name));
  PyObject* module = PyImport_GetModule(key.ptr());
  if (module == nullptr) PyErr_Clear();
  return nb::steal(module);
}

// A new reference, or null if the module is still being imported by another thread and has not come
// to this name yet.
PyObject* attribute(nb::handle object, const char* name) {
  PyObject* found = object.is_valid() ? PyObject_GetAttrString(object.ptr(), name) : nullptr;
  if (found == nullptr) PyErr_Clear();
  return found;
}

Property property(PyObject* type, const char* name) {
  Property found;
  found.descriptor = type != nullptr ? attribute(type, name) : nullptr;
  if (found.descriptor != nullptr)
    found.get =
        reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(found.descriptor), Py_tp_descr_get));
  return found;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  nb::object capsule =
      nb::steal(attribute(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule.is_valid()) return nullptr;
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (pointer == nullptr) PyErr_Clear();
  auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->version.major != dlpack::major_version) api = api->previous;
  return api != nullptr && api->view_from_object != nullptr ? api : nullptr;
}

// Whether NumPy's structs are those of its binary interface 1 (NumPy 1.x) or 2 (2.x), which agree
// in what is read of them: by the function that every module built against NumPy asks at import,
// PyArray_GetNDArrayCVersion.
bool has_known_abi() {
  nb::object module = imported("numpy._core._multiarray_umath");
  if (!module.is_valid()) module = imported("numpy.core._multiarray_umath");
  nb::object capsule = nb::steal(attribute(module, "_ARRAY_API"));
  if (!capsule.is_valid()) return false;
  auto* functions = static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (functions == nullptr) {
    PyErr_Clear();
    return false;
  }
  const unsigned version = reinterpret_cast<unsigned (*)()>(functions[0])() >> 24;
  return version == 1 || version == 2;
}

}  // namespace

NumPy found_numpy;
Torch found_torch;

const NumPy* find_numpy() {
  nb::object module = imported("numpy");
  PyObject* empty = attribute(module, "empty");
  PyObject* ndarray = attribute(module, "ndarray");
  const Property array_struct = property(ndarray, "__array_struct__");
  const Property dtype = property(ndarray, "dtype");
  if (empty == nullptr || !array_struct || !dtype) return nullptr;
  found_numpy.has_known_abi = has_known_abi();
  found_numpy.empty = empty;
  found_numpy.dtype = dtype;
  found_numpy.array_struct = array_struct;
  found_numpy.ndarray = reinterpret_cast<PyTypeObject*>(ndarray);
  return &found_numpy;
}

const Torch* find_torch() {
  nb::object module = imported("torch");
  nb::object nn = imported("torch.nn");
  Torch found;
  PyObject* tensor = attribute(module, "Tensor");
  found.parameter = reinterpret_cast<PyTypeObject*>(attribute(nn, "Parameter"));
  found.requires_grad = property(tensor, "requires_grad");
  found.is_grad_enabled = attribute(module, "is_grad_enabled");
  found.empty_like = attribute(module, "empty_like");
  found.new_empty = attribute(tensor, "new_empty");
  bool complete = found.requires_grad && found.parameter != nullptr &&
                  found.is_grad_enabled != nullptr && found.empty_like != nullptr &&
                  found.new_empty != nullptr;
  for (int t = 0; t < dtype_count; ++t) {
    found.dtypes[t] = attribute(module, name(static_cast<DType>(t)));
    complete = complete && found.dtypes[t] != nullptr;
  }
  if (!complete) return nullptr;
  found.tensor = reinterpret_cast<PyTypeObject*>(tensor);
  found.exchange = exchange_api(found.tensor);
  nb::object forward_ad = imported("torch.autograd.forward_ad");
  if (forward_ad.is_valid() && nb::hasattr(forward_ad, "_current_level")) {
    found.forward_ad_globals = PyModule_GetDict(forward_ad.ptr());
    if (found.forward_ad_globals == nullptr) throw nb::python_error();
    found.forward_ad = forward_ad.release().ptr();
  }
  // The public functions are Python around these and take 0.4 us more together.
  nb::object c_module = imported("torch._C");
  found.is_tracing = attribute(c_module, "_is_tracing");
  if (found.is_tracing == nullptr)
    found.is_tracing = attribute(imported("torch.jit"), "is_tracing");
  found.increment_version = attribute(c_module, "_increment_version");
  if (found.increment_version == nullptr)
    found.increment_version = attribute(imported("torch.autograd.graph"), "increment_version");
  found_torch = found;
  return &found_torch;
}

const CuPy* cupy() {
  static CuPy cached;
  if (cached.ndarray != nullptr) return &cached;
  nb::object module = imported("cupy");
  nb::object cuda = imported("cupy.cuda");
  CuPy found;
  found.ndarray = attribute(module, "ndarray");
  found.empty = attribute(module, "empty");
  found.device = attribute(cuda, "Device");
  found.get_current_stream = attribute(cuda, "get_current_stream");
  if (found.ndarray == nullptr || found.empty == nullptr || found.device == nullptr ||
      found.get_current_stream == nullptr)
    return nullptr;
  cached = found;
  return &cached;
}

const Jax* jax() {
  static Jax cached;
  if (cached.array != nullptr) return &cached;
  nb::object module = imported("jax");
  Jax found;
  found.array = attribute(module, "Array");
  found.tracer = attribute(imported("jax.core"), "Tracer");
  found.from_dlpack = attribute(imported("jax.dlpack"), "from_dlpack");
  found.config = attribute(module, "config");
  if (found.array == nullptr || found.from_dlpack == nullptr || found.config == nullptr)
    return nullptr;
  cached = found;
  return &cached;
}

PyObject* ml_dtypes_bfloat16() {
  static PyObject* cached = nullptr;
  if (cached == nullptr) cached = attribute(imported("ml_dtypes"), "bfloat16");
  return cached;
}

PyObject* numpy_dtype(DType t) {
  static PyObject* cached[dtype_count] = {};
  PyObject*& dtype = cached[static_cast<int>(t)];
  if (dtype != nullptr) return dtype;
  nb::object make = nb::steal(attribute(imported("numpy"), "dtype"));
  PyObject* scalar = t == DType::bf16 ? ml_dtypes_bfloat16() : nullptr;
  if (!make.is_valid() || (t == DType::bf16 && scalar == nullptr)) return nullptr;
  dtype = (scalar != nullptr ? make(nb::handle(scalar)) : make(name(t))).release().ptr();
  return dtype;
}

PyObject* masked_array() {
  static PyObject* cached = nullptr;
  if (cached == nullptr) cached = attribute(imported("numpy.ma"), "MaskedArray");
  return cached;
}

}  // namespace rmsnorm::python
