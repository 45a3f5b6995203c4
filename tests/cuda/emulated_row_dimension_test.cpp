// Division of row indices by multiplication.
#include <gtest/gtest.h>

#include "float_formats.hpp"
#include "rmsnorm/cuda/elements.cuh"

namespace rmsnorm_test {
namespace {

using rmsnorm::cuda::detail::make_row_dimension;
using rmsnorm::cuda::detail::RowDimension;

constexpr std::int64_t end = std::int64_t{1} << 31;

void expect_quotient(const RowDimension& d, std::int64_t size, std::int64_t index) {
  if (index < 0 || index >= end) return;
  const auto i = static_cast<unsigned>(index);
  ASSERT_EQ((__umulhi(i, d.multiplier) + i) >> d.shift, index / size) << index << " / " << size;
}

void expect_division(std::int64_t size, Random& random) {
  const RowDimension d = make_row_dimension(size);
  ASSERT_EQ(d.size, size);
  const std::int64_t last = (end - 1) / size * size;  // the last multiple
  for (const std::int64_t multiple : {std::int64_t{0}, size, 2 * size, last - size, last}) {
    for (const std::int64_t beside : {-1, 0, 1}) expect_quotient(d, size, multiple + beside);
  }
  expect_quotient(d, size, end - 1);
  for (int i = 0; i < 40; ++i) {
    const std::int64_t index = random.below(end);
    expect_quotient(d, size, index);
    expect_quotient(d, size, index / size * size);
    expect_quotient(d, size, index / size * size - 1);
  }
}

TEST(RowDimension, DividesEveryIndex) {
  Random random(17);
  for (std::int64_t size = 1; size < 3000; ++size) expect_division(size, random);
  for (int shift = 11; shift <= 31; ++shift) {
    for (std::int64_t beside = -20; beside <= 20; ++beside) {
      const std::int64_t size = (std::int64_t{1} << shift) + beside;
      if (size < end) expect_division(size, random);
    }
  }
  for (int i = 0; i < 20000; ++i) {
    expect_division(1 + random.below(std::int64_t{1} << (1 + random.below(31))), random);
  }
}

}  // namespace
}  // namespace rmsnorm_test
