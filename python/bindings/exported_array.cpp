#include "exported_array.hpp"

#include <nanobind/ndarray.h>

#include <cstdint>
#include <utility>

#include "device_memory.hpp"
#include "docstrings.hpp"
#include "errors.hpp"
#include "foreign.hpp"

namespace rmsnorm::python {
namespace {

class ExportedArray {
 public:
  // `memory`, which view.owner keeps alive, is that of an array on CUDA, else null.
  ExportedArray(const ArrayView& view, const DeviceMemory* memory)
      : dtype_(view.dtype), memory_(memory) {
    std::size_t sizes[max_dimensions];
    nb::list shape;
    for (int d = 0; d < view.rank; ++d) {
      sizes[d] = static_cast<std::size_t>(view.sizes[d]);
      shape.append(view.sizes[d]);
    }
    shape_ = nb::tuple(shape);
    const nb::dlpack::dtype dtype = {
        static_cast<std::uint8_t>(view.dtype == DType::bf16 ? dlpack::bfloat : dlpack::floating),
        static_cast<std::uint8_t>(8 * size_in_bytes(view.dtype)), 1};
    array_ = nb::cast(nb::ndarray<nb::array_api>(view.data, static_cast<std::size_t>(view.rank),
                                                 sizes, view.owner, view.strides, dtype,
                                                 view.device.type, view.device.id));
  }

  // On CUDA a consumer asks for its own stream to wait for the result.
  nb::object export_to(nb::handle stream, const nb::kwargs& keywords) const {
    if (memory_ != nullptr) make_wait(stream);
    return array_.attr("__dlpack__")(**keywords);
  }

  nb::object device() const { return array_.attr("__dlpack_device__")(); }
  nb::object shape() const { return shape_; }
  const char* dtype() const { return name(dtype_); }

  nb::object repr() const {
    return nb::str("rmsnorm.ExportedArray(shape={}, dtype={}, device={})")
        .attr("format")(shape_, dtype(), device());
  }

 private:
  void make_wait(nb::handle stream) const {
    // DLPack's numbers: 1 and 2 are default streams by those handles as well; -1 wants no order.
    const long long consumer = stream.is_none() ? 1 : nb::cast<long long>(stream);
    if (consumer < -1)
      raise(PyExc_ValueError, "stream: expected the number of a CUDA stream, None or -1, got %lld",
            consumer);
    if (consumer != -1) memory_->make_wait(static_cast<std::uintptr_t>(consumer));
  }

  nb::object array_;
  nb::object shape_;
  DType dtype_;
  const DeviceMemory* memory_;
};

// Returns null where the object has no from_dlpack that can be called.
nb::object from_dlpack_of(nb::handle object) {
  nb::object found = find_attribute(object, "from_dlpack");
  return found.is_valid() && PyCallable_Check(found.ptr()) != 0 ? found : nb::object();
}

// "a" of "a.b.c".
nb::object top_package(nb::handle module) { return module.attr("partition")(".")[0]; }

// The same text as a string of Python's own, whose methods are known: a class of the user's may
// derive from it. None of what is longer than any module's name.
nb::object plain_string(nb::object string) {
  constexpr Py_ssize_t longest_name = 1000;
  if (string.is_none() || PyUnicode_GetLength(string.ptr()) > longest_name) return nb::none();
  PyObject* plain = PyUnicode_FromObject(string.ptr());
  if (plain == nullptr) throw nb::python_error();
  return nb::steal(plain);
}

// The module that defines the type, and the packages around it. A function that one of them has
// from elsewhere makes other arrays.
nb::object from_dlpack_of_package(nb::handle type) {
  const nb::object modules = nb::module_::import_("sys").attr("modules");
  nb::object module = plain_string(string_attribute(type, "__module__"));
  while (!module.is_none() && nb::len(module) > 0) {
    nb::object found = from_dlpack_of(modules.attr("get")(module));
    const nb::object origin = found.is_valid() ? string_attribute(found, "__module__") : nb::none();
    if (!origin.is_none() && top_package(origin).equal(top_package(module))) return found;
    module = module.attr("rpartition")(".")[0];
  }
  return nb::object();
}

// Null for objects that have none.
nb::object from_dlpack_of_namespace(nb::handle source) {
  try {
    const nb::object get_namespace = find_attribute(source, "__array_namespace__");
    return get_namespace.is_valid() ? from_dlpack_of(get_namespace()) : nb::object();
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "x: its __array_namespace__ failed");
  }
}

nb::object import_by(nb::handle importer, nb::handle exported) {
  try {
    return importer(exported);
  } catch (nb::python_error& error) {
    if (!refuses_arguments(error)) throw;
  }
  // Functions from before the protocol take the capsule.
  return importer(exported.attr("__dlpack__")());
}

}  // namespace

nb::object export_array(const ArrayView& view, const Placement& placement) {
  if (!placement.on_cuda) return export_unwritten(view);
  DeviceMemory& memory = device_memory_in(view.owner);
  memory.written();
  return nb::cast(ExportedArray(view, &memory));
}

nb::object export_unwritten(const ArrayView& view) {
  return nb::cast(ExportedArray(view, nullptr));
}

nb::object importer_of(nb::handle source) {
  nb::object in_namespace = from_dlpack_of_namespace(source);
  if (in_namespace.is_valid()) return in_namespace;
  const nb::handle type = source.type();
  try {
    nb::object found = from_dlpack_of(type);
    if (!found.is_valid()) found = from_dlpack_of_package(type);
    return found.is_valid() ? found : nb::none();
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "x: looking for the from_dlpack of its library failed");
  }
}

nb::object imported_array(nb::handle importer, nb::object exported) {
  if (importer.is_none()) return exported;
  try {
    return import_by(importer, exported);
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_RuntimeError, "result: the from_dlpack of x's library failed for %s",
               str_text(exported).c_str());
  }
}

void define_exported_array(nb::module_& m) {
  // The module may be imported anew in a process, which knows the class then.
  if (const nb::handle known = nb::type<ExportedArray>(); known.is_valid()) {
    m.attr("ExportedArray") = known;
    return;
  }
  nb::class_<ExportedArray>(m, "ExportedArray", doc::exported_array)
      .def("__dlpack__", &ExportedArray::export_to, nb::kw_only(),
           nb::arg("stream").none() = nb::none(), nb::arg("keywords"),
           nb::sig("def __dlpack__(self, *, stream: Any = None, **keywords: Any) -> Any"),
           "A DLPack capsule of the memory, of the version that max_version asks for.")
      .def("__dlpack_device__", &ExportedArray::device,
           nb::sig("def __dlpack_device__(self) -> tuple[int, int]"),
           "DLPack's device type and number.")
      .def_prop_ro("shape", &ExportedArray::shape, nb::sig("def shape(self) -> tuple[int, ...]"),
                   "The sizes of the dimensions.")
      .def_prop_ro("dtype", &ExportedArray::dtype, nb::sig("def dtype(self) -> str"),
                   "The dtype's name: float16, bfloat16, float32 or float64.")
      .def("__repr__", &ExportedArray::repr, nb::sig("def __repr__(self) -> str"));
}

}  // namespace rmsnorm::python
