// Which device a call works on. Host code: src/cuda_devices.cpp has it without nvcc.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>

#include "../cuda.cuh"
#include "../host_device.hpp"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// What CUDA is asked once. An error is not kept: it may be one of the moment.
template <class Value>
class AskedOnce {
 public:
  // `ask(Value*)` returns a cudaError_t.
  template <class Ask>
  cudaError_t get(Value* value, const Ask& ask) {
    if (!known_.load(std::memory_order_acquire)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!known_.load(std::memory_order_relaxed)) {
        const cudaError_t error = ask(&value_);
        if (error != cudaSuccess) return error;
        known_.store(true, std::memory_order_release);
      }
    }
    *value = value_;
    return cudaSuccess;
  }

 private:
  std::atomic<bool> known_{false};
  std::mutex mutex_;
  Value value_ = {};
};

// The driver's functions for contexts, which the runtime has no counterparts of. They are asked of
// the runtime, so that nothing has to be linked with the driver.
struct ContextFunctions {
  decltype(&cuDeviceGet) device_get;
  decltype(&cuDevicePrimaryCtxGetState) primary_state;
  decltype(&cuDevicePrimaryCtxRetain) retain_primary;
  decltype(&cuDevicePrimaryCtxRelease) release_primary;
  decltype(&cuCtxPushCurrent) push;
  decltype(&cuCtxPopCurrent) pop;
};

template <class Function>
cudaError_t find_driver_function(const char* name, Function* function) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  // The functions are as they were in the oldest CUDA that compiles this.
  constexpr unsigned version = 11080;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault);
#endif
  if (error != cudaSuccess) return error;
  *function = reinterpret_cast<Function>(found);
  return found != nullptr ? cudaSuccess : cudaErrorSymbolNotFound;
}

inline cudaError_t find_context_functions(ContextFunctions* f) {
  cudaError_t error = find_driver_function("cuDeviceGet", &f->device_get);
  const auto find = [&error](const char* name, auto* function) {
    if (error == cudaSuccess) error = find_driver_function(name, function);
  };
  find("cuDevicePrimaryCtxGetState", &f->primary_state);
  find("cuDevicePrimaryCtxRetain", &f->retain_primary);
  find("cuDevicePrimaryCtxRelease", &f->release_primary);
  find("cuCtxPushCurrent", &f->push);
  find("cuCtxPopCurrent", &f->pop);
  return error;
}

// The runtime and the driver number their errors alike.
inline cudaError_t runtime_error(CUresult result) { return static_cast<cudaError_t>(result); }

// Makes a device current for its own lifetime. Where it is already, nothing is called but
// cudaGetDevice.
//
// cudaSetDevice cannot lead back: it makes a context on the device that it is given, some hundred
// megabytes of memory, and the device that was current before may have none, as in a process that
// uses another one alone. Therefore the device's context is put on top of those of the thread and
// taken off again, and the thread is left with what it had, be it no context at all.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)) {
    if (error_ != cudaSuccess || device == current_device || device == previous_) return;
    static AskedOnce<ContextFunctions> functions;
    error_ = functions.get(&driver_, find_context_functions);
    if (error_ == cudaSuccess) error_ = enter(device);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (entered_) {
      CUcontext context = nullptr;
      driver_.pop(&context);
    }
    if (retained_) driver_.release_primary(device_);
  }
  cudaError_t error() const { return error_; }
  int device(int asked) const { return asked == current_device ? previous_ : asked; }

 private:
  cudaError_t enter(int device) {
    unsigned flags = 0;
    int active = 0;
    CUcontext context = nullptr;
    CUresult result = driver_.device_get(&device_, device);
    if (result == CUDA_SUCCESS) result = driver_.primary_state(device_, &flags, &active);
    if (result == CUDA_SUCCESS) result = driver_.retain_primary(&context, device_);
    if (result != CUDA_SUCCESS) return runtime_error(result);
    // A context that is made here stays until the process ends, as one of the runtime's making
    // does: the work that it is made for goes on after the call.
    retained_ = active != 0;
    result = driver_.push(context);
    entered_ = result == CUDA_SUCCESS;
    return runtime_error(result);
  }

  int previous_ = 0;
  cudaError_t error_;
  ContextFunctions driver_ = {};
  CUdevice device_ = 0;
  bool retained_ = false, entered_ = false;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
