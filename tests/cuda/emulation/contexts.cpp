#include "contexts.hpp"

#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.h"
#include "settings.hpp"

struct CUctx_st {
  int device = 0;
  int retained = 0;
  bool by_runtime = false;  // retains it, once
  std::uint64_t number = 0;
};

namespace cuda_emulation {
namespace {

struct Contexts {
  std::mutex mutex;
  std::deque<CUctx_st> primary{CUctx_st{}};  // of each device; places stay
  std::uint64_t made = 0;
};

Contexts& contexts() {
  static Contexts& contexts = *new Contexts;
  return contexts;
}

thread_local int chosen_device = 0;
thread_local std::vector<CUcontext> stack;

void retain(CUctx_st& context) {
  if (context.retained++ == 0) context.number = ++contexts().made;
}

CUctx_st& retained_by_runtime(int device) {
  CUctx_st& context = contexts().primary[static_cast<std::size_t>(device)];
  if (!context.by_runtime) retain(context);
  context.by_runtime = true;
  return context;
}

void reset(CUctx_st& context) {
  context.retained = 0;
  context.by_runtime = false;
}

CUctx_st* find(CUdevice device) {
  std::deque<CUctx_st>& primary = contexts().primary;
  const bool exists = device >= 0 && device < static_cast<int>(primary.size());
  return exists ? &primary[static_cast<std::size_t>(device)] : nullptr;
}

}  // namespace

int thread_device() { return stack.empty() ? chosen_device : stack.back()->device; }

void choose_device(int device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  chosen_device = device;
  if (stack.empty()) stack.emplace_back();
  stack.back() = &retained_by_runtime(device);
}

std::uint64_t use_context() {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  if (stack.empty()) stack.push_back(&retained_by_runtime(chosen_device));
  // After a reset the runtime starts anew.
  if (stack.back()->retained == 0) retained_by_runtime(stack.back()->device);
  return stack.back()->number;
}

void reset_contexts(int device_count) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  std::deque<CUctx_st>& primary = contexts().primary;
  while (static_cast<int>(primary.size()) < device_count) {
    primary.emplace_back();
    primary.back().device = static_cast<int>(primary.size()) - 1;
  }
  for (CUctx_st& context : primary) reset(context);
  chosen_device = 0;
  stack.clear();
}

void reset_context(int device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  reset(contexts().primary[static_cast<std::size_t>(device)]);
}

bool has_context(int device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  const CUctx_st* context = find(device);
  return context != nullptr && context->retained > 0;
}

std::size_t context_stack_size() { return stack.size(); }

void* driver_function(const char* name) {
  static const std::map<std::string, void*> functions = {
      {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
      {"cuDevicePrimaryCtxGetState", reinterpret_cast<void*>(cuDevicePrimaryCtxGetState)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
      {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(cuDevicePrimaryCtxRelease)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(cuCtxPushCurrent)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(cuCtxPopCurrent)},
  };
  const auto found = functions.find(name);
  return found == functions.end() ? nullptr : found->second;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return CUDA_ERROR_NO_DEVICE;
  if (ordinal < 0 || ordinal >= count) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  const CUctx_st* context = find(device);
  if (context == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = context->retained > 0 ? 1 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  *context = find(device);
  if (*context == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  retain(**context);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  CUctx_st* const context = find(device);
  if (context == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (context->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  --context->retained;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (context->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  stack.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = stack.back();
  stack.pop_back();
  return CUDA_SUCCESS;
}
