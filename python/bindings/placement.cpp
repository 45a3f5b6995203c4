#include "placement.hpp"

#include <cuda_devices.hpp>

#include "call.hpp"
#include "errors.hpp"
#include "foreign.hpp"
#include "frameworks.hpp"

namespace rmsnorm::python {
namespace {

std::uintptr_t handle_of_integer(nb::handle integer) {
  const unsigned long long handle = PyLong_AsUnsignedLongLong(integer.ptr());
  if (handle == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
    nb::python_error cause;
    raise_from(cause, PyExc_ValueError,
               "stream: expected the handle of a CUDA stream, >= 0, got %s",
               repr_text(integer).c_str());
  }
  return static_cast<std::uintptr_t>(handle);
}

// Of a stream object; invalid for other objects.
nb::object handle_attribute(nb::handle stream) {
  if (nb::object protocol = find_attribute(stream, "__cuda_stream__"); protocol.is_valid()) {
    // The protocol returns (0, handle); older objects have the tuple as an attribute.
    const nb::object pair = PyCallable_Check(protocol.ptr()) ? protocol() : protocol;
    return pair[1];
  }
  for (const char* attribute : {"cuda_stream", "ptr"}) {  // torch's, CuPy's
    nb::object handle = find_attribute(stream, attribute);
    if (handle.is_valid()) return handle;
  }
  return {};
}

nb::object handle_in(nb::handle stream) {
  if (PyLong_Check(stream.ptr())) return nb::borrow(stream);
  try {
    return handle_attribute(stream);
  } catch (nb::python_error& error) {
    raise_from(error, PyExc_TypeError, "stream: asking %s for the handle of its stream failed",
               type_text(stream).c_str());
  }
}

std::uintptr_t handle_of_stream(nb::handle stream) {
  const nb::object handle = handle_in(stream);
  if (handle.is_valid() && PyLong_Check(handle.ptr()) && !PyBool_Check(handle.ptr()))
    return handle_of_integer(handle);
  raise(PyExc_TypeError,
        "stream: expected None, the handle of a CUDA stream as an integer, or a stream of torch or "
        "CuPy, got %s",
        type_text(stream).c_str());
}

std::uintptr_t current_stream(const ArrayView& x, int device) {
  if (x.framework == Framework::torch) {
    void* stream = nullptr;
    if (torch()->exchange != nullptr && torch()->exchange->current_stream != nullptr) {
      if (torch()->exchange->current_stream(dlpack::cuda, device, &stream) != 0)
        throw nb::python_error();
      return reinterpret_cast<std::uintptr_t>(stream);
    }
    nb::object cuda = nb::module_::import_("torch.cuda");
    return handle_of_stream(cuda.attr("current_stream")(device));
  }
  if (x.framework == Framework::cupy)
    return handle_of_stream(nb::handle(cupy()->get_current_stream)(device));
  return 0;
}

// Whether a kernel on the device can use the array's memory. Managed memory is every device's.
bool is_reachable(const ArrayView& view, int device) {
  switch (view.device.type) {
    case dlpack::cuda: return view.device.id == device;
    case dlpack::cuda_managed:
    case dlpack::cuda_host: return true;
    default: return false;
  }
}

}  // namespace

Placement place(Call& call, nb::handle stream) {
  bool on_cpu = true;
  call.for_each_array([&](Argument, const ArrayView& view) {
    on_cpu = on_cpu && (!view.present() || view.on_cpu());
  });
  if (on_cpu) {
    if (!stream.is_none())
      raise(PyExc_ValueError, "stream: was given, and all arrays are on the CPU; expected None");
    return {};
  }
  const Argument first = call.argument_on_cuda();
  if (first == Argument::none) raise_device(call);
  Placement placement;
  placement.on_cuda = true;
  placement.device = call.array(first)->device.id;
  placement.argument = call.python_name(first);
  for (const Argument argument : call.array_arguments()) {
    const ArrayView& view = *call.array(argument);
    if (view.present() && !is_reachable(view, placement.device)) raise_device(call);
  }
  if (!cuda::build_info().built) raise_without_cuda(call);
  if (placement.device < 0) raise_cuda(cuda::invalid_device, placement);
  placement.stream =
      stream.is_none() ? current_stream(call.x, placement.device) : handle_of_stream(stream);
  placement.on_current_stream = stream.is_none();
  call.for_each_array([&](Argument, ArrayView& view) {
    if (view.pending == Pending::stream) read_on_stream(view, placement.stream);
  });
  require_unmoved(call);
  return placement;
}

void* allocate_on_device(const Placement& placement, std::int64_t bytes, const char* what) {
  void* memory = nullptr;
  const int error =
      cuda::memory_allocate_async(&memory, static_cast<std::size_t>(bytes),
                                  reinterpret_cast<void*>(placement.stream), placement.device);
  if (error == cuda::out_of_memory)
    raise(PyExc_MemoryError, "%s: allocating %lld bytes on cuda:%d failed: %s", what,
          static_cast<long long>(bytes), placement.device, cuda_text(error));
  if (error != 0) raise_cuda(error, placement);
  return memory;
}

void raise_cuda(int error, const Placement& placement) {
  raise(PyExc_RuntimeError, "%s: is on cuda:%d, %s", placement.argument, placement.device,
        cuda_failure_text(error).c_str());
}

}  // namespace rmsnorm::python
