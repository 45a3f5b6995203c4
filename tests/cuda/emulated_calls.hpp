// Calls on emulated devices and what is expected of their errors.
#pragma once

#include <gtest/gtest.h>

#include "device_memory.hpp"
#include "emulated_machine.hpp"

namespace rmsnorm_test {

using rmsnorm::cuda::LaunchOptions;

inline bool has_clusters() { return device_version() >= 90; }

inline LaunchOptions programmatic(bool constant_weight = false) {
  LaunchOptions options;
  options.programmatic = true;
  options.constant_weight = constant_weight;
  return options;
}

class OnDevice {
 public:
  explicit OnDevice(int device) { EXPECT_EQ(cudaSetDevice(device), cudaSuccess); }
  ~OnDevice() { cudaSetDevice(usual_device); }
};

inline int current_device() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}

inline LaunchOptions on(int device) {
  LaunchOptions options;
  options.device = device;
  return options;
}

inline void expect_error(cudaError_t error, const rmsnorm::Status& status) {
  EXPECT_EQ(status.code, rmsnorm::Code::cuda_error);
  EXPECT_EQ(status.argument, rmsnorm::Argument::none);
  EXPECT_EQ(status.cuda_error, error);
  EXPECT_STREQ(rmsnorm::cuda::error_text(status), cudaGetErrorString(error));
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "an error that the caller's next check finds";
  cudaGetLastError();
}

}  // namespace rmsnorm_test
