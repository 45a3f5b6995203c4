// Every wrong input is refused with its code and argument before a byte is written.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "forward_problem.hpp"
#include "wrong_calls.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::Argument;
using rmsnorm::Code;
using rmsnorm::ForwardParams;
using rmsnorm::MeanSquareParams;
using rmsnorm::Status;

TEST(Status, OfTheGoodCall) {
  GoodCall plain, given;
  EXPECT_TRUE(check(plain.p).ok());
  EXPECT_TRUE(rmsnorm::cpu::forward(plain.p, 0, 6).ok());
  given.give_mean_square();
  EXPECT_TRUE(check(given.p).ok());
  given.p.axis = -1;
  given.p.eps = 0;
  EXPECT_TRUE(rmsnorm::cpu::forward(given.p, 0, 6).ok());
}

TEST(Status, OfEveryWrongCall) {
  for (const WrongCall& wrong : wrong_calls()) {
    GoodCall g;
    wrong.make(g);
    const std::vector<unsigned char> before = bytes_of(g);
    for (const Status status : {check(g.p), rmsnorm::cpu::forward(g.p, 0, 6),
                                rmsnorm::cpu::forward(g.p, 0, 6, Isa::scalar)}) {
      EXPECT_EQ(status.code, wrong.code) << wrong.what << ": " << text(status.code);
      EXPECT_EQ(status.argument, wrong.argument) << wrong.what << ": " << name(status.argument);
      EXPECT_FALSE(status.ok()) << wrong.what;
    }
    EXPECT_EQ(bytes_of(g), before) << wrong.what;
  }
}

TEST(Status, OfRowRanges) {
  GoodCall g;
  const std::vector<unsigned char> before = bytes_of(g);
  constexpr auto most = std::numeric_limits<std::int64_t>::max();
  const Range wrong[] = {{-1, 3}, {0, 7}, {4, 3}, {7, 7}, {-2, -1}, {0, most}, {-most, 6}};
  for (const Range& r : wrong) {
    const Status status = rmsnorm::cpu::forward(g.p, r.first, r.second);
    EXPECT_EQ(status.code, Code::invalid_value) << r.first << ',' << r.second;
    EXPECT_EQ(status.argument, Argument::rows) << r.first << ',' << r.second;
  }
  for (const Range& r : {Range{0, 0}, {3, 3}, {6, 6}}) {
    EXPECT_TRUE(rmsnorm::cpu::forward(g.p, r.first, r.second).ok());
  }
  EXPECT_EQ(bytes_of(g), before);
}

TEST(Status, RowCount) {
  GoodCall g;
  EXPECT_EQ(rmsnorm::row_count(g.p.x, -1), 6);
  EXPECT_EQ(rmsnorm::row_count(g.p.x, 2), 6);
  EXPECT_EQ(rmsnorm::row_count(g.p.x, 1), 2);
  EXPECT_EQ(rmsnorm::row_count(g.p.x, -3), 1);
  g.p.x.sizes[0] = 0;
  EXPECT_EQ(rmsnorm::row_count(g.p.x, -1), 0);
}

TEST(Status, OfMeanSquare) {
  GoodCall g;
  const MeanSquareParams good = good_mean_square(g);
  EXPECT_TRUE(check(good).ok());
  EXPECT_TRUE(rmsnorm::cpu::mean_square(good, 0, 6).ok());
  const std::vector<unsigned char> before = bytes_of(g);
  for (const WrongMeanSquare& wrong : wrong_mean_squares()) {
    MeanSquareParams p = good;
    wrong.make(p);
    const Status status = rmsnorm::cpu::mean_square(p, 0, 6);
    EXPECT_EQ(status.code, wrong.code) << wrong.what << ": " << text(status.code);
    EXPECT_EQ(status.argument, wrong.argument) << wrong.what << ": " << name(status.argument);
    EXPECT_EQ(check(p).code, wrong.code) << wrong.what;
  }
  EXPECT_EQ(rmsnorm::cpu::mean_square(good, 0, 7).argument, Argument::rows);
  EXPECT_EQ(rmsnorm::cpu::mean_square(good, 5, 4).argument, Argument::rows);
  EXPECT_EQ(bytes_of(g), before);
}

TEST(Status, EveryCodeAndArgumentHasWords) {
  std::vector<std::string> seen;
  for (std::int32_t i = 0; i <= static_cast<std::int32_t>(Code::unaddressable); ++i) {
    const std::string words = rmsnorm::text(static_cast<Code>(i));
    EXPECT_EQ(words.find("unknown"), std::string::npos) << i;
    EXPECT_EQ(std::count(seen.begin(), seen.end(), words), 0) << words;
    seen.push_back(words);
  }
  for (std::int32_t i = 1; i <= static_cast<std::int32_t>(Argument::isa); ++i) {
    const std::string words = rmsnorm::name(static_cast<Argument>(i));
    EXPECT_FALSE(words.empty());
    EXPECT_NE(words, "unknown") << i;
  }
  EXPECT_NE(rmsnorm::text(static_cast<Code>(1000)), nullptr);
  EXPECT_NE(rmsnorm::name(static_cast<Argument>(1000)), nullptr);
  EXPECT_NE(rmsnorm::name(static_cast<DType>(4)), nullptr);
}

}  // namespace
}  // namespace rmsnorm_test
