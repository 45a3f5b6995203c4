// Memory of ours on a CUDA device, for results whose framework allocates none.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "placement.hpp"

namespace rmsnorm::python {

namespace nb = nanobind;

// A consumer keeps the memory for as long as it likes.
//
// The stream that the result is written on is the caller's, and known to exist only until the call
// returns. What comes later therefore goes by an event: the streams of consumers wait for it before
// they read, and the memory is freed behind it.
//
// DLPack's deleter says nothing of streams: a consumer that calls it has finished with the memory,
// and what it still has on streams of its own is for it to wait for. It could not be waited for
// here, since those streams, too, may be gone by then. Freeing goes to the default stream, which
// waits for all streams that are not created as non-blocking ones.
class DeviceMemory {
 public:
  DeviceMemory(std::int64_t bytes, const Placement& placement);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  void* data() const { return data_; }

  // All work on the memory has been put on the stream.
  void written();
  void make_wait(std::uintptr_t stream) const;

 private:
  void require(int error) const;

  Placement placement_;
  void* data_;
  void* written_ = nullptr;  // a cudaEvent_t
};

// A capsule that owns new memory, and the memory in one.
nb::object new_device_memory(std::int64_t bytes, const Placement& placement);
DeviceMemory& device_memory_in(nb::handle capsule);

}  // namespace rmsnorm::python
