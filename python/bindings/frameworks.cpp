#include "frameworks.hpp"

#include <vector>

#include "foreign.hpp"

namespace rmsnorm::python {
namespace {

// The module if the program has imported it, null otherwise; never imports. PyImport_GetModule
// would wait while another thread imports the module.
nb::object imported(const char* name) {
  const nb::object key = nb::steal(PyUnicode_FromString(name));
  PyObject* module = PyDict_GetItemWithError(PyImport_GetModuleDict(), key.ptr());
  if (module == nullptr) clear_exception();
  return nb::borrow(module);
}

nb::handle as_object(PyTypeObject* type) { return reinterpret_cast<PyObject*>(type); }

// The references that a lookup takes. It may find that something is missing, and be repeated at
// every call: references are given up then, unless keep() was called.
class References {
 public:
  // Null if the module is still being imported by another thread and has not come to this name yet.
  PyObject* attribute(nb::handle object, const char* name) {
    nb::object found =
        nb::steal(object.is_valid() ? PyObject_GetAttrString(object.ptr(), name) : nullptr);
    if (!found.is_valid()) clear_exception();
    taken_.push_back(found);
    return found.ptr();
  }

  // As attribute, and null for what is no type.
  PyTypeObject* type(nb::handle object, const char* name) {
    PyObject* found = attribute(object, name);
    return found != nullptr && PyType_Check(found) ? reinterpret_cast<PyTypeObject*>(found)
                                                   : nullptr;
  }

  // Only one implemented in C, whose getter takes no object of another type than its own.
  Property property(PyTypeObject* type, const char* name) {
    Property found;
    found.descriptor = attribute(as_object(type), name);
    if (found.descriptor != nullptr && Py_TYPE(found.descriptor) == &PyGetSetDescr_Type)
      found.get = reinterpret_cast<descrgetfunc>(
          PyType_GetSlot(Py_TYPE(found.descriptor), Py_tp_descr_get));
    return found;
  }

  void keep() {
    for (nb::object& reference : taken_) reference.release();
    taken_.clear();
  }

