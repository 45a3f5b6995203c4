#include "workspace.hpp"

#include <cuda_devices.hpp>
#include <new>

#include "errors.hpp"

namespace rmsnorm::python {
namespace {

constexpr std::align_val_t alignment{64};

}  // namespace

void* Workspace::allocate(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  const auto size = static_cast<std::size_t>(bytes);
  if (placement_.on_cuda) {
    const int error = cuda::memory_allocate_async(
        &data_, size, reinterpret_cast<void*>(placement_.stream), placement_.device);
    if (error != 0)
      raise(PyExc_MemoryError, "workspace: allocating %lld bytes on cuda:%d failed: %s",
            static_cast<long long>(bytes), placement_.device, cuda_text(error));
  } else {
    data_ = ::operator new(size, alignment, std::nothrow);
    if (data_ == nullptr)
      raise(PyExc_MemoryError, "workspace: allocating %lld bytes failed",
            static_cast<long long>(bytes));
  }
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
