#include "device_call.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "case_grid.hpp"

namespace rmsnorm_test {

DeviceMemory::DeviceMemory(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (cudaMalloc(&data_, bytes) != cudaSuccess) {
    data_ = nullptr;
    cudaGetLastError();
  }
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) cudaFree(data_);
}

std::vector<unsigned char> DeviceMemory::read(std::size_t offset, std::size_t count) const {
  std::vector<unsigned char> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), data_ + offset, count, cudaMemcpyDeviceToHost), cudaSuccess);
  return host;
}

const std::vector<unsigned char>& make_pattern(DType dtype, std::uint64_t seed) {
  static std::map<std::pair<DType, std::uint64_t>, std::vector<unsigned char>> made;
  std::vector<unsigned char>& pattern = made[{dtype, seed}];
  if (!pattern.empty()) return pattern;
  // A prime that rows of usual lengths do not divide; shorter for emulators.
  const std::size_t length = grid_is_small() ? 10007 : 1000003;
  const std::size_t size = static_cast<std::size_t>(rmsnorm::size_in_bytes(dtype));
  pattern.resize(length * size);
  Random random(seed);
  double scale = 1;
  for (std::size_t i = 0; i < length; ++i) {
    if (i % 1000 == 0) scale = std::ldexp(1.0, static_cast<int>(random.below(7)) - 3);
    const double value = round_to(dtype, scale * random.bell());
    store_bits(dtype, pattern.data() + i * size, encode(dtype, value));
  }
  return pattern;
}

void fill(const DeviceMemory& memory, const std::vector<unsigned char>& pattern) {
  std::size_t filled = std::min(pattern.size(), memory.bytes());
  if (filled == 0) return;
  EXPECT_EQ(cudaMemcpy(memory.data(), pattern.data(), filled, cudaMemcpyHostToDevice), cudaSuccess);
  // What is filled is a whole number of patterns until the last piece.
  while (filled < memory.bytes()) {
    const std::size_t piece = std::min(filled, memory.bytes() - filled);
    EXPECT_EQ(cudaMemcpy(memory.data() + filled, memory.data(), piece, cudaMemcpyDeviceToDevice),
              cudaSuccess);
    filled += piece;
  }
}

rmsnorm::Tensor rows_of(DType dtype, void* data, std::int64_t rows, std::int64_t n,
                        std::int64_t stride) {
  rmsnorm::Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.rank = 2;
  t.sizes[0] = rows;
  t.sizes[1] = n;
  t.strides[0] = stride;
  t.strides[1] = 1;
  return t;
}

rmsnorm::Tensor vector_of(DType dtype, void* data, std::int64_t n) {
  rmsnorm::Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.rank = 1;
  t.sizes[0] = n;
  t.strides[0] = 1;
  return t;
}

DeviceCall::DeviceCall(const CallShape& shape, std::uint64_t seed)
    : x(shape.bytes()),
      residual(shape.adds_residual ? shape.bytes() : 0),
      weight(static_cast<std::size_t>(shape.n * rmsnorm::size_in_bytes(shape.dtype))),
      y(shape.bytes()),
      residual_out(shape.adds_residual ? shape.bytes() : 0),
      shape_(shape) {
  if (allocated()) draw(seed);
}

bool DeviceCall::allocated() const {
  for (const DeviceMemory* m : {&x, &residual, &weight, &y, &residual_out}) {
    if (m->bytes() != 0 && m->data() == nullptr) return false;
  }
  return true;
}

rmsnorm::ForwardParams DeviceCall::params() const {
  rmsnorm::ForwardParams p;
  p.x = rows_of(shape_.dtype, x.data(), shape_.rows, shape_.n);
  p.weight = vector_of(shape_.dtype, weight.data(), shape_.n);
  p.y = rows_of(shape_.dtype, y.data(), shape_.rows, shape_.n);
  if (shape_.adds_residual) {
    p.residual = rows_of(shape_.dtype, residual.data(), shape_.rows, shape_.n);
    p.residual_out = rows_of(shape_.dtype, residual_out.data(), shape_.rows, shape_.n);
  }
  return p;
}

void DeviceCall::draw(std::uint64_t seed) {
  fill(x, make_pattern(shape_.dtype, 3 * seed));
  fill(weight, make_pattern(shape_.dtype, 3 * seed + 1));
  if (shape_.adds_residual) fill(residual, make_pattern(shape_.dtype, 3 * seed + 2));
}

void DeviceCall::poison(cudaStream_t stream) {
  for (const DeviceMemory* m : {&y, &residual_out}) {
    if (m->bytes() == 0) continue;
    EXPECT_EQ(cudaMemsetAsync(m->data(), 0xff, m->bytes(), stream), cudaSuccess);
  }
}

rmsnorm::Status DeviceCall::launch(cudaStream_t stream,
                                   const rmsnorm::cuda::LaunchOptions& options) {
  const rmsnorm::Status status = rmsnorm::cuda::forward(params(), stream, options);
  EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' '
                           << rmsnorm::cuda::error_text(status) << "; " << shape_.rows
                           << " rows of " << shape_.n << ' ' << rmsnorm::name(shape_.dtype);
  return status;
}

std::vector<unsigned char> DeviceCall::outputs() const {
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<unsigned char> all = y.read();
  if (shape_.adds_residual) {
    const std::vector<unsigned char> sums = residual_out.read();
    all.insert(all.end(), sums.begin(), sums.end());
  }
  return all;
}

std::vector<unsigned char> DeviceCall::expected() {
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  poison();
  launch();
  return outputs();
}

std::vector<CallShape> shapes_of_all_kernels() {
  const std::int64_t times = grid_is_small() ? 1 : 16;
  return {
      {40 * times, 128},  {9 * times, 1000},
      {5 * times, 4096},  {3 * times, 5120, DType::f16, true},
      {2 * times, 32768}, {2 * times, 65536, DType::f32, true},
      {2, 1 << 18},       {3 * times, 4097, DType::f32},
      {2, 3 << 20},
  };
}

}  // namespace rmsnorm_test