 private:
  std::vector<nb::object> taken_;
};

// One type, looked up until it is found.
PyTypeObject* type_once(PyTypeObject*& cached, const char* module, const char* name) {
  if (cached == nullptr) {
    References references;
    cached = references.type(imported(module), name);
    if (cached != nullptr) references.keep();
  }
  return cached;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  References references;
  PyObject* capsule = references.attribute(as_object(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  const void* pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (pointer == nullptr) clear_exception();
  auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->version.major != dlpack::major_version) api = api->previous;
  if (api == nullptr || api->view_from_object == nullptr) return nullptr;
  references.keep();
  return api;
}

// Whether NumPy's structs are those of its binary interface 1 (NumPy 1.x) or 2 (2.x), which agree
// in what is read of them: by the function that every module built against NumPy asks at import,
// PyArray_GetNDArrayCVersion. It stands first in NumPy's table of functions and objects, and the
// type of the arrays that the table is about third.
bool has_known_abi(PyTypeObject* ndarray) {
  nb::object module = imported("numpy._core._multiarray_umath");
  if (!module.is_valid()) module = imported("numpy.core._multiarray_umath");
  References references;
  PyObject* capsule = references.attribute(module, "_ARRAY_API");
  if (capsule == nullptr) return false;
  auto* functions = static_cast<void**>(PyCapsule_GetPointer(capsule, nullptr));
  if (functions == nullptr) clear_exception();
  if (functions == nullptr || functions[2] != ndarray) return false;
  const unsigned version = reinterpret_cast<unsigned (*)()>(functions[0])() >> 24;
  return version == 1 || version == 2;
}

}  // namespace

NumPy found_numpy;
Torch found_torch;
unsigned foreign_lookups = 0;

const NumPy* find_numpy() {
  References references;
  nb::object module = imported("numpy");
  PyObject* empty = references.attribute(module, "empty");
  PyTypeObject* ndarray = references.type(module, "ndarray");
  const Property array_struct = references.property(ndarray, "__array_struct__");
  const Property dtype = references.property(ndarray, "dtype");
  if (empty == nullptr || !array_struct || !dtype) return nullptr;
  found_numpy.has_known_abi = has_known_abi(ndarray);
  found_numpy.empty = empty;
  found_numpy.dtype = dtype;
  found_numpy.array_struct = array_struct;
  found_numpy.ndarray = ndarray;
  references.keep();
  return &found_numpy;
}

const Torch* find_torch() {
  References references;
  nb::object module = imported("torch");
  nb::object nn = imported("torch.nn");
  Torch found;
  PyTypeObject* tensor = references.type(module, "Tensor");
  found.parameter = references.type(nn, "Parameter");
  found.requires_grad = references.property(tensor, "requires_grad");
  found.is_neg = references.attribute(as_object(tensor), "is_neg");
  found.is_grad_enabled = references.attribute(module, "is_grad_enabled");
  found.empty_like = references.attribute(module, "empty_like");
  found.new_empty = references.attribute(as_object(tensor), "new_empty");
  bool complete = found.requires_grad && found.parameter != nullptr &&
                  PyType_IsSubtype(found.parameter, tensor) != 0 && found.is_neg != nullptr &&
                  found.is_grad_enabled != nullptr && found.empty_like != nullptr &&
                  found.new_empty != nullptr;
  for (int t = 0; t < dtype_count; ++t) {
    found.dtypes[t] = references.attribute(module, name(static_cast<DType>(t)));
    complete = complete && found.dtypes[t] != nullptr;
  }
  if (!complete) return nullptr;
  found.tensor = tensor;
  found.exchange = exchange_api(found.tensor);
  nb::object forward_ad = imported("torch.autograd.forward_ad");
  if (forward_ad.is_valid() && find_attribute(forward_ad, "_current_level").is_valid()) {
    found.forward_ad_globals = PyModule_GetDict(forward_ad.ptr());
    if (found.forward_ad_globals == nullptr) throw nb::python_error();
    found.forward_ad = forward_ad.release().ptr();
  }
  nb::object dispatch = imported("torch.utils._python_dispatch");
  if (dispatch.is_valid() && find_attribute(dispatch, "_is_in_torch_dispatch_mode").is_valid())
    found.dispatch_globals = PyModule_GetDict(dispatch.release().ptr());
  // The public functions are Python around these and take 0.4 us more together.
  nb::object c_module = imported("torch._C");
  found.is_tracing = references.attribute(c_module, "_is_tracing");
  if (found.is_tracing == nullptr)
    found.is_tracing = references.attribute(imported("torch.jit"), "is_tracing");
  found.increment_version = references.attribute(c_module, "_increment_version");
  if (found.increment_version == nullptr)
    found.increment_version =
        references.attribute(imported("torch.autograd.graph"), "increment_version");
  references.keep();
  found_torch = found;
  return &found_torch;
}

const CuPy* cupy() {
  static CuPy cached;
  if (cached.ndarray != nullptr) return &cached;
  References references;
  nb::object module = imported("cupy");
  nb::object cuda = imported("cupy.cuda");
  CuPy found;
  found.ndarray = references.type(module, "ndarray");
  found.empty = references.attribute(module, "empty");
  found.device = references.attribute(cuda, "Device");
  found.get_current_stream = references.attribute(cuda, "get_current_stream");
  if (found.ndarray == nullptr || found.empty == nullptr || found.device == nullptr ||
      found.get_current_stream == nullptr)
    return nullptr;
  references.keep();
  cached = found;
  return &cached;
}

const Jax* jax() {
  static Jax cached;
  if (cached.array != nullptr) return &cached;
  References references;
  nb::object module = imported("jax");
  Jax found;
  found.array = as_object(references.type(module, "Array")).ptr();
  found.tracer = as_object(references.type(imported("jax.core"), "Tracer")).ptr();
  found.from_dlpack = references.attribute(imported("jax.dlpack"), "from_dlpack");
  found.config = references.attribute(module, "config");
  if (found.array == nullptr || found.from_dlpack == nullptr || found.config == nullptr)
    return nullptr;
  references.keep();
  cached = found;
  return &cached;
}

PyObject* torch_proxy_mode() {
  static PyObject* cached = nullptr;
  if (cached == nullptr) {
    References references;
    cached = references.attribute(imported("torch.fx.experimental.proxy_tensor"), "get_proxy_mode");
    if (cached != nullptr) references.keep();
  }
  return cached;
}

PyObject* ml_dtypes_bfloat16() {
  static PyTypeObject* cached = nullptr;
  if (cached == nullptr) ++foreign_lookups;
  return as_object(type_once(cached, "ml_dtypes", "bfloat16")).ptr();
}

PyObject* numpy_dtype(DType t) {
  static PyObject* cached[dtype_count] = {};
  PyObject*& dtype = cached[static_cast<int>(t)];
  if (dtype != nullptr) return dtype;
  ++foreign_lookups;
  References references;
  const nb::handle make = references.attribute(imported("numpy"), "dtype");
  PyObject* scalar = t == DType::bf16 ? ml_dtypes_bfloat16() : nullptr;
  if (!make.is_valid() || (t == DType::bf16 && scalar == nullptr)) return nullptr;
  dtype = (scalar != nullptr ? make(nb::handle(scalar)) : make(name(t))).release().ptr();
  return dtype;
}

PyTypeObject* masked_array() {
  static PyTypeObject* cached = nullptr;
  return type_once(cached, "numpy.ma", "MaskedArray");
}

}  // namespace rmsnorm::python
