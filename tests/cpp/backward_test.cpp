// What only the CPU's backward has: splits over threads, ranges, the caller's workspace.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "case_grid.hpp"
#include "gradient_implementations.hpp"
#include "instruction_sets.hpp"

namespace rmsnorm_test {
namespace {

using rmsnorm::Argument;
using rmsnorm::BackwardParams;
using rmsnorm::Code;
using rmsnorm::Status;
using rmsnorm::cpu::BackwardPass;

std::int64_t columns_of(const BackwardParams& p) {
  std::int64_t n = 1;
  for (int d = p.axis < 0 ? p.x.rank + p.axis : p.axis; d < p.x.rank; ++d) n *= p.x.sizes[d];
  return n;
}

// Parts of [0, count) in random order.
std::vector<Range> random_parts(std::int64_t count, Random& random) {
  std::vector<Range> parts;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t end = std::min(count, i + 1 + random.below(count));
    parts.push_back({i, end});
    i = end;
  }
  for (std::size_t i = parts.size(); i-- > 1;) {
    std::swap(parts[i], parts[static_cast<std::size_t>(random.below(std::int64_t(i) + 1))]);
  }
  return parts;
}

using PartOfPass = Status (BackwardPass::*)(std::int64_t, std::int64_t) const;

// A thread for each of the parts; a status that is not ok, where there is one.
Status run_on_threads(const BackwardPass& pass, PartOfPass part, std::int64_t count,
                      Random& random) {
  const std::vector<Range> parts = random_parts(count, random);
  std::vector<Status> statuses(parts.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    threads.emplace_back([&, i] { statuses[i] = (pass.*part)(parts[i].first, parts[i].second); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return {};
}

TEST(Backward, AnySplitGivesTheBitsOfTheWhole) {
  Random random(17);
  const GradientImplementation& f = gradient_implementations().back();
  for (const GradientCase& c : gradient_cases()) {
    BackwardProblem problem(c, f.workspace_bytes);
    const GradientResults whole = f.run(problem);
    const auto in_parts = [&](const BackwardParams& p) {
      Status status;
      for (const Range& r : random_parts(rmsnorm::cpu::backward_blocks(p), random)) {
        if (status.ok()) status = rmsnorm::cpu::backward(p, r.first, r.second);
      }
      for (const Range& r : random_parts(columns_of(p), random)) {
        if (status.ok()) status = rmsnorm::cpu::backward_reduce(p, r.first, r.second);
      }
      return status;
    };
    expect_same(c, whole, problem.run(in_parts, "in parts"), f.name);
    if (HasFailure()) break;
  }
}

// What is written must not depend on the threads that run parts of one pass.
TEST(Backward, PartsOfAPassOnSeveralThreadsGiveTheBitsOfTheFunctions) {
  Random random(18);
  const GradientImplementation& f = gradient_implementations().back();
  for (const GradientCase& c : gradient_cases()) {
    BackwardProblem problem(c, f.workspace_bytes);
    const GradientResults whole = f.run(problem);
    const auto on_threads = [&](const BackwardParams& p) {
      const BackwardPass pass(p);
      Status status = run_on_threads(pass, &BackwardPass::run, pass.blocks(), random);
      if (status.ok()) status = run_on_threads(pass, &BackwardPass::reduce, pass.columns(), random);
      return status;
    };
    expect_same(c, whole, problem.run(on_threads, "a pass on threads"), f.name);
    if (HasFailure()) break;
  }
}

// A good call with every tensor that can be given at once; (2, 3, 8) over the last axis.
struct GoodBackward {
  GoodBackward() {
    p.dy = rmsnorm::matrix(dy, 6, 8);
    p.x = rmsnorm::matrix(x, 6, 8);
    p.residual = rmsnorm::matrix(residual, 6, 8);
    p.weight = rmsnorm::vector(weight, 8);
    p.rstd = rmsnorm::vector(rstd, 6);
    p.d_residual = rmsnorm::matrix(d_residual, 6, 8);
    p.dx = rmsnorm::matrix(dx, 6, 8);
    p.dweight = rmsnorm::vector(dweight, 8);
    p.dbias = rmsnorm::vector(dbias, 8);
    p.workspace = workspace;
    p.workspace_bytes = sizeof workspace;
  }
  void give_mean_square() {
    p.mean_square = rmsnorm::vector(mean_square, 6);
    p.d_mean_square = rmsnorm::vector(d_mean_square, 6);
  }
  Status run() {
    const Status status = rmsnorm::cpu::backward(p, 0, 1);
    return status.ok() ? rmsnorm::cpu::backward_reduce(p, 0, 8) : status;
  }

  float dy[48] = {}, x[48] = {}, residual[48] = {}, weight[8] = {}, rstd[6] = {};
  float mean_square[6] = {}, d_residual[48] = {}, dx[48] = {}, dweight[8] = {}, dbias[8] = {};
  float d_mean_square[6] = {};
  alignas(64) unsigned char workspace[256] = {};
  BackwardParams p;
};

struct WrongBackward {
  const char* what;
  void (*make)(GoodBackward&);
  Code code;
  Argument argument;
};

constexpr auto bad_dtype = static_cast<DType>(7);

const WrongBackward wrong_calls[] = {
    {"no x", [](GoodBackward& g) { g.p.x = {}; }, Code::missing, Argument::x},
    {"no dy", [](GoodBackward& g) { g.p.dy = {}; }, Code::missing, Argument::dy},
    {"no dx", [](GoodBackward& g) { g.p.dx = {}; }, Code::missing, Argument::dx},
    {"scalar x", [](GoodBackward& g) { g.p.x.rank = 0; }, Code::invalid_rank, Argument::x},
    {"rank nine", [](GoodBackward& g) { g.p.x.rank = 9; }, Code::invalid_rank, Argument::x},
    {"axis", [](GoodBackward& g) { g.p.axis = 2; }, Code::invalid_value, Argument::axis},
    {"dy dtype", [](GoodBackward& g) { g.p.dy.dtype = bad_dtype; }, Code::invalid_dtype,
     Argument::dy},
    {"dweight dtype", [](GoodBackward& g) { g.p.dweight.dtype = bad_dtype; }, Code::invalid_dtype,
     Argument::dweight},
    {"half rstd", [](GoodBackward& g) { g.p.rstd.dtype = DType::f16; }, Code::invalid_dtype,
     Argument::rstd},
    {"half d_mean_square",
     [](GoodBackward& g) {
       g.give_mean_square();
       g.p.d_mean_square.dtype = DType::bf16;
     },
     Code::invalid_dtype, Argument::d_mean_square},
    {"dy size", [](GoodBackward& g) { g.p.dy.sizes[1] = 7; }, Code::invalid_size, Argument::dy},
    {"dy rank", [](GoodBackward& g) { g.p.dy.rank = 1; }, Code::invalid_rank, Argument::dy},
    {"dx size", [](GoodBackward& g) { g.p.dx.sizes[0] = 5; }, Code::invalid_size, Argument::dx},
    {"d_residual size", [](GoodBackward& g) { g.p.d_residual.sizes[0] = 1; }, Code::invalid_size,
     Argument::d_residual},
    {"rstd size", [](GoodBackward& g) { g.p.rstd.sizes[0] = 5; }, Code::invalid_size,
     Argument::rstd},
    {"weight size", [](GoodBackward& g) { g.p.weight.sizes[0] = 9; }, Code::invalid_size,
     Argument::weight},
    {"dweight of another rank than weight",
     [](GoodBackward& g) {
       g.p.dweight.rank = 2;
       g.p.dweight.sizes[0] = 1;
       g.p.dweight.sizes[1] = 8;
       g.p.dweight.strides[1] = 1;
     },
     Code::invalid_rank, Argument::dweight},
    {"dweight size", [](GoodBackward& g) { g.p.dweight.sizes[0] = 7; }, Code::invalid_size,
     Argument::dweight},
    {"dbias size", [](GoodBackward& g) { g.p.dbias.sizes[0] = 7; }, Code::invalid_size,
     Argument::dbias},
    {"dweight without weight", [](GoodBackward& g) { g.p.weight = {}; }, Code::unexpected,
     Argument::dweight},
    {"d_mean_square without mean_square",
     [](GoodBackward& g) {
       g.give_mean_square();
       g.p.mean_square = {};
     },
     Code::unexpected, Argument::d_mean_square},
    {"offset without weight",
     [](GoodBackward& g) {
       g.p.weight = {};
       g.p.dweight = {};
       g.p.weight_offset = 1;
     },
     Code::unexpected, Argument::weight_offset},
    {"partial with mean_square",
     [](GoodBackward& g) {
       g.give_mean_square();
       g.p.partial = 0.5;
     },
     Code::unexpected, Argument::partial},
    {"partial", [](GoodBackward& g) { g.p.partial = 0; }, Code::invalid_value, Argument::partial},
    {"eps", [](GoodBackward& g) { g.p.eps = -1; }, Code::invalid_value, Argument::eps},
    {"weight_offset",
     [](GoodBackward& g) { g.p.weight_offset = std::numeric_limits<double>::infinity(); },
     Code::invalid_value, Argument::weight_offset},
    {"null dy", [](GoodBackward& g) { g.p.dy.data = nullptr; }, Code::null_data, Argument::dy},
    {"null dweight", [](GoodBackward& g) { g.p.dweight.data = nullptr; }, Code::null_data,
     Argument::dweight},
    {"dx over itself", [](GoodBackward& g) { g.p.dx.strides[0] = 0; }, Code::self_overlap,
     Argument::dx},
    {"dx shifted over dy", [](GoodBackward& g) { g.p.dx.data = g.dy + 1; }, Code::overlap,
     Argument::dx},
    {"dx over weight", [](GoodBackward& g) { g.p.dx.data = g.weight; }, Code::overlap,
     Argument::dx},
    {"dweight over weight", [](GoodBackward& g) { g.p.dweight.data = g.weight; }, Code::overlap,
     Argument::dweight},
    {"dweight over dbias", [](GoodBackward& g) { g.p.dweight.data = g.dbias; }, Code::overlap,
     Argument::dweight},
    {"d_mean_square over mean_square",
     [](GoodBackward& g) {
       g.give_mean_square();
       g.p.d_mean_square.data = g.mean_square;
     },
     Code::overlap, Argument::d_mean_square},
    {"no workspace", [](GoodBackward& g) { g.p.workspace = nullptr; }, Code::null_data,
     Argument::workspace},
    {"short workspace", [](GoodBackward& g) { g.p.workspace_bytes = 255; }, Code::invalid_size,
     Argument::workspace},
    {"unaligned workspace", [](GoodBackward& g) { g.p.workspace = g.workspace + 32; },
     Code::invalid_value, Argument::workspace},
    {"workspace over a tensor", [](GoodBackward& g) { g.p.dy.data = g.workspace; }, Code::overlap,
     Argument::workspace},
};

TEST(Backward, TheGoodCallIsGood) {
  GoodBackward g;
  EXPECT_EQ(rmsnorm::cpu::backward_blocks(g.p), 1);
  EXPECT_EQ(rmsnorm::cpu::backward_workspace(g.p), 256);
  EXPECT_TRUE(g.run().ok());
  g.give_mean_square();
  EXPECT_TRUE(g.run().ok());
}

TEST(Backward, WrongCallsAreNamedAndWriteNothing) {
  for (const WrongBackward& wrong : wrong_calls) {
    GoodBackward g;
    std::memset(g.dx, 0x5a, sizeof g.dx);
    wrong.make(g);
    GoodBackward before = g;
    const Status status = g.run();
    EXPECT_EQ(status.code, wrong.code) << wrong.what;
    EXPECT_EQ(status.argument, wrong.argument)
        << wrong.what << ": " << rmsnorm::name(status.argument);
    EXPECT_EQ(std::memcmp(before.dx, g.dx, sizeof g.dx), 0) << wrong.what;
    EXPECT_EQ(std::memcmp(before.dweight, g.dweight, sizeof g.dweight), 0) << wrong.what;
    EXPECT_EQ(std::memcmp(before.dbias, g.dbias, sizeof g.dbias), 0) << wrong.what;
    EXPECT_EQ(std::memcmp(before.workspace, g.workspace, sizeof g.workspace), 0) << wrong.what;
    if (status.argument != Argument::workspace) {
      EXPECT_EQ(rmsnorm::cpu::backward_blocks(g.p), 0) << wrong.what;
      EXPECT_EQ(rmsnorm::cpu::backward_workspace(g.p), 0) << wrong.what;
    }
  }
}

void expect_status(const Status& status, Code code, Argument argument, const char* what) {
  EXPECT_EQ(status.code, code) << what;
  EXPECT_EQ(status.argument, argument) << what << ": " << rmsnorm::name(status.argument);
}

TEST(BackwardPass, HasTheNumbersOfTheFunctions) {
  GoodBackward g;
  const BackwardPass pass(g.p);
  EXPECT_TRUE(pass.status().ok());
  EXPECT_EQ(pass.blocks(), rmsnorm::cpu::backward_blocks(g.p));
  EXPECT_EQ(pass.workspace_bytes(), rmsnorm::cpu::backward_workspace(g.p));
  EXPECT_EQ(pass.columns(), 8);
}

TEST(BackwardPass, RefusesWhatTheFunctionsRefuse) {
  for (const WrongBackward& wrong : wrong_calls) {
    GoodBackward g;
    std::memset(g.dx, 0x5a, sizeof g.dx);
    wrong.make(g);
    const GoodBackward before = g;
    BackwardPass pass(g.p);
    expect_status(pass.set_workspace(g.p.workspace, g.p.workspace_bytes), wrong.code,
                  wrong.argument, wrong.what);
    expect_status(pass.run(0, 1), wrong.code, wrong.argument, wrong.what);
    expect_status(pass.reduce(0, pass.columns()), wrong.code, wrong.argument, wrong.what);
    EXPECT_EQ(std::memcmp(before.dx, g.dx, sizeof g.dx), 0) << wrong.what;
    EXPECT_EQ(std::memcmp(before.dweight, g.dweight, sizeof g.dweight), 0) << wrong.what;
    EXPECT_EQ(std::memcmp(before.workspace, g.workspace, sizeof g.workspace), 0) << wrong.what;
    if (wrong.argument == Argument::workspace) {
      EXPECT_TRUE(pass.status().ok()) << wrong.what;
      continue;
    }
    expect_status(pass.status(), wrong.code, wrong.argument, wrong.what);
    expect_status(pass.run(-1, 0, static_cast<Isa>(17)), wrong.code, wrong.argument, wrong.what);
    EXPECT_EQ(pass.blocks(), 0) << wrong.what;
    EXPECT_EQ(pass.columns(), 0) << wrong.what;
    EXPECT_EQ(pass.workspace_bytes(), 0) << wrong.what;
  }
}

// None that was set before is kept in place of one that is refused.
TEST(BackwardPass, TheWorkspaceIsTheOneThatWasSetLast) {
  GoodBackward g;
  g.p.workspace = nullptr;
  BackwardPass pass(g.p);
  expect_status(pass.run(0, 1), Code::null_data, Argument::workspace, "none");
  expect_status(pass.reduce(0, 8), Code::null_data, Argument::workspace, "none");
  EXPECT_TRUE(pass.set_workspace(g.workspace, 256).ok());
  EXPECT_TRUE(pass.run(0, 1).ok());
  expect_status(pass.set_workspace(g.workspace + 32, 256), Code::invalid_value, Argument::workspace,
                "unaligned");
  expect_status(pass.reduce(0, 8), Code::invalid_value, Argument::workspace, "after unaligned");
  expect_status(pass.set_workspace(g.workspace, 255), Code::invalid_size, Argument::workspace,
                "short");
  EXPECT_TRUE(pass.set_workspace(g.workspace, 256).ok());
  EXPECT_TRUE(pass.reduce(0, 8).ok());
}

TEST(BackwardPass, WithoutSumsNeedsNoWorkspace) {
  GoodBackward g;
  g.p.dweight = g.p.dbias = {};
  g.p.workspace = nullptr;
  g.p.workspace_bytes = 0;
  const BackwardPass pass(g.p);
  EXPECT_EQ(pass.workspace_bytes(), 0);
  EXPECT_TRUE(pass.run(0, 1).ok());
  EXPECT_TRUE(pass.reduce(0, 8).ok());
}

// What is wrong with a call's range or ISA comes before what is wrong with the workspace.
TEST(BackwardPass, RangesAreChecked) {
  GoodBackward g;
  for (const std::int64_t bytes : {0, 256}) {
    BackwardPass pass(g.p);
    pass.set_workspace(g.workspace, bytes);
    for (const Range& r : {Range{-1, 1}, Range{0, 2}, Range{1, 0}}) {
      expect_status(pass.run(r.first, r.second), Code::invalid_value, Argument::blocks, "run");
    }
    for (const Range& r : {Range{-1, 1}, Range{0, 9}, Range{3, 2}}) {
      expect_status(pass.reduce(r.first, r.second), Code::invalid_value, Argument::columns,
                    "reduce");
    }
    const auto unavailable = static_cast<Isa>(17);
    EXPECT_EQ(pass.run(0, 1, unavailable).code, Code::isa_unavailable);
    EXPECT_EQ(pass.reduce(0, 8, unavailable).code, Code::isa_unavailable);
  }
}

// The parameters are gone when it runs, the tensors' memory is not.
TEST(BackwardPass, HasACopyOfTheParameters) {
  GoodBackward g, expected;
  for (GoodBackward* each : {&g, &expected}) {
    std::fill(std::begin(each->dy), std::end(each->dy), 2.0f);
    std::fill(std::begin(each->x), std::end(each->x), 3.0f);
    std::fill(std::begin(each->rstd), std::end(each->rstd), 0.25f);
  }
  ASSERT_TRUE(expected.run().ok());
  const BackwardPass pass(g.p);
  std::memset(static_cast<void*>(&g.p), 0xff, sizeof g.p);
  ASSERT_TRUE(pass.run(0, pass.blocks()).ok());
  ASSERT_TRUE(pass.reduce(0, pass.columns()).ok());
  EXPECT_EQ(std::memcmp(g.dx, expected.dx, sizeof g.dx), 0);
  EXPECT_EQ(std::memcmp(g.dweight, expected.dweight, sizeof g.dweight), 0);
  EXPECT_EQ(std::memcmp(g.dbias, expected.dbias, sizeof g.dbias), 0);
  EXPECT_NE(g.dweight[0], 0.0f);
}

TEST(Backward, RangesAreChecked) {
  GoodBackward g;
  for (const Range& r : {Range{-1, 1}, Range{0, 2}, Range{1, 0}}) {
    const Status status = rmsnorm::cpu::backward(g.p, r.first, r.second);
    EXPECT_EQ(status.code, Code::invalid_value);
    EXPECT_EQ(status.argument, Argument::blocks);
  }
  for (const Range& r : {Range{-1, 1}, Range{0, 9}, Range{3, 2}}) {
    const Status status = rmsnorm::cpu::backward_reduce(g.p, r.first, r.second);
    EXPECT_EQ(status.code, Code::invalid_value);
    EXPECT_EQ(status.argument, Argument::columns);
  }
  const auto unavailable = static_cast<Isa>(17);
  EXPECT_EQ(rmsnorm::cpu::backward(g.p, 0, 1, unavailable).code, Code::isa_unavailable);
  EXPECT_EQ(rmsnorm::cpu::backward_reduce(g.p, 0, 8, unavailable).code, Code::isa_unavailable);
}

rmsnorm::Tensor view_of(float* data, std::initializer_list<std::int64_t> sizes,
                        std::initializer_list<std::int64_t> strides) {
  rmsnorm::Tensor t;
  t.data = data;
  t.rank = static_cast<std::int32_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), t.sizes);
  std::copy(strides.begin(), strides.end(), t.strides);
  return t;
}

BackwardParams call_on(const rmsnorm::Tensor& x) {
  BackwardParams p;
  p.x = p.dy = p.dx = x;
  return p;
}

// A sixteenth of the rows that share their gradients, from 8 to 64; no block spans two groups.
TEST(Backward, BlocksDependOnTheRowsThatShareGradients) {
  struct Expected {
    std::int64_t groups, rows, blocks;
  };
  float memory = 0, sums[4] = {};
  for (const Expected& e : {Expected{1, 1, 1},
                            {1, 8, 1},
                            {1, 9, 2},
                            {1, 143, 18},
                            {1, 144, 16},
                            {1, 1023, 17},
                            {1, 1024, 16},
                            {1, 1 << 20, 1 << 14},
                            {3, 9, 6},
                            {3, 1 << 20, 3 << 14}}) {
    BackwardParams p = call_on(view_of(&memory, {e.rows, e.groups, 1}, {0, 0, 1}));
    p.dx = view_of(nullptr, {e.rows, e.groups, 1}, {e.groups, 1, 1});
    p.dx.data = reinterpret_cast<void*>(std::uintptr_t{1} << 40);  // never touched
    p.dbias = view_of(sums, {e.groups, 1}, {1, 1});
    EXPECT_EQ(rmsnorm::cpu::backward_blocks(p), e.blocks) << e.groups << " x " << e.rows;
    // A row of 32 floats for each block's sums of one element.
    EXPECT_EQ(rmsnorm::cpu::backward_workspace(p), 128 * e.blocks) << e.groups << " x " << e.rows;
  }
}

// Strides of tensors without elements mean nothing, also where they say that an output is the same
// for all rows.
TEST(Backward, EmptyOutputsAreNotWritten) {
  constexpr std::int64_t far = std::numeric_limits<std::int64_t>::max();
  float memory[9];
  std::fill(std::begin(memory), std::end(memory), 7.0f);
  for (float* data : {memory, static_cast<float*>(nullptr)}) {
    for (const std::int64_t stride : {std::int64_t{0}, std::int64_t{9}, far, -far}) {
      BackwardParams p = call_on(view_of(data, {0, 9}, {stride, 1}));
      p.weight = p.dweight = p.dbias = p.dx;
      p.rstd = p.mean_square = p.d_mean_square = view_of(data, {0}, {stride});
      EXPECT_EQ(rmsnorm::cpu::backward_blocks(p), 0);
      EXPECT_EQ(rmsnorm::cpu::backward_workspace(p), 0);
      EXPECT_TRUE(rmsnorm::cpu::backward(p, 0, 0).ok());
      EXPECT_TRUE(rmsnorm::cpu::backward_reduce(p, 0, 9).ok());
    }
  }
  for (const float v : memory) EXPECT_EQ(v, 7.0f);
}

// An array has a place for each of them, and those that backward lists with its workspace are all.
TEST(Backward, AWorkspaceOverAnyTensorIsRefused) {
  alignas(64) static float tensors[11][16], workspace[96];
  const char* const names[] = {"x",       "dy",          "residual",     "weight",
                               "rstd",    "mean_square", "d_residual",   "dx",
                               "dweight", "dbias",       "d_mean_square"};
  BackwardParams all;
  int count = 0;
  rmsnorm::detail::for_each_tensor(all, [&](Argument argument, auto& t) {
    EXPECT_STREQ(name(argument), names[count]);
    const bool per_row = argument == Argument::rstd || argument == Argument::mean_square ||
                         argument == Argument::d_mean_square;
    t = per_row ? view_of(tensors[count], {2}, {1})
        : argument == Argument::weight || argument == Argument::dweight ||
                argument == Argument::dbias
            ? view_of(tensors[count], {8}, {1})
            : view_of(tensors[count], {2, 8}, {8, 1});
    ++count;
  });
  ASSERT_EQ(count, 11);
  all.workspace = workspace;
  all.workspace_bytes = rmsnorm::cpu::backward_workspace(all);
  ASSERT_LE(all.workspace_bytes, static_cast<std::int64_t>(sizeof workspace));
  EXPECT_TRUE(rmsnorm::cpu::backward(all, 0, 1).ok());
  for (auto& memory : tensors) {
    BackwardParams over = all;
    over.workspace = memory;
    const Status status = rmsnorm::cpu::backward(over, 0, 1);
    EXPECT_EQ(status.code, Code::overlap);
    EXPECT_EQ(status.argument, Argument::workspace);
  }
}

// Gradients that vary over 2^55 rows, of which all but those of dx may be one in memory.
TEST(Backward, AWorkspaceBeyond64BitsIsThatOfNobody) {
  constexpr std::int64_t rows = std::int64_t{1} << 55;
  float memory[8] = {};
  const auto far = [](int exponent) {  // never touched
    rmsnorm::Tensor t = view_of(nullptr, {rows, 8}, {8, 1});
    t.data = reinterpret_cast<void*>(std::uintptr_t{1} << exponent);
    return t;
  };
  BackwardParams p = call_on(view_of(memory, {rows, 8}, {0, 1}));
  p.weight = view_of(memory, {rows, 8}, {0, 1});
  p.dx = far(61);
  p.dweight = far(62);
  p.dbias = far(63);
  EXPECT_EQ(rmsnorm::cpu::backward_workspace(p), std::numeric_limits<std::int64_t>::max());
  alignas(64) static float workspace[16];
  p.workspace = workspace;
  p.workspace_bytes = std::numeric_limits<std::int64_t>::max() - 1;
  EXPECT_EQ(rmsnorm::cpu::backward(p, 0, 1).code, Code::invalid_size);
  EXPECT_EQ(rmsnorm::cpu::backward_reduce(p, 0, 8).code, Code::invalid_size);
}

// Sums of no rows are written as the zeros that they are: a walk over the 2^40 pairs of the two
// outputs' rows would not end.
TEST(Backward, GroupsWithoutRowsAreNotVisited) {
  constexpr std::int64_t count = 1 << 20;
  std::vector<float> dweight(count * 2, 7), dbias(count * 2, 7);
  float weight[2] = {1, 1};
  BackwardParams p = call_on(view_of(nullptr, {count, count, 0, 2}, {0, 0, 0, 1}));
  p.weight = view_of(weight, {count, 1, 1, 2}, {0, 0, 0, 1});
  p.dweight = view_of(dweight.data(), {count, 1, 1, 2}, {2, 0, 0, 1});
  p.dbias = view_of(dbias.data(), {count, 1, 2}, {2, 0, 1});
  EXPECT_EQ(rmsnorm::cpu::backward_blocks(p), 0);
  EXPECT_EQ(rmsnorm::cpu::backward_workspace(p), 0);
  EXPECT_TRUE(rmsnorm::cpu::backward_reduce(p, 0, 2).ok());
  EXPECT_EQ(std::count(dweight.begin(), dweight.end(), 0.0f), 2 * count);
  EXPECT_EQ(std::count(dbias.begin(), dbias.end(), 0.0f), 2 * count);
}

// Otherwise this test would not end.
TEST(Backward, RowsWithoutElementsAreNotVisited) {
  BackwardParams p = call_on(view_of(nullptr, {std::int64_t{1} << 50, 0}, {0, 1}));
  p.dbias = view_of(nullptr, {0}, {1});
  EXPECT_TRUE(rmsnorm::cpu::backward(p, 0, rmsnorm::cpu::backward_blocks(p)).ok());
  EXPECT_TRUE(rmsnorm::cpu::backward_reduce(p, 0, 0).ok());
}

// With one size of zero there is nothing to compute, whatever the product of the others.
TEST(Backward, EmptyTensorsMayHaveSizesWhoseProductsExceed64Bits) {
  constexpr std::int64_t large = std::int64_t{1} << 40,
                         most = std::numeric_limits<std::int64_t>::max();
  for (const std::initializer_list<std::int64_t>& sizes :
       {std::initializer_list<std::int64_t>{0, large, large},
        {large, large, 0},
        {large, 0, large},
        {0, large << 22, 1},
        {most, most, 0},
        {0, most, most},
        {most, 0, most}}) {
    for (const int axis : {0, 1, 2}) {
      BackwardParams p = call_on(view_of(nullptr, sizes, {1, 1, 1}));
      p.axis = axis;
      p.weight = p.dweight = p.dbias = p.dx;  // vary over all dimensions
      EXPECT_EQ(rmsnorm::cpu::backward_blocks(p), 0);
      EXPECT_EQ(rmsnorm::cpu::backward_workspace(p), 0);
      EXPECT_TRUE(rmsnorm::cpu::backward(p, 0, 0).ok());
      const bool has_columns = std::find(sizes.begin() + axis, sizes.end(), 0) == sizes.end();
      EXPECT_TRUE(rmsnorm::cpu::backward_reduce(p, 0, has_columns ? 1 : 0).ok());
      rmsnorm::ForwardParams f;
      f.x = f.residual = f.weight = f.bias = p.x;
      f.y = f.residual_out = p.dx;
      f.axis = axis;
      EXPECT_TRUE(rmsnorm::cpu::forward(f, 0, row_count(f.x, axis)).ok());
    }
  }
}

TEST(Backward, WithoutSumsNeedsNoWorkspace) {
  GoodBackward g;
  g.p.dweight = g.p.dbias = {};
  g.p.workspace = nullptr;
  g.p.workspace_bytes = 0;
  EXPECT_EQ(rmsnorm::cpu::backward_workspace(g.p), 0);
  EXPECT_TRUE(g.run().ok());
}

}  // namespace
}  // namespace rmsnorm_test
