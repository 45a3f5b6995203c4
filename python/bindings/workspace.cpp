#include "workspace.hpp"

#include <cuda_devices.hpp>
#include <new>

#include "call.hpp"
#include "errors.hpp"

namespace rmsnorm::python {
namespace {

constexpr std::align_val_t alignment{64};

// Whether x's framework has memory at hand that is given back in the order of the stream: CUDA's
// own pool returns it to the device at every synchronisation.
bool framework_allocates(const ArrayView& like, const Placement& placement) {
  return placement.on_cuda && placement.on_current_stream && like.device.type == dlpack::cuda &&
         (like.framework == Framework::torch || like.framework == Framework::cupy);
}

}  // namespace

void* Workspace::allocate(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  if (framework_allocates(call_.x, placement_)) {
    const std::int64_t floats = bytes / size_in_bytes(DType::f32);
    array_.allocate(placement_, DType::f32, &floats, 1);
    return view_.data;
  }
  if (placement_.on_cuda) return data_ = allocate_on_device(placement_, bytes, "workspace");
  data_ = ::operator new(static_cast<std::size_t>(bytes), alignment, std::nothrow);
  if (data_ == nullptr)
    raise(PyExc_MemoryError, "workspace: allocating %lld bytes failed",
          static_cast<long long>(bytes));
  return data_;
}

Workspace::~Workspace() {
  if (data_ == nullptr) return;
  if (placement_.on_cuda)
    cuda::memory_free_async(data_, reinterpret_cast<void*>(placement_.stream), placement_.device);
  else
    ::operator delete(data_, alignment);
}

}  // namespace rmsnorm::python
