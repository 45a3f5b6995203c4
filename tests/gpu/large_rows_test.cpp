// Sizes that only hardware computes in reasonable time: sampled rows against exact arithmetic and
// bit by bit from rstd on, every element against the CPU library, and the same bits again for
// another run, for a row by itself and for rows that lie elsewhere.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>

#include "case_grid.hpp"
#include "device_call.hpp"
#include "formula.hpp"

namespace rmsnorm_test {
namespace {

using Bytes = std::vector<unsigned char>;

std::size_t size_of(DType t) { return static_cast<std::size_t>(rmsnorm::size_in_bytes(t)); }

std::vector<double> values(DType t, const Bytes& bytes) {
  std::vector<double> v(bytes.size() / size_of(t));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = decode(t, load_bits(t, &bytes[i * size_of(t)]));
  return v;
}

std::vector<std::uint64_t> bits(DType t, const Bytes& bytes) {
  std::vector<std::uint64_t> v(bytes.size() / size_of(t));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = load_bits(t, &bytes[i * size_of(t)]);
  return v;
}

void append(Bytes& to, const Bytes& more) { to.insert(to.end(), more.begin(), more.end()); }

// The first, the last, both sides of powers of two, and some between.
std::vector<std::int64_t> sampled_rows(std::int64_t rows) {
  std::vector<std::int64_t> sample = {0, rows - 1};
  for (std::int64_t power = 1; power < rows; power *= 16) {
    sample.push_back(power);
    sample.push_back(power - 1);
  }
  Random random(5);
  for (int i = 0; i < 8; ++i) sample.push_back(random.below(rows));
  std::sort(sample.begin(), sample.end());
  sample.erase(std::unique(sample.begin(), sample.end()), sample.end());
  return sample;
}

// Elements of memory whose bits are all ones, as poison() leaves them.
std::size_t count_poisoned(const Bytes& bytes, std::size_t size) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < bytes.size(); i += size) {
    bool poisoned = true;
    for (std::size_t k = 0; k < size; ++k) poisoned = poisoned && bytes[i + k] == 0xff;
    count += poisoned ? 1 : 0;
  }
  return count;
}

// Bit patterns in the order of the numbers they stand for.
template <class SignedBits>
std::int64_t place_in_order(SignedBits b) {
  return b < 0 ? -std::int64_t{b & std::numeric_limits<SignedBits>::max()} : std::int64_t{b};
}

template <class Bits>
std::int64_t largest_distance(const unsigned char* a, const unsigned char* b, std::size_t count) {
  std::int64_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Bits p, q;
    std::memcpy(&p, a + i * sizeof(Bits), sizeof(Bits));
    std::memcpy(&q, b + i * sizeof(Bits), sizeof(Bits));
    largest = std::max(largest, std::abs(place_in_order(p) - place_in_order(q)));
  }
  return largest;
}

std::int64_t largest_distance(DType t, const unsigned char* a, const unsigned char* b,
                              std::size_t count) {
  return size_of(t) == 2   ? largest_distance<std::int16_t>(a, b, count)
         : size_of(t) == 4 ? largest_distance<std::int32_t>(a, b, count)
                           : largest_distance<std::int64_t>(a, b, count);
}
// Calls work(begin, end) on parts of [0, rows) on all processors.
template <class Work>
void in_parallel(std::int64_t rows, Work work) {
  const std::int64_t parts = std::max<std::int64_t>(1, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < parts; ++i) {
    threads.emplace_back([=] { work(rows * i / parts, rows * (i + 1) / parts); });
  }
  for (std::thread& t : threads) t.join();
}

// Both sides round the same sums: they differ by what the contract lets each be off.
std::int64_t allowed_distance(DType t) { return size_of(t) == 2 ? 1 : size_of(t) == 4 ? 6 : 8; }

class LargeRows : public testing::TestWithParam<CallShape> {
 protected:
  LargeRows()
      : shape_(GetParam()), call_(shape_), rstd_(static_cast<std::size_t>(shape_.rows) * 8) {}

