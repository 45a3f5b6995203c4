// Scratch memory of one call, on the host or on the device that the call runs on.
#pragma once

#include <cstdint>

#include "placement.hpp"

namespace rmsnorm::python {

class Workspace {
 public:
  explicit Workspace(const Placement& placement) : placement_(placement) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  // On CUDA in the order of the stream: after the kernels that were launched until then.
  ~Workspace();

  // At a multiple of 64 bytes, not initialised; null for no bytes. Raises MemoryError.
  void* allocate(std::int64_t bytes);

 private:
  Placement placement_;
  void* data_ = nullptr;
};

}  // namespace rmsnorm::python
