// NaNs rounded to bf16: by the CPU's kernels, which test for those alone that could be carried
// into.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "instruction_sets.hpp"
#include "rmsnorm/rmsnorm.hpp"

namespace rmsnorm_test {
namespace {

// Every NaN of bf16, behind the part that counts, under each weight; and NaNs as f32 weights, where
// all bits of the payload may be set. The others stay what they are.
TEST(Bfloat16, EveryNanBecomesAQuietOne) {
  constexpr std::int64_t counted = 64, nans = 254, length = counted + nans;
  const auto nan_bits = [](std::int64_t i) {
    const auto payload = static_cast<std::uint16_t>(i / 2 + 1);
    return static_cast<std::uint16_t>((i % 2 != 0 ? 0x8000 : 0) | 0x7f80 | payload);
  };
  const auto is_quiet_nan = [](rmsnorm::bfloat16 v) {
    return (v.bits & 0x7f80) == 0x7f80 && (v.bits & 0x40) != 0;
  };
  std::vector<rmsnorm::bfloat16> x(length, {0x3f80}), ones(length, {0x3f80}), sum(length),
      y(length);
  for (std::int64_t i = 0; i < nans; ++i) x[static_cast<std::size_t>(counted + i)] = {nan_bits(i)};
  std::vector<float> weight(length, 1.0f);
  for (std::size_t i = 1; i < counted; i += 2) {
    const std::uint32_t bits = i % 4 == 1 ? 0x7fffffffu : i % 8 == 3 ? 0xffffffffu : 0x7f800001u;
    std::memcpy(&weight[i], &bits, sizeof(bits));
  }
  for (const rmsnorm::cpu::Isa isa : available_isas()) {
    for (const int weights : {0, 1, 2}) {
      for (const bool add : {false, true}) {
        rmsnorm::ForwardParams p;
        p.x = rmsnorm::vector(x.data(), length);
        if (weights == 1) p.weight = rmsnorm::vector(ones.data(), length);
        if (weights == 2) p.weight = rmsnorm::vector(weight.data(), length);
        p.y = rmsnorm::vector(y.data(), length);
        if (add) p.residual = rmsnorm::vector(ones.data(), length);
        if (add) p.residual_out = rmsnorm::vector(sum.data(), length);
        p.partial = static_cast<double>(counted) / length;
        for (const auto rounding : {rmsnorm::Rounding::once, rmsnorm::Rounding::before_weight}) {
          p.rounding = rounding;
          ASSERT_TRUE(rmsnorm::cpu::forward(p, 0, 1, isa).ok());
          for (std::int64_t i = 0; i < length; ++i) {
            const auto k = static_cast<std::size_t>(i);
            const bool is_nan = i >= counted || (weights == 2 && i % 2 != 0);
            ASSERT_EQ(is_quiet_nan(y[k]), is_nan) << name(isa) << ' ' << weights << add << ' ' << i;
            ASSERT_TRUE(is_nan || y[k].bits == 0x3f80) << name(isa) << ' ' << weights << add << i;
            ASSERT_TRUE(!add || is_quiet_nan(sum[k]) == (i >= counted)) << name(isa) << i;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rmsnorm_test