  void SetUp() override {
    ASSERT_TRUE(call_.allocated() && rstd_.data() != nullptr) << "no device memory";
    call_.poison();
    p_ = call_.params();
    p_.rstd = vector_of(rstd_type(), rstd_.data(), shape_.rows);
    const rmsnorm::Status status = rmsnorm::cuda::forward(p_, nullptr);
    ASSERT_TRUE(status.ok()) << rmsnorm::cuda::error_text(status);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  DType rstd_type() const { return shape_.dtype == DType::f64 ? DType::f64 : DType::f32; }
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(shape_.n) * size_of(shape_.dtype);
  }
  Bytes row(const DeviceMemory& memory, std::int64_t r) const {
    return memory.read(static_cast<std::size_t>(r) * row_bytes(), row_bytes());
  }

  CallShape shape_;
  DeviceCall call_;
  DeviceMemory rstd_;
  rmsnorm::ForwardParams p_;
};

TEST_P(LargeRows, SampledRowsKeepTheContract) {
  std::vector<std::int64_t> sample = sampled_rows(shape_.rows);
  // Extended precision takes its time.
  const std::size_t most =
      static_cast<std::size_t>(std::max<std::int64_t>(2, (4 << 20) / shape_.n));
  while (sample.size() > most) {
    sample.erase(sample.begin() + static_cast<std::ptrdiff_t>(sample.size() / 2));
  }
  Case c;
  c.sizes = {static_cast<std::int64_t>(sample.size()), shape_.n};
  c.x = c.weight = c.y = tensor(shape_.dtype);
  if (shape_.adds_residual) c.residual = c.residual_out = tensor(shape_.dtype);
  c.rstd = tensor(rstd_type());
  Bytes x, residual, y, residual_out, rstd;
  for (const std::int64_t r : sample) {
    append(x, row(call_.x, r));
    append(y, row(call_.y, r));
    append(rstd,
           rstd_.read(static_cast<std::size_t>(r) * size_of(rstd_type()), size_of(rstd_type())));
    if (!shape_.adds_residual) continue;
    append(residual, row(call_.residual, r));
    append(residual_out, row(call_.residual_out, r));
  }
  Inputs in;
  in.x = values(shape_.dtype, x);
  in.residual = values(shape_.dtype, residual);
  in.weight = values(shape_.dtype, call_.weight.read());
  Results got;
  got.y = bits(shape_.dtype, y);
  got.residual_out = bits(shape_.dtype, residual_out);
  got.rstd = bits(rstd_type(), rstd);
  Results expected = emulate(c, in, values(rstd_type(), rstd));
  expected.rstd = got.rstd;
  expect_same(c, expected, got, "cuda");
  EXPECT_LE(errors_of(c, in, got).y, y_budget(c)) << describe(c);
}

TEST_P(LargeRows, EveryElementAgreesWithTheCpu) {
  const std::size_t bytes = shape_.bytes();
  const Bytes x = call_.x.read(), weight = call_.weight.read(), y = call_.y.read();
  const Bytes residual = shape_.adds_residual ? call_.residual.read() : Bytes();
  const Bytes residual_out = shape_.adds_residual ? call_.residual_out.read() : Bytes();
  EXPECT_EQ(count_poisoned(y, size_of(shape_.dtype)), 0u);
  Bytes cpu_y(bytes), cpu_residual_out(residual.size());
  rmsnorm::ForwardParams p = call_.params();
  p.x.data = x.data();
  p.weight.data = weight.data();
  p.y.data = cpu_y.data();
  p.residual.data = residual.data();
  p.residual_out.data = cpu_residual_out.data();
  std::atomic<std::int64_t> largest{0};
  std::atomic<bool> ok{true};
  in_parallel(shape_.rows, [&](std::int64_t begin, std::int64_t end) {
    if (!rmsnorm::cpu::forward(p, begin, end).ok()) ok = false;
    const std::size_t first = static_cast<std::size_t>(begin) * row_bytes();
    const std::int64_t distance =
        largest_distance(shape_.dtype, y.data() + first, cpu_y.data() + first,
                         static_cast<std::size_t>((end - begin) * shape_.n));
    std::int64_t known = largest;
    while (distance > known && !largest.compare_exchange_weak(known, distance)) {
    }
  });
  EXPECT_TRUE(ok);
  EXPECT_LE(largest, allowed_distance(shape_.dtype)) << "units in the last place";
  EXPECT_TRUE(residual_out == cpu_residual_out);
}

