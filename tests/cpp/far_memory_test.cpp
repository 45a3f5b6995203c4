// Offsets beyond 2^31 elements and 2^32 bytes, in address space of which only a few pages are used.
#include <gtest/gtest.h>

#include "case_grid.hpp"
#include "forward_problem.hpp"
#include "instruction_sets.hpp"

#if defined(__unix__) && UINTPTR_MAX > 0xffffffffu
#include <sys/mman.h>

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

constexpr std::int64_t n = 70, rows = 3;

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

void expect_far_result(const Sparse& x_memory, const Sparse& y_memory, DType t,
                       std::int64_t row_stride, std::int64_t inner_stride) {
  Case c;
  c.sizes = {rows, n};
  c.x = c.y = tensor(t);
  ForwardProblem near(c);
  const Results expected = near.run(Isa::scalar);
  rmsnorm::ForwardParams p;
  const rmsnorm::Tensor x = far_view(x_memory, t, row_stride, inner_stride);
  p.x = x;
  p.y = far_view(y_memory, t, row_stride, inner_stride);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < n; ++i)
      store_bits(t, element(x, row, i), near.x.bits(row * n + i));
  }
  for (const Isa isa : available_isas()) {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t i = 0; i < n; ++i) store_bits(t, element(p.y, row, i), 0);
    }
    ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, rows, isa).ok()) << name(isa);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(load_bits(t, element(p.y, row, i)), expected.y[std::size_t(row * n + i)])
            << name(isa) << " row " << row << " element " << i << " strides " << row_stride << ','
            << inner_stride;
      }
    }
  }
}

TEST(FarMemory, StridesBeyondTwoToThe31) {
  constexpr std::int64_t far = (std::int64_t{1} << 31) + 12345;
  // Two rows beyond the first, of up to eight bytes an element, and room for the row itself.
  constexpr std::size_t bytes = std::size_t{(2 * far + 1000) * 8};
  const Sparse x(bytes), y(bytes);
  if (x.base() == nullptr || y.base() == nullptr) GTEST_SKIP() << "no address space of " << bytes;
  for (const DType t : all_dtypes) {
    expect_far_result(x, y, t, far, 1);
    expect_far_result(x, y, t, -far, 1);
    // 2^31 elements between the first and the last element of one row.
    if (!grid_is_small()) expect_far_result(x, y, t, 1, far / 35);
  }
}

}  // namespace
}  // namespace rmsnorm_test

#endif
