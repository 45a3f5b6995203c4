#include "instruction_sets.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "case_grid.hpp"

namespace rmsnorm_test {

using rmsnorm::cpu::Isa;

namespace {

const char* environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

std::string names(const std::vector<Isa>& isas) {
  std::string all;
  for (const Isa isa : isas) all += (all.empty() ? "" : ",") + std::string(name(isa));
  return all;
}

class InstructionSetReport : public testing::Environment {
 public:
  void TearDown() override {
    std::printf("instruction sets tested: %s; grid: %s\n", names(available_isas()).c_str(),
                grid_is_small() ? "small" : "full");
  }
};

const testing::Environment* const report =
    testing::AddGlobalTestEnvironment(new InstructionSetReport);

}  // namespace

TEST(InstructionSets, ScalarComesFirstAndAlways) {
  ASSERT_FALSE(available_isas().empty());
  EXPECT_EQ(available_isas()[0], Isa::scalar);
}

// RMSNORM_TEST_REQUIRE_ISA=avx2,avx512: a run that was meant to test these must not pass without.
TEST(InstructionSets, RequiredOnesRun) {
  std::istringstream required(environment("RMSNORM_TEST_REQUIRE_ISA"));
  for (std::string wanted; std::getline(required, wanted, ',');) {
    const std::vector<Isa> isas = available_isas();
    const bool found =
        std::any_of(isas.begin(), isas.end(), [&](Isa isa) { return wanted == name(isa); });
    EXPECT_TRUE(found) << wanted << " is required; this machine runs " << names(isas);
  }
}

TEST(InstructionSets, UnavailableOnesAreRefused) {
  for (int i = -1; i < 6; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const float x[4] = {1, 2, 3, 4};
    float y[4] = {}, mean_square = 0;
    rmsnorm::ForwardParams p;
    p.x = rmsnorm::vector(x, 4);
    p.y = rmsnorm::vector(y, 4);
    const rmsnorm::Status status = rmsnorm::cpu::forward(p, 0, 1, isa);
    rmsnorm::MeanSquareParams m;
    m.x = p.x;
    m.mean_square.data = &mean_square;
    m.mean_square.rank = 0;
    EXPECT_EQ(rmsnorm::cpu::mean_square(m, 0, 1, isa).code, status.code) << i;
    if (rmsnorm::cpu::available(isa)) {
      EXPECT_TRUE(status.ok()) << name(isa);
      EXPECT_NE(y[0], 0.0f);
      EXPECT_EQ(mean_square, 7.5f);
    } else {
      EXPECT_EQ(status.code, rmsnorm::Code::isa_unavailable) << i;
      EXPECT_EQ(status.argument, rmsnorm::Argument::isa) << i;
      EXPECT_EQ(y[0], 0.0f);
      EXPECT_EQ(mean_square, 0.0f);
    }
  }
}

TEST(InstructionSets, FoundByNameInAnyCase) {
  for (const Isa wanted : rmsnorm::cpu::every_isa) {
    std::string text = name(wanted);
    for (std::size_t i = 0; i <= text.size(); ++i) {
      Isa found = static_cast<Isa>(-1);
      EXPECT_TRUE(rmsnorm::cpu::find_isa(text.c_str(), &found)) << text;
      EXPECT_EQ(found, wanted) << text;
      if (i < text.size()) text[i] = static_cast<char>(std::toupper(text[i]));
    }
  }
}

TEST(InstructionSets, NotFoundByOtherNames) {
  for (const char* text : {"", "avx", "avx3", "avx2 ", " avx2", "avx22", "avx512f", "scala",
                           "NEON64", "\xe1vx2", "avx2\n"}) {
    Isa isa = Isa::neon;
    EXPECT_FALSE(rmsnorm::cpu::find_isa(text, &isa)) << text;
    EXPECT_EQ(isa, Isa::neon) << text;
  }
}

// CMakeLists.txt runs this with several values of RMSNORM_ISA: what a process has chosen stays.
TEST(ActiveInstructionSet, FollowsTheEnvironment) {
  std::string wanted = environment("RMSNORM_ISA");
  std::transform(wanted.begin(), wanted.end(), wanted.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const rmsnorm::cpu::IsaChoice choice = rmsnorm::cpu::active_isa();
  const std::vector<Isa> isas = available_isas();
  const bool known =
      std::any_of(isas.begin(), isas.end(), [&](Isa isa) { return wanted == name(isa); });
  if (wanted.empty()) {
    EXPECT_TRUE(choice.ok);
    EXPECT_EQ(choice.isa, isas.back()) << "the widest one should be in use";
  } else {
    EXPECT_EQ(choice.ok, known);
    if (known) {
      EXPECT_EQ(name(choice.isa), wanted);
    }
  }

  const float x[4] = {1, 2, 3, 4};
  float y[4] = {};
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::vector(x, 4);
  p.y = rmsnorm::vector(y, 4);
  const rmsnorm::Status status = rmsnorm::cpu::forward(p, 0, 1);
  if (choice.ok) {
    EXPECT_TRUE(status.ok());
    EXPECT_NE(y[0], 0.0f);
  } else {
    EXPECT_EQ(status.code, rmsnorm::Code::isa_unavailable);
    EXPECT_EQ(status.argument, rmsnorm::Argument::isa);
    EXPECT_EQ(y[0], 0.0f);
  }
}

}  // namespace rmsnorm_test