TEST_P(LargeRows, AnotherRunGivesTheSameBits) {
  const Bytes first = call_.outputs();
  call_.poison();
  call_.launch();
  EXPECT_TRUE(call_.outputs() == first);
}

TEST_P(LargeRows, ARowByItselfGivesTheSameBits) {
  for (const std::int64_t r : sampled_rows(shape_.rows)) {
    const Bytes expected = row(call_.y, r);
    rmsnorm::ForwardParams p = call_.params();
    DeviceMemory y(row_bytes());
    for (rmsnorm::ConstTensor* t : {&p.x, &p.residual}) {
      t->sizes[0] = 1;
      t->data =
          static_cast<const unsigned char*>(t->data) + static_cast<std::size_t>(r) * row_bytes();
    }
    p.residual_out = {};
    p.y = rows_of(shape_.dtype, y.data(), 1, shape_.n);
    ASSERT_TRUE(rmsnorm::cuda::forward(p, nullptr).ok());
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(y.read() == expected) << "row " << r;
  }
}

TEST_P(LargeRows, RowsOnOddAddressesGiveTheSameBits) {
  // One element behind the start of the allocation, three between rows.
  const std::int64_t rows = std::min<std::int64_t>(shape_.rows, 16), stride = shape_.n + 3;
  const std::size_t size = size_of(shape_.dtype);
  const std::size_t bytes = static_cast<std::size_t>(rows * stride + 1) * size;
  DeviceMemory x(bytes), residual(bytes), y(bytes);
  rmsnorm::ForwardParams p = call_.params();
  const auto move = [&](const DeviceMemory& from, const DeviceMemory& to) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::size_t place = static_cast<std::size_t>(r * stride + 1) * size;
      ASSERT_EQ(
          cudaMemcpy(to.data() + place, from.data() + static_cast<std::size_t>(r) * row_bytes(),
                     row_bytes(), cudaMemcpyDeviceToDevice),
          cudaSuccess);
    }
  };
  move(call_.x, x);
  p.x = rows_of(shape_.dtype, x.data() + size, rows, shape_.n, stride);
  p.y = rows_of(shape_.dtype, y.data() + size, rows, shape_.n, stride);
  if (shape_.adds_residual) {
    move(call_.residual, residual);
    p.residual = rows_of(shape_.dtype, residual.data() + size, rows, shape_.n, stride);
    p.residual_out = {};
  }
  ASSERT_TRUE(rmsnorm::cuda::forward(p, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (std::int64_t r = 0; r < rows; ++r) {
    const Bytes got = y.read(static_cast<std::size_t>(r * stride + 1) * size, row_bytes());
    EXPECT_TRUE(got == row(call_.y, r)) << "row " << r;
  }
}

std::vector<CallShape> large_shapes() {
  std::vector<CallShape> shapes;
  if (grid_is_small()) {
    shapes = {{64, 128},
              {9, 1000, DType::f16},
              {5, 4096, DType::f32},
              {5, 2048, DType::bf16, true},
              {2, 32768},
              {2, 1 << 18, DType::bf16, true},
              {3, 1024, DType::f64}};
    return shapes;
  }
  for (const DType t : {DType::bf16, DType::f16, DType::f32}) {
    shapes.push_back({16384, 4096, t});
    shapes.push_back({20001, 5120, t, true});
    shapes.push_back({65537, 1000, t});
  }
  for (const DType t : {DType::bf16, DType::f32}) {
    for (const bool adds : {false, true}) {
      shapes.push_back({1 << 20, 128, t, adds});
      shapes.push_back({3, 1 << 20, t, adds});
    }
    shapes.push_back({4096, 65536, t});
  }
  shapes.push_back({4096, 4096, DType::f64});
  shapes.push_back({1000, 40000, DType::f64, true});
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Shapes, LargeRows, testing::ValuesIn(large_shapes()), [](const auto& i) {
  const CallShape& s = i.param;
  return std::to_string(s.rows) + "x" + std::to_string(s.n) + "_" + rmsnorm::name(s.dtype) +
         (s.adds_residual ? "_add" : "");
});

// More elements than 32 bits count.
TEST(FarRows, BeyondFourBillionElements) {
  if (grid_is_small()) GTEST_SKIP() << "the small grid";
  DeviceCall call({(std::int64_t{1} << 20) + 1, 4096});
  if (!call.allocated()) GTEST_SKIP() << "not enough device memory";
  call.poison();
  call.launch();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::size_t row_bytes = 2 * 4096;
  const Bytes weight = call.weight.read();
  for (const std::int64_t r : sampled_rows(call.shape().rows)) {
    const std::size_t place = static_cast<std::size_t>(r) * row_bytes;
    const Bytes x = call.x.read(place, row_bytes), y = call.y.read(place, row_bytes);
    Bytes cpu_y(row_bytes);
    rmsnorm::ForwardParams p;
    p.x = rows_of(DType::bf16, const_cast<unsigned char*>(x.data()), 1, 4096);
    p.weight = vector_of(DType::bf16, const_cast<unsigned char*>(weight.data()), 4096);
    p.y = rows_of(DType::bf16, cpu_y.data(), 1, 4096);
    ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, 1).ok());
    EXPECT_LE(largest_distance(DType::bf16, y.data(), cpu_y.data(), 4096), 1) << "row " << r;
  }
}

