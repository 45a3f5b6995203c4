// Arrays that end, or begin, exactly at a page without access: one byte too far is a fault.
// Canaries see writes only; this sees reads too.
#include <gtest/gtest.h>

#include <new>

#include "case_grid.hpp"
#include "forward_problem.hpp"
#include "instruction_sets.hpp"

#if defined(__unix__)
#include <sys/mman.h>
#include <unistd.h>

namespace rmsnorm_test {
namespace {

// Readable memory between two pages without access.
class Fenced {
 public:
  explicit Fenced(std::size_t bytes) {
    page_ = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    inside_ = (bytes + page_ - 1) / page_ * page_;
    void* p = mmap(nullptr, inside_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(p);
    mprotect(base_ + page_, inside_, PROT_READ | PROT_WRITE);
  }
  ~Fenced() { munmap(base_, inside_ + 2 * page_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  // `bytes` of it that touch the fence behind, or the one before.
  unsigned char* place(std::size_t bytes, bool at_end) const {
    return base_ + page_ + (at_end ? inside_ - bytes : 0);
  }

 private:
  unsigned char* base_;
  std::size_t page_, inside_;
};

struct FencedTensor {
  explicit FencedTensor(std::size_t most) : memory(most) {}
  rmsnorm::Tensor view(DType t, std::int64_t rows, std::int64_t n, bool at_end) {
    const auto size = rmsnorm::size_in_bytes(t);
    unsigned char* data = memory.place(static_cast<std::size_t>(rows * n * size), at_end);
    for (std::int64_t i = 0; i < rows * n; ++i) {
      store_bits(t, data + i * size, encode(t, round_to(t, 1 + static_cast<double>(i % 9) / 8)));
    }
    rmsnorm::Tensor v;
    v.data = data;
    v.dtype = t;
    v.rank = 2;
    v.sizes[0] = rows;
    v.sizes[1] = n;
    v.strides[0] = n;
    v.strides[1] = 1;
    return v;
  }
  Fenced memory;
};

rmsnorm::Tensor first_row(rmsnorm::Tensor t) {
  t.rank = 1;
  t.sizes[0] = t.sizes[1];
  t.strides[0] = t.strides[1];
  return t;
}

rmsnorm::Tensor first_column(rmsnorm::Tensor t) {
  t.rank = 1;
  return t;
}

rmsnorm::Tensor backwards(rmsnorm::Tensor t) {
  const std::int64_t last = t.sizes[0] * t.sizes[1] - 1;
  t.data = static_cast<unsigned char*>(t.data) + last * rmsnorm::size_in_bytes(t.dtype);
  t.strides[0] = -t.strides[0];
  t.strides[1] = -1;
  return t;
}

TEST(MemoryBounds, NothingBeyondTheArraysIsTouched) {
  constexpr std::size_t most = 3 * 600 * 8;
  FencedTensor x(most), residual(most), weight(most), bias(most), y(most), residual_out(most),
      rstd(most);
  std::vector<std::int64_t> lengths;
  for (std::int64_t n = 1; n <= 70; n += grid_is_small() ? 6 : 1) lengths.push_back(n);
  for (const std::int64_t n : {127, 129, 255, 257, 287, 300, 513, 545}) lengths.push_back(n);
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : lengths) {
      for (const bool at_end : {true, false}) {
        for (int variant = 0; variant < 6; ++variant) {
          rmsnorm::ForwardParams p;
          p.x = x.view(t, 3, n, at_end);
          p.y = y.view(variant == 5 && t != DType::f32 ? DType::f32 : t, 3, n, at_end);
          if (variant != 0) {
            const bool narrow = variant == 1 || t == DType::f64;
            p.weight = first_row(weight.view(narrow ? t : DType::f32, 1, n, at_end));
          }
          if (variant == 2) p.bias = first_row(bias.view(t, 1, n, at_end));
          if (variant >= 3) p.residual = residual.view(t, 3, n, at_end);
          if (variant == 3) p.residual_out = residual_out.view(t, 3, n, at_end);
          if (variant == 3) p.partial = 0.6;
          if (variant == 4) {
            p.x = backwards(x.view(t, 3, n, at_end));
            p.y = backwards(p.y);
          }
          p.rstd = first_column(rstd.view(rmsnorm::compute_type(p), 3, 1, at_end));
          for (const Isa isa : available_isas()) {
            const rmsnorm::Status status = rmsnorm::cpu::forward(p, 0, 3, isa);
            ASSERT_TRUE(status.ok()) << name(status.argument) << ' ' << text(status.code);
          }
        }
      }
    }
  }
}

TEST(MemoryBounds, MeanSquareReadsItsRowsOnly) {
  constexpr std::size_t most = 3 * 600 * 8;
  FencedTensor x(most), out(most);
  for (const DType t : all_dtypes) {
    for (const std::int64_t n : {1, 7, 8, 31, 32, 33, 255, 257, 300}) {
      for (const bool at_end : {true, false}) {
        rmsnorm::MeanSquareParams p;
        p.x = x.view(t, 3, n, at_end);
        p.mean_square = first_column(out.view(DType::f32, 3, 1, at_end));
        for (const Isa isa : available_isas()) {
          ASSERT_TRUE(rmsnorm::cpu::mean_square(p, 0, 3, isa).ok());
        }
      }
    }
  }
}

// The elements that do not count lie beyond the fence.
TEST(MemoryBounds, PartialMeanSquareReadsThePartOnly) {
  Fenced memory(4096);
  for (const DType t : all_dtypes) {
    const std::int64_t part = 100;
    rmsnorm::MeanSquareParams p;
    p.x.dtype = t;
    p.x.data = memory.place(static_cast<std::size_t>(part * rmsnorm::size_in_bytes(t)), true);
    p.x.rank = 1;
    p.x.sizes[0] = 2 * part;
    p.x.strides[0] = 1;
    double out = 0;
    p.mean_square.data = &out;
    p.mean_square.dtype = DType::f64;
    p.mean_square.rank = 0;
    p.partial = 0.5;
    for (const Isa isa : available_isas()) {
      ASSERT_TRUE(rmsnorm::cpu::mean_square(p, 0, 1, isa).ok());
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test

#endif
