// Arrays in far caches are taken in other groups of rows and those beyond all caches are stored
// past them: the same bits as small ones.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "case_grid.hpp"
#include "instruction_sets.hpp"
#include "rmsnorm/cpu/memory.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rmsnorm_test {
namespace {

using rmsnorm::Status;
using rmsnorm::Tensor;

// Rows of n elements behind a canary, at some bytes from a 64-byte boundary.
class Rows {
 public:
  Rows(DType t, std::int64_t rows, std::int64_t n, std::size_t shift)
      : bytes_(static_cast<std::size_t>(rows * n * rmsnorm::size_in_bytes(t))),
        memory_(bytes_ + 256),
        t_(t),
        n_(n) {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - at % 64) + shift;
    std::memset(memory_.data(), 0x5a, memory_.size());
  }
  Tensor view(std::int64_t first, std::int64_t rows) {
    Tensor v = rmsnorm::matrix(static_cast<float*>(nullptr), rows, n_);
    v.dtype = t_;
    v.data = data_ + first * n_ * rmsnorm::size_in_bytes(t_);
    return v;
  }
  void fill(std::uint64_t seed) {
    Random random(seed);
    // A few thousand different values repeat, with a period that is no row's.
    std::vector<std::uint64_t> patterns(4099);
    for (std::uint64_t& p : patterns) p = encode(t_, round_to(t_, random.bell()));
    const std::int64_t size = rmsnorm::size_in_bytes(t_);
    for (std::size_t i = 0; i < bytes_ / static_cast<std::size_t>(size); ++i) {
      store_bits(t_, data_ + static_cast<std::int64_t>(i) * size, patterns[i % patterns.size()]);
    }
  }
  bool ends_with_canary() const {
    for (const unsigned char* p = data_ + bytes_; p < memory_.data() + memory_.size(); ++p) {
      if (*p != 0x5a) return false;
    }
    return true;
  }
  friend bool operator==(const Rows& a, const Rows& b) {
    return std::memcmp(a.data_, b.data_, a.bytes_) == 0;
  }

 private:
  std::size_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_;
  DType t_;
  std::int64_t n_;
};

// Bytes of all rows of a call's tensors together, and the length of these rows.
struct Size {
  std::int64_t bytes, n;
};

// Beyond the second level, of short rows and longer ones, and beyond all caches.
std::vector<Size> large_sizes() {
  return {{rmsnorm::cpu::detail::far_bytes(), 56},
          {rmsnorm::cpu::detail::far_bytes(), 136},
          {rmsnorm::cpu::detail::far_bytes(), 240},
          {rmsnorm::cpu::detail::streaming_bytes(), 56},
          {rmsnorm::cpu::detail::streaming_bytes(), 1040}};
}

// Fewer than a group of short rows: kernels take those in another way.
constexpr std::int64_t few = 7;

// Calls compute(first, rows) on all rows at once, then a few at a time.
template <class Compute>
void in_small_calls(std::int64_t rows, Compute compute) {
  for (std::int64_t first = 0; first < rows; first += few) {
    ASSERT_TRUE(compute(first, std::min(few, rows - first)).ok());
  }
}

TEST(Traffic, ForwardGivesTheBitsOfSmallCalls) {
  if (grid_is_small() || rmsnorm::cpu::detail::streaming_bytes() > (std::int64_t{1} << 30)) {
    GTEST_SKIP() << "nothing is streamed, or an emulator would take long";
  }
  for (const Isa isa : available_isas()) {
    for (const DType t : all_dtypes) {
      for (const Size& size : large_sizes()) {
        if (isa == Isa::scalar && t != DType::f32) continue;
        const std::int64_t n = size.n;
        const std::int64_t rows = size.bytes / (2 * n * rmsnorm::size_in_bytes(t)) + 3;
        Rows x(t, rows, n, 16), residual(t, rows, n, 0), weight(t, 1, n, 0);
        Rows y(t, rows, n, 16), expected(t, rows, n, 16);
        Rows sum(t, rows, n, 0), expected_sum(t, rows, n, 0);
        x.fill(1);
        residual.fill(2);
        weight.fill(3);
        for (const bool add : {false, true}) {
          const auto call = [&](Rows& out, Rows& residual_out) {
            return [&](std::int64_t first, std::int64_t count) {
              rmsnorm::ForwardParams p;
              p.x = x.view(first, count);
              p.weight = weight.view(0, 1);
              p.weight.rank = 1;
              p.weight.sizes[0] = n;
              p.weight.strides[0] = 1;
              p.y = out.view(first, count);
              if (add) p.residual = residual.view(first, count);
              if (add) p.residual_out = residual_out.view(first, count);
              return rmsnorm::cpu::forward(p, 0, count, isa);
            };
          };
          ASSERT_TRUE(call(y, sum)(0, rows).ok());
          in_small_calls(rows, call(expected, expected_sum));
          EXPECT_TRUE(sum == expected_sum) << name(isa) << ' ' << rmsnorm::name(t) << ' ' << n;
          EXPECT_TRUE(y == expected) << name(isa) << ' ' << rmsnorm::name(t) << ' ' << n << add;
          EXPECT_TRUE(y.ends_with_canary()) << name(isa) << ' ' << rmsnorm::name(t) << ' ' << n;
        }
      }
    }
  }
}