TEST(FarRows, MoreRowsThanTwoToTheTwentySix) {
  if (grid_is_small()) GTEST_SKIP() << "the small grid";
  const std::int64_t rows = (std::int64_t{1} << 26) + 5, n = 8;
  DeviceCall call({rows, n});
  if (!call.allocated()) GTEST_SKIP() << "not enough device memory";
  const Bytes y = [&] {
    call.poison();
    call.launch();
    return call.outputs();
  }();
  EXPECT_EQ(count_poisoned(y, 2), 0u);
  const Bytes x = call.x.read(), weight = call.weight.read();
  Bytes cpu_y(y.size());
  rmsnorm::ForwardParams p = call.params();
  p.x.data = x.data();
  p.weight.data = weight.data();
  p.y.data = cpu_y.data();
  in_parallel(rows, [&](std::int64_t begin, std::int64_t end) {
    EXPECT_TRUE(rmsnorm::cpu::forward(p, begin, end).ok());
  });
  EXPECT_LE(largest_distance(DType::bf16, y.data(), cpu_y.data(), y.size() / 2), 1);
}

// One row longer than 31 bits count. The pattern repeats, so its sum of squares is known.
TEST(FarRows, ARowBeyondTwoBillionElements) {
  if (grid_is_small()) GTEST_SKIP() << "the small grid";
  const std::int64_t n = (std::int64_t{1} << 31) + 40;
  DeviceCall call({1, n});
  DeviceMemory rstd(sizeof(float));
  if (!call.allocated()) GTEST_SKIP() << "not enough device memory";
  const std::vector<double> pattern = values(DType::bf16, make_pattern(DType::bf16, 3));
  const auto sum_of_squares = [&](std::int64_t count) {
    long double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const long double v = pattern[static_cast<std::size_t>(i)];
      sum += v * v;
    }
    return sum;
  };
  const std::int64_t period = static_cast<std::int64_t>(pattern.size());
  const long double sum =
      static_cast<long double>(n / period) * sum_of_squares(period) + sum_of_squares(n % period);
  call.poison();
  rmsnorm::ForwardParams p = call.params();
  p.rstd = vector_of(DType::f32, rstd.data(), 1);
  ASSERT_TRUE(rmsnorm::cuda::forward(p, nullptr).ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const long double exact = 1 / std::sqrt(sum / static_cast<long double>(n) + 1e-6L);
  const double got = values(DType::f32, rstd.read())[0];
  EXPECT_LE(ulp_error(DType::f32, exact, got), 1);
  for (const std::int64_t first : {std::int64_t{0}, n / 2, (std::int64_t{1} << 31) - 96, n - 128}) {
    const std::size_t place = static_cast<std::size_t>(first) * 2;
    const std::vector<double> x = values(DType::bf16, call.x.read(place, 256));
    const std::vector<double> w = values(DType::bf16, call.weight.read(place, 256));
    const std::vector<double> y = values(DType::bf16, call.y.read(place, 256));
    for (std::size_t i = 0; i < y.size(); ++i) {
      const long double exact_y = x[i] * exact * w[i];
      EXPECT_LE(ulp_error(DType::bf16, exact_y, y[i]), 0.51) << "element " << first << " + " << i;
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
