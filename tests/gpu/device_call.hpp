// One call of forward on device memory of its own, of any size: the contents are made by repeating
// a pattern whose length is a prime, so that rows differ and no test has to upload gigabytes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "float_formats.hpp"
#include "rmsnorm/cuda.cuh"

namespace rmsnorm_test {

class DeviceMemory {
 public:
  // Without memory for it data() is null.
  explicit DeviceMemory(std::size_t bytes);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  std::vector<unsigned char> read(std::size_t offset, std::size_t count) const;
  std::vector<unsigned char> read() const { return read(0, bytes_); }

 private:
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Elements of bell-shaped numbers, of another magnitude every thousand. Made once for each seed, by
// one thread at a time.
const std::vector<unsigned char>& make_pattern(DType dtype, std::uint64_t seed);

// Repeats the pattern to the memory's end.
void fill(const DeviceMemory& memory, const std::vector<unsigned char>& pattern);

// A view of `rows` rows, `stride` elements apart.
rmsnorm::Tensor rows_of(DType dtype, void* data, std::int64_t rows, std::int64_t n,
                        std::int64_t stride);
inline rmsnorm::Tensor rows_of(DType dtype, void* data, std::int64_t rows, std::int64_t n) {
  return rows_of(dtype, data, rows, n, n);
}
rmsnorm::Tensor vector_of(DType dtype, void* data, std::int64_t n);

struct CallShape {
  std::int64_t rows;
  std::int64_t n;
  DType dtype = DType::bf16;
  bool adds_residual = false;

  std::size_t bytes() const {
    return static_cast<std::size_t>(rows * n * rmsnorm::size_in_bytes(dtype));
  }
};

// x, weight, y; with a residual that, and residual_out.
class DeviceCall {
 public:
  explicit DeviceCall(const CallShape& shape, std::uint64_t seed = 1);

  // False where the device has no memory for it.
  bool allocated() const;

  const CallShape& shape() const { return shape_; }
  rmsnorm::ForwardParams params() const;

  // Fills the inputs anew.
  void draw(std::uint64_t seed);
  // Fills the outputs with NaNs.
  void poison(cudaStream_t stream = nullptr);
  rmsnorm::Status launch(
      cudaStream_t stream = nullptr,
      const rmsnorm::cuda::LaunchOptions& options = rmsnorm::cuda::LaunchOptions());
  // y, then residual_out. Waits for the device.
  std::vector<unsigned char> outputs() const;

  // What an ordinary launch by itself gives. Poisons and waits.
  std::vector<unsigned char> expected();

  DeviceMemory x, residual, weight, y, residual_out;

 private:
  CallShape shape_;
};

// A shape for each kind of kernel: part of a warp, warp, block, clusters with the row in registers
// and with the row in shared memory, with nowhere to keep it, and with elements that nothing packs.
std::vector<CallShape> shapes_of_all_kernels();

}  // namespace rmsnorm_test