#if defined(__linux__)
// As results that were just allocated are: ordinary stores, with the same bits.
TEST(Traffic, NewMemoryIsNotBacked) {
  if (rmsnorm::cpu::detail::streaming_bytes() == INT64_MAX) GTEST_SKIP() << "nothing is streamed";
  constexpr std::size_t pages = 2, page = 4096;
  void* memory =
      mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  unsigned char* bytes = static_cast<unsigned char*>(memory);
  unsigned char resident = 0;
  ASSERT_EQ(mincore(bytes + page, page, &resident), 0);
  if ((resident & 1) != 0) GTEST_SKIP() << "this system calls all memory resident";
  bytes[1] = 1;
  EXPECT_TRUE(rmsnorm::cpu::detail::is_backed(bytes + page - 1));
  EXPECT_FALSE(rmsnorm::cpu::detail::is_backed(bytes + page));
  munmap(memory, pages * page);
}
#endif

// Stores past the caches fault on addresses that are no multiples of 16.
TEST(Traffic, RowsOffTheBoundariesAreStoredAsUsual) {
  if (grid_is_small() || rmsnorm::cpu::detail::streaming_bytes() > (std::int64_t{1} << 30)) {
    GTEST_SKIP() << "nothing is streamed, or an emulator would take long";
  }
  struct Place {
    std::size_t shift;
    std::int64_t n;
  };
  // Rows of 4160 bytes at four from a boundary, and rows of 4168 bytes.
  for (const Place& place : {Place{4, 1040}, Place{0, 1042}}) {
    const std::int64_t n = place.n;
    const std::int64_t rows = rmsnorm::cpu::detail::streaming_bytes() / (8 * n) + 3;
    Rows x(DType::f32, rows, n, 0), out(DType::f32, rows, n, place.shift);
    Rows expected(DType::f32, rows, n, place.shift);
    x.fill(1);
    for (const Isa isa : available_isas()) {
      if (isa == Isa::scalar) continue;
      const auto forward = [&](Rows& y) {
        return [&](std::int64_t first, std::int64_t count) {
          rmsnorm::ForwardParams p;
          p.x = x.view(first, count);
          p.y = y.view(first, count);
          return rmsnorm::cpu::forward(p, 0, count, isa);
        };
      };
      const auto backward = [&](Rows& dx) {
        return [&](std::int64_t first, std::int64_t count) {
          rmsnorm::BackwardParams p;
          p.x = p.dy = x.view(first, count);
          p.dx = dx.view(first, count);
          return rmsnorm::cpu::backward(p, 0, rmsnorm::cpu::backward_blocks(p), isa);
        };
      };
      ASSERT_TRUE(forward(out)(0, rows).ok());
      in_small_calls(rows, forward(expected));
      EXPECT_TRUE(out == expected) << name(isa) << " forward " << n;
      ASSERT_TRUE(backward(out)(0, rows).ok());
      in_small_calls(rows, backward(expected));
      EXPECT_TRUE(out == expected) << name(isa) << " backward " << n;
    }
  }
}

TEST(Traffic, BackwardGivesTheBitsOfSmallCalls) {
  if (grid_is_small() || rmsnorm::cpu::detail::streaming_bytes() > (std::int64_t{1} << 30)) {
    GTEST_SKIP() << "nothing is streamed, or an emulator would take long";
  }
  for (const Isa isa : available_isas()) {
    for (const DType t : all_dtypes) {
      for (const Size& size : large_sizes()) {
        if (isa == Isa::scalar) continue;
        const std::int64_t n = size.n;
        const std::int64_t rows = size.bytes / (3 * n * rmsnorm::size_in_bytes(t)) + 3;
        Rows x(t, rows, n, 16), dy(t, rows, n, 0), dx(t, rows, n, 16), expected(t, rows, n, 16);
        x.fill(1);
        dy.fill(2);
        const auto call = [&](Rows& out) {
          return [&](std::int64_t first, std::int64_t count) {
            rmsnorm::BackwardParams p;
            p.x = x.view(first, count);
            p.dy = dy.view(first, count);
            p.dx = out.view(first, count);
            return rmsnorm::cpu::backward(p, 0, rmsnorm::cpu::backward_blocks(p), isa);
          };
        };
        ASSERT_TRUE(call(dx)(0, rows).ok());
        in_small_calls(rows, call(expected));
        EXPECT_TRUE(dx == expected) << name(isa) << ' ' << rmsnorm::name(t) << ' ' << n;
        EXPECT_TRUE(dx.ends_with_canary()) << name(isa) << ' ' << rmsnorm::name(t) << ' ' << n;
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
