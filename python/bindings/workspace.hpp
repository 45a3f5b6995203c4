// Scratch memory of one call, on the host or on the device that the call runs on.
#pragma once

#include <cstdint>

#include "array_view.hpp"
#include "placement.hpp"
#include "results.hpp"

namespace rmsnorm::python {

class Workspace {
 public:
  Workspace(const Call& call, const Placement& placement) : call_(call), placement_(placement) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  // On CUDA in the order of the stream: after the kernels that were launched until then.
  ~Workspace();

  // At a multiple of 64 bytes, not initialised; null for no bytes. Raises MemoryError, or what the
  // framework raises.
  void* allocate(std::int64_t bytes);

 private:
  const Call& call_;
  Placement placement_;
  void* data_ = nullptr;  // of ours
  ArrayView view_;        // of the framework's
  Output array_{call_, view_};
};

}  // namespace rmsnorm::python
