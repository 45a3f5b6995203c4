// Offsets beyond 2^31 elements and 2^32 bytes, in address space of which only a few pages are used:
// memory of the host, which the emulated device can reach.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include "device_memory.hpp"

namespace rmsnorm_test {
namespace {

class Sparse {
 public:
  explicit Sparse(std::size_t bytes) : bytes_(bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    base_ = p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
  }
  ~Sparse() {
    if (base_ != nullptr) munmap(base_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  unsigned char* base() const { return base_; }

 private:
  std::size_t bytes_;
  unsigned char* base_;
};

constexpr std::int64_t n = 64, rows = 3;
constexpr std::int64_t far_rows = (std::int64_t{1} << 32) + 1024;    // elements
constexpr std::int64_t far_elements = (std::int64_t{1} << 26) + 16;  // 64 of them exceed 2^32

rmsnorm::Tensor far_view(const Sparse& memory, DType t, std::int64_t row_stride,
                         std::int64_t inner_stride) {
  rmsnorm::Tensor v;
  v.data = memory.base();
  v.dtype = t;
  v.rank = 2;
  v.sizes[0] = rows;
  v.sizes[1] = n;
  v.strides[0] = row_stride;
  v.strides[1] = inner_stride;
  if (row_stride < 0) {
    v.data = memory.base() - (rows - 1) * row_stride * rmsnorm::size_in_bytes(t);
  }
  return v;
}

unsigned char* element(const rmsnorm::Tensor& t, std::int64_t row, std::int64_t i) {
  return static_cast<unsigned char*>(t.data) +
         (row * t.strides[0] + i * t.strides[1]) * rmsnorm::size_in_bytes(t.dtype);
}

TEST(EmulatedFarMemory, OffsetsAreSixtyFourBitsWide) {
  for (const DType t : {DType::f16, DType::f32}) {
    for (const std::int64_t row_stride : {far_rows, -far_rows, far_rows + 1, n}) {
      const std::int64_t inner_stride = row_stride == n ? far_elements : 1;
      const std::int64_t step = row_stride == n ? 1 : row_stride;
      const auto bytes = static_cast<std::size_t>(((rows - 1) * std::abs(step) + n * inner_stride) *
                                                  rmsnorm::size_in_bytes(t));
      const Sparse x_memory(bytes), y_memory(bytes), sum_memory(bytes);
      if (x_memory.base() == nullptr || y_memory.base() == nullptr ||
          sum_memory.base() == nullptr) {
        GTEST_SKIP() << "no address space";
      }
      Case c;
      c.sizes = {rows, n};
      c.x = c.y = c.residual = c.residual_out = tensor(t);
      ForwardProblem near(c);
      const Results expected = run_on_device(near);
      rmsnorm::ForwardParams p = near.params();
      const rmsnorm::Tensor x = far_view(x_memory, t, step, inner_stride);
      const rmsnorm::Tensor y = far_view(y_memory, t, step, inner_stride);
      const rmsnorm::Tensor sum = far_view(sum_memory, t, step, inner_stride);
      near.run([](const rmsnorm::ForwardParams&) { return rmsnorm::Status(); }, "restoring");
      for (std::int64_t i = 0; i < rows * n; ++i) {
        store_bits(t, element(x, i / n, i % n), near.x.bits(i));
      }
      p.x = x;
      p.y = y;
      p.residual_out = sum;
      const rmsnorm::Status status = rmsnorm::cuda::forward(p, nullptr);
      ASSERT_TRUE(status.ok()) << name(status.argument) << ' ' << text(status.code);
      for (std::int64_t i = 0; i < rows * n; ++i) {
        const auto place = static_cast<std::size_t>(i);
        ASSERT_EQ(load_bits(t, element(y, i / n, i % n)), expected.y[place]) << i;
        ASSERT_EQ(load_bits(t, element(sum, i / n, i % n)), expected.residual_out[place]) << i;
      }
    }
  }
}

TEST(EmulatedFarMemory, OfGradientsToo) {
  const DType t = DType::f32;
  for (const std::int64_t row_stride : {far_rows, -far_rows, far_rows + 1, n}) {
    const std::int64_t inner_stride = row_stride == n ? far_elements : 1;
    const std::int64_t step = row_stride == n ? 1 : row_stride;
    const auto bytes =
        static_cast<std::size_t>(((rows - 1) * std::abs(step) + n * inner_stride) * 4);
    const Sparse dy_memory(bytes), x_memory(bytes), dx_memory(bytes);
    if (dy_memory.base() == nullptr || x_memory.base() == nullptr || dx_memory.base() == nullptr) {
      GTEST_SKIP() << "no address space";
    }
    GradientCase c;
    c.forward.sizes = {rows, n};
    c.forward.weight = c.dweight = tensor(t);
    BackwardProblem near(c, rmsnorm::cuda::backward_workspace);
    const GradientResults expected = run_on_device(near);
    near.run([](const rmsnorm::BackwardParams&) { return rmsnorm::Status(); }, "restoring");
    rmsnorm::BackwardParams p = near.params();
    const rmsnorm::Tensor dy = far_view(dy_memory, t, step, inner_stride);
    const rmsnorm::Tensor x = far_view(x_memory, t, step, inner_stride);
    p.dx = far_view(dx_memory, t, step, inner_stride);
    for (std::int64_t i = 0; i < rows * n; ++i) {
      store_bits(t, element(dy, i / n, i % n), near.dy.bits(i));
      store_bits(t, element(x, i / n, i % n), near.x.bits(i));
    }
    p.dy = dy;
    p.x = x;
    const rmsnorm::Status status = rmsnorm::cuda::backward(p, nullptr);
    ASSERT_TRUE(status.ok()) << name(status.argument) << ' ' << text(status.code);
    for (std::int64_t i = 0; i < rows * n; ++i) {
      ASSERT_EQ(load_bits(t, element(p.dx, i / n, i % n)), expected.dx[static_cast<std::size_t>(i)])
          << i;
    }
    EXPECT_EQ(near.results().dweight, expected.dweight);
  }
}

}  // namespace
}  // namespace rmsnorm_test
