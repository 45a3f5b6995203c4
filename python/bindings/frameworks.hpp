// What the bindings need from NumPy, torch, CuPy, JAX and ml_dtypes: types to recognise and
// functions to call, looked up once. Nothing is imported on the caller's behalf: a framework that
// is not in sys.modules cannot have made any argument, so each lookup returns null until it is.
// A module of that name may be anybody's stand-in: types must be types, and what reads memory must
// be implemented in C for them.
//
// The references are kept for the life of the process.
#pragma once

#include <nanobind/nanobind.h>

#include <rmsnorm/contract.hpp>

#include "dlpack.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

// Whether an object really is of that type: its own word (__class__, which PyObject_IsInstance
// believes) must not decide what memory is read. False for no type.
inline bool is_of_type(nb::handle object, PyTypeObject* type) {
  return type != nullptr && PyType_IsSubtype(Py_TYPE(object.ptr()), type) != 0;
}

// A property that a type implements in C, read by its descriptor: 10 to 15 ns less than the lookup
// by name, and past what a subclass says in its place. Objects of other types raise TypeError.
struct Property {
  PyObject* descriptor = nullptr;
  descrgetfunc get = nullptr;

  explicit operator bool() const { return get != nullptr; }
  nb::object of(nb::handle object) const {
    PyObject* value =
        get(descriptor, object.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    if (value == nullptr) throw nb::python_error();
    return nb::steal(value);
  }
};

struct NumPy {
  PyTypeObject* ndarray = nullptr;
  bool has_known_abi = false;  // that of numpy_view.cpp's structs
  Property array_struct;
  Property dtype;
  PyObject* empty = nullptr;
};

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  Property requires_grad;
  PyObject* is_neg = nullptr;  // Tensor's method
  PyObject* is_grad_enabled = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* new_empty = nullptr;  // Tensor's method
  PyObject* dtypes[dtype_count] = {};
  PyObject* forward_ad = nullptr;  // the module; null where it does not tell its depth
  PyObject* forward_ad_globals = nullptr;
  // Of torch.utils._python_dispatch; null where it does not tell whether a dispatch mode is
  // entered.
  PyObject* dispatch_globals = nullptr;
  PyObject* is_tracing = nullptr;  // torch.jit's
  // torch.autograd.graph's, of a tuple of tensors, from torch 2.1 on; null before.
  PyObject* increment_version = nullptr;
  // Null in older versions of torch; then tensors are read through __dlpack__.
  const dlpack::ExchangeApi* exchange = nullptr;
};

struct CuPy {
  PyTypeObject* ndarray = nullptr;
  PyObject* empty = nullptr;
  PyObject* device = nullptr;  // the class, whose instances are context managers
  PyObject* get_current_stream = nullptr;
};

struct Jax {
  PyObject* array = nullptr;
  PyObject* tracer = nullptr;  // null where jax.core no longer has it; then __dlpack__ refuses
  PyObject* from_dlpack = nullptr;
  PyObject* config = nullptr;
};

// Every array of a call asks for these two, so that what was found is read in place: 20
// instructions a question less than a call.
extern NumPy found_numpy;
extern Torch found_torch;
const NumPy* find_numpy();
const Torch* find_torch();
inline const NumPy* numpy() { return found_numpy.ndarray != nullptr ? &found_numpy : find_numpy(); }
inline const Torch* torch() { return found_torch.tensor != nullptr ? &found_torch : find_torch(); }

const CuPy* cupy();
const Jax* jax();

// What returns the mode by which torch's make_fx records, or None; null while it is not imported.
PyObject* torch_proxy_mode();

// The scalar type of NumPy arrays that hold bfloat16. The lookup may run code of the module's,
// which foreign_lookups counts: arrays that have been read may have moved since.
PyObject* ml_dtypes_bfloat16();
extern unsigned foreign_lookups;

// The NumPy dtype object for t; null for bfloat16 while ml_dtypes is not imported.
PyObject* numpy_dtype(DType t);

// numpy.ma.MaskedArray, null while numpy.ma is not imported.
PyTypeObject* masked_array();

}  // namespace rmsnorm::python
