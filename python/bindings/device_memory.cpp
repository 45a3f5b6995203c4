#include "device_memory.hpp"

#include <cuda_devices.hpp>
#include <memory>

#include "errors.hpp"

namespace rmsnorm::python {

DeviceMemory::DeviceMemory(std::int64_t bytes, const Placement& placement)
    : placement_(placement), data_(allocate_on_device(placement, bytes, "result")) {}

DeviceMemory::~DeviceMemory() {
  if (written_ != nullptr)
    cuda::memory_free_behind(data_, written_, placement_.device);
  else  // the call failed, and its stream is still there
    cuda::memory_free_async(data_, reinterpret_cast<void*>(placement_.stream), placement_.device);
}

void DeviceMemory::written() {
  require(
      cuda::record_event(&written_, reinterpret_cast<void*>(placement_.stream), placement_.device));
}

void DeviceMemory::make_wait(std::uintptr_t stream) const {
  require(cuda::make_stream_wait(reinterpret_cast<void*>(stream), written_, placement_.device));
}

void DeviceMemory::require(int error) const {
  if (error != 0)
    raise(PyExc_RuntimeError, "result: ordering streams of cuda:%d failed: %s", placement_.device,
          cuda_text(error));
}

nb::object new_device_memory(std::int64_t bytes, const Placement& placement) {
  auto memory = std::make_unique<DeviceMemory>(bytes, placement);
  return nb::capsule(memory.release(),
                     [](void* p) noexcept { delete static_cast<DeviceMemory*>(p); });
}

DeviceMemory& device_memory_in(nb::handle capsule) {
  return *static_cast<DeviceMemory*>(nb::borrow<nb::capsule>(capsule).data());
}

}  // namespace rmsnorm::python
