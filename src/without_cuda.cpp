// The CUDA half of a build without CUDA: what <rmsnorm/cuda.cuh> and cuda_devices.hpp declare, so
// that programs link and are told.
#include <rmsnorm/cuda.cuh>

#include "cuda_devices.hpp"

namespace rmsnorm {
namespace cuda {
namespace {

// Wrong parameters are named first, as in a build with CUDA.
Status unavailable_unless(Status wrong) {
  if (wrong.ok()) wrong.code = Code::cuda_unavailable;
  return wrong;
}

}  // namespace

Status forward(const ForwardParams& p, cudaStream_t, const LaunchOptions&) noexcept {
  return unavailable_unless(check(p));
}

Status mean_square(const MeanSquareParams& p, cudaStream_t, const LaunchOptions&) noexcept {
  return unavailable_unless(check(p));
}

std::int64_t backward_workspace(const BackwardParams&) noexcept { return 0; }

Status backward(const BackwardParams& p, cudaStream_t, const LaunchOptions&) noexcept {
  return unavailable_unless(check(p));
}

const char* error_text(const Status& status) noexcept { return text(status.code); }

BuildInfo build_info() noexcept { return {false, 0, ""}; }
int driver_version() noexcept { return 0; }
int device_count(int* error) noexcept {
  *error = unavailable;
  return 0;
}
int describe_device(int, DeviceInfo*) noexcept { return unavailable; }
int memory_allocate_async(void** memory, std::size_t, void*, int) noexcept {
  *memory = nullptr;
  return unavailable;
}
int memory_free_async(void*, void*, int) noexcept { return unavailable; }
int memory_free_behind(void*, void*, int) noexcept { return unavailable; }
int record_event(void** event, void*, int) noexcept {
  *event = nullptr;
  return unavailable;
}
int make_stream_wait(void*, void*, int) noexcept { return unavailable; }

}  // namespace cuda
}  // namespace rmsnorm
