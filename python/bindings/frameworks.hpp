// What the bindings need from NumPy, torch, CuPy, JAX and ml_dtypes: types to recognise and
// functions to call, looked up once. Nothing is imported on the caller's behalf: a framework that
// is not in sys.modules cannot have made any argument, so each lookup returns null until it is.
//
// The references are kept for the life of the process.
#pragma once

#include <nanobind/nanobind.h>

#include <rmsnorm/contract.hpp>

#include "dlpack.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

// A property that a type implements in C, read by its descriptor: 10 to 15 ns less than the lookup
// by name.
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
  Property array_struct;
  Property dtype;
  PyObject* empty = nullptr;
};

struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  Property requires_grad;
  PyObject* is_grad_enabled = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* new_empty = nullptr;  // Tensor's method
  PyObject* dtypes[dtype_count] = {};
  PyObject* forward_ad = nullptr;  // the module; null where it does not tell its depth
  PyObject* is_tracing = nullptr;  // torch.jit's
  // torch.autograd.graph's, of a tuple of tensors, from torch 2.1 on; null before.
  PyObject* increment_version = nullptr;
  // Null in older versions of torch; then tensors are read through __dlpack__.
  const dlpack::ExchangeApi* exchange = nullptr;
};

struct CuPy {
  PyObject* ndarray = nullptr;
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

const NumPy* numpy();
const Torch* torch();
const CuPy* cupy();
const Jax* jax();

// The scalar type of NumPy arrays that hold bfloat16.
PyObject* ml_dtypes_bfloat16();

// The NumPy dtype object for t; null for bfloat16 while ml_dtypes is not imported.
PyObject* numpy_dtype(DType t);

// numpy.ma.MaskedArray, null while numpy.ma is not imported.
PyObject* masked_array();

}  // namespace rmsnorm::python
