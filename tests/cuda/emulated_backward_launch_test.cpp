// What backward launches, on which device, and what becomes of errors: seen by the emulation.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <thread>
#include <vector>

#include "case_grid.hpp"
#include "emulated_calls.hpp"
#include "rmsnorm/cuda/shape.hpp"

namespace rmsnorm_test {
namespace {

using cuda_emulation::last_launch;
using cuda_emulation::LastLaunch;
using cuda_emulation::launch_before_last;
using rmsnorm::Argument;
using rmsnorm::BackwardParams;
using rmsnorm::Code;
using rmsnorm::Status;
using rmsnorm::cuda::detail::gradient_rows_per_block;

GradientCase plain(DType t, std::int64_t rows, std::int64_t n) {
  GradientCase c;
  c.forward.sizes = {rows, n};
  c.dy = c.forward.x = c.forward.weight = c.dx = c.dweight = tensor(t);
  c.forward.rstd = tensor(c.compute_type());
  return c;
}

struct Launches {
  LastLaunch rows, sums;  // without sums, `rows` alone
};

Launches launches_of(const GradientCase& c, const LaunchOptions& options = {}) {
  const std::uint64_t before = last_launch().launches;
  const std::uint64_t expected = c.dweight.present || c.dbias.present ? 2 : 1;
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
  run_on_device(problem, options);
  EXPECT_EQ(last_launch().launches, before + expected) << describe(c);
  if (expected == 1) return {last_launch(), {}};
  return {launch_before_last(), last_launch()};
}

// ---- shapes ----

// How rows of a number of 16-byte vectors are to run.
struct Shape {
  std::int64_t vectors;
  unsigned threads, teams, cluster;
  unsigned in_registers;     // vectors of a thread; 0: staged or read again
  std::size_t staged_bytes;  // of a block; 0: none
};

constexpr Shape shapes_everywhere[] = {
    {1, 1, 256, 1, 1, 0},  {3, 4, 64, 1, 1, 0},   {16, 16, 16, 1, 1, 0},  {17, 32, 8, 1, 1, 0},
    {32, 32, 8, 1, 1, 0},  {33, 32, 8, 1, 2, 0},  {64, 32, 8, 1, 2, 0},   {65, 64, 1, 1, 2, 0},
    {128, 64, 1, 1, 2, 0}, {129, 96, 1, 1, 2, 0}, {512, 256, 1, 1, 2, 0}, {1024, 512, 1, 1, 2, 0},
};
constexpr std::size_t piece = 512 * 32;  // a vector of dy and one of x of each thread of a block
constexpr Shape shapes_of_75[] = {{1025, 512, 1, 1, 0, 3 * piece}, {1537, 512, 1, 1, 0, 0}};
constexpr Shape shapes_of_80[] = {{1537, 512, 1, 1, 0, 4 * piece}, {5121, 512, 1, 1, 0, 0}};
constexpr Shape shapes_of_90[] = {
    {1025, 288, 1, 2, 2, 0}, {2048, 512, 1, 2, 2, 0},         {4096, 512, 1, 4, 2, 0},
    {8192, 512, 1, 8, 2, 0}, {8193, 512, 1, 8, 0, 3 * piece},
};

std::vector<Shape> shapes_here() {
  std::vector<Shape> shapes(std::begin(shapes_everywhere), std::end(shapes_everywhere));
  const auto append = [&](const auto& more) {
    for (const Shape& s : more) shapes.push_back(s);
  };
  if (device_version() == 75) append(shapes_of_75);
  if (device_version() == 80) append(shapes_of_80);
  if (device_version() == 90) append(shapes_of_90);
  return shapes;
}

TEST(EmulatedBackwardLaunch, RowsRunInTheirShape) {
  for (const DType t : all_dtypes) {
    std::set<const void*> kernels[3];
    for (const Shape& s : shapes_here()) {
      const std::int64_t n = s.vectors * 16 / rmsnorm::size_in_bytes(t);
      const std::int64_t rows = s.vectors > 1024 ? 5 : 3 * s.teams + 5;
      if (rows * n > 40000 && t != DType::f64) continue;
      const GradientCase c = plain(t, rows, n);
      const Launches launches = launches_of(c);
      const LastLaunch& l = launches.rows;
      const std::int64_t each = gradient_rows_per_block(rows, s.vectors);
      EXPECT_EQ(each % s.teams, 0);
      EXPECT_EQ(l.block.x, s.threads) << describe(c);
      EXPECT_EQ(l.block.y, s.teams) << describe(c);
      EXPECT_EQ(l.grid.x, (rows + each - 1) / each) << describe(c);
      EXPECT_EQ(l.grid.y, s.cluster) << describe(c);
      EXPECT_EQ(l.cluster.y, s.cluster) << describe(c);
      EXPECT_EQ(l.grid.z * l.cluster.x, 1u) << describe(c);
      const bool meets = s.threads > 32 || s.cluster > 1;
      const std::size_t reduction = meets ? 2 * 16 * s.cluster * (s.threads / 32) : 0;
      const std::size_t size = t == DType::f64 ? 8 : 4;
      const std::size_t sums = s.teams > 1 ? s.teams * static_cast<std::size_t>(n) * size : 0;
      EXPECT_EQ(l.shared_bytes, reduction + s.staged_bytes + sums) << describe(c);
      kernels[s.in_registers].insert(l.kernel);

      EXPECT_EQ(launches.sums.grid.x, (n + 31) / 32) << describe(c);
      EXPECT_EQ(launches.sums.grid.y, 1u) << describe(c);
      EXPECT_EQ(launches.sums.block.x, 32u) << describe(c);
      // Sums take no part in how dx is computed.
      GradientCase without = c;
      without.dweight = {};
      EXPECT_EQ(launches_of(without).rows.kernel, l.kernel) << describe(c);
      EXPECT_EQ(last_launch().shared_bytes, reduction + s.staged_bytes) << describe(c);
      if (HasFailure()) return;
    }
    for (const auto& k : kernels) EXPECT_LE(k.size(), 1u);
  }
}

// One barrier a row where threads of several warps share it, and none elsewhere.
TEST(EmulatedBackwardLaunch, ARowWithItsRstdTakesOneReduction) {
  GradientCase c = plain(DType::f32, 4, 4 * 700);
  c.dweight = {};
  for (const unsigned barriers : launches_of(c).rows.block_barriers) EXPECT_EQ(barriers, 4u);
  c.forward.rstd = {};
  for (const unsigned barriers : launches_of(c).rows.block_barriers) EXPECT_EQ(barriers, 8u);
  c = plain(DType::f32, 9, 64);
  c.dweight = {};
  for (const unsigned barriers : launches_of(c).rows.block_barriers) EXPECT_EQ(barriers, 0u);
}

TEST(EmulatedBackwardLaunch, PackedKernelsTakeWhatTheyCan) {
  for (const DType t : all_dtypes) {
    const bool narrow = rmsnorm::size_in_bytes(t) == 2;
    const DType other = t == DType::bf16 ? DType::f16 : DType::bf16;
    const auto kernel_of = [&](const std::function<void(GradientCase&)>& change) {
      GradientCase c = plain(t, 3, 64);
      change(c);
      return launches_of(c).rows.kernel;
    };
    const void* const any = kernel_of([](GradientCase& c) { c.dy.offset = 1; });
    const auto is_packed = [&](const std::function<void(GradientCase&)>& change) {
      return kernel_of(change) != any;
    };
    EXPECT_TRUE(is_packed([](GradientCase&) {}));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.weight = c.dweight = {}; }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.weight_offset = 1; }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.rstd = {}; }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.x.layout = Layout::reversed_rows; }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.dx_over = GradientAlias::dy; }));
    EXPECT_TRUE(is_packed([&](GradientCase& c) { c.d_residual = tensor(t); }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.dweight.layout = Layout::inner_stride_two; }));
    EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.sizes = {2, 3, 64}; }));
    if (narrow) {
      EXPECT_TRUE(is_packed([](GradientCase& c) { c.forward.weight.dtype = DType::f32; }));
      EXPECT_TRUE(is_packed([](GradientCase& c) { c.dweight.dtype = DType::f32; }));
    }
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.x.offset = 1; }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.dx.offset = 1; }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.weight.offset = 1; }));
    EXPECT_FALSE(
        is_packed([&](GradientCase& c) { c.d_residual = tensor(t, Layout::contiguous, 1); }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.dx.layout = Layout::inner_stride_two; }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.dy.layout = Layout::padded_rows; }));
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.forward.residual = tensor(t); }));
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.dbias = tensor(t); }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.partial = 0.5; }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.mean_square = tensor(DType::f32); }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.sizes[1] = 65; }));
    EXPECT_FALSE(is_packed([](GradientCase& c) { c.forward.rstd.shift = 1; }));
    if (t == DType::f64) continue;
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.dy.dtype = other; }));
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.dx.dtype = other; }));
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.d_residual = tensor(other); }));
    EXPECT_FALSE(is_packed([&](GradientCase& c) { c.forward.rstd = tensor(DType::f64); }));
  }
}

// ---- order ----

TEST(EmulatedBackwardLaunch, EveryOrderOfThreadsGivesTheSameBits) {
  for (const std::int64_t n : {24, 160, 1032, 4104, 17408}) {
    for (const DType t : {DType::bf16, DType::f32}) {
      for (const bool with_bias : {false, true}) {
        if (grid_is_small() && n > 2000) continue;
        GradientCase c = plain(t, n > 4000 ? 6 : 40, n);
        c.forward.eps = 0;
        if (t == DType::f32) c.forward.rstd = {};
        if (with_bias) c.dbias = c.d_residual = tensor(t);
        if (with_bias) c.dx_over = GradientAlias::x;
        BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
        for (std::int64_t i = 0; i < problem.x.count(); ++i) {
          // Every third row is scaled.
          if (i / n % 3 == 0) problem.x.set(i, std::ldexp(problem.x.value(i), -90));
        }
        problem.keep();
        const GradientResults expected = run_on_device(problem);
        for (std::uint64_t seed = 1; seed <= (n > 2000 ? 2u : 5u); ++seed) {
          cuda_emulation::set_seed(seed);
          expect_same(c, expected, run_on_device(problem), "another order");
        }
        cuda_emulation::set_seed(0);
        if (HasFailure()) return;
      }
    }
  }
}

// ---- the kernel ahead ----

TEST(EmulatedBackwardLaunch, ProgrammaticLaunchesAreForTheArchitecturesThatHaveThem) {
  for (const std::int64_t n : {64, 4096, 40000}) {
    for (const bool asked : {false, true}) {
      LaunchOptions options;
      options.programmatic = asked;
      const Launches launches = launches_of(plain(DType::bf16, 3, n), options);
      for (const LastLaunch& l : {launches.rows, launches.sums}) {
        EXPECT_EQ(l.programmatic, asked && has_clusters());
        const std::uint64_t threads = std::uint64_t{l.grid.x} * l.grid.y * l.block.x * l.block.y;
        EXPECT_EQ(l.waited_for_previous_grid, has_clusters() ? threads : 0);
        EXPECT_EQ(l.allowed_next_grid, has_clusters() ? threads : 0);
      }
    }
  }
}

// Inputs that the kernel ahead writes at the last moment, and outputs that it still reads.
TEST(EmulatedBackwardLaunch, NothingIsTouchedBeforeTheKernelAheadHasFinished) {
  if (!has_clusters()) return;
  for (const std::int64_t n : {20, 64, 1000, 4096, 20000}) {
    for (const bool constant_weight : {false, true}) {
      for (const bool with_bias : {false, true}) {
        if (grid_is_small() && n > 5000) continue;
        GradientCase c = plain(DType::f32, 5, n);
        c.d_residual = tensor(DType::f32);
        if (with_bias) c.dbias = tensor(DType::f32);
        BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
        const GradientResults expected = run_on_device(problem);
        const GradientResults got = run_on_device(problem, [&](const BackwardParams& p) {
          // All elements are side by side.
          std::vector<std::pair<unsigned char*, std::vector<unsigned char>>> written;
          const auto hide = [&](const rmsnorm::ConstTensor& t, std::int64_t count) {
            auto* data = static_cast<unsigned char*>(const_cast<void*>(t.data));
            written.emplace_back(data, std::vector<unsigned char>(data, data + 4 * count));
            std::fill(data, data + 4 * count, static_cast<unsigned char>(0xff));
          };
          hide(p.dy, 5 * n), hide(p.x, 5 * n), hide(p.d_residual, 5 * n), hide(p.rstd, 5);
          if (!constant_weight) hide(p.weight, n);
          const auto bytes_of = [](const void* data, std::int64_t count) {
            const auto* bytes = static_cast<const unsigned char*>(data);
            return std::vector<unsigned char>(bytes, bytes + count);
          };
          const auto outputs = [&] {
            std::vector<std::vector<unsigned char>> all = {bytes_of(p.dx.data, 20 * n),
                                                           bytes_of(p.dweight.data, 4 * n)};
            all.push_back(bytes_of(p.workspace, p.workspace_bytes));
            return all;
          };
          const auto before = outputs();
          bool finished = false;
          cuda_emulation::finish_previous_grid_late([&] {
            EXPECT_TRUE(outputs() == before) << describe(c);
            for (auto& w : written) std::copy(w.second.begin(), w.second.end(), w.first);
            finished = true;
          });
          const Status status = rmsnorm::cuda::backward(p, nullptr, programmatic(constant_weight));
          EXPECT_TRUE(finished);
          return status;
        });
        expect_same(c, expected, got, "a kernel ahead");
        if (HasFailure()) return;
      }
    }
  }
}

// ---- streams and devices ----

TEST(EmulatedBackwardLaunch, GoesToTheStreamAndTheDevice) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  const GradientCase c = plain(DType::f32, 2, 65);
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
  run_on_device(problem,
                [&](const BackwardParams& p) { return rmsnorm::cuda::backward(p, stream); });
  EXPECT_EQ(launch_before_last().stream, stream);
  EXPECT_EQ(last_launch().stream, stream);
  cudaStreamDestroy(stream);
  for (const int current : {usual_device, other_device}) {
    const OnDevice guard(current);
    for (const int asked : {usual_device, other_device}) {
      const Launches launches = launches_of(c, on(asked));
      EXPECT_EQ(launches.rows.device, asked);
      EXPECT_EQ(launches.sums.device, asked);
      EXPECT_EQ(current_device(), current);
    }
    EXPECT_EQ(launches_of(c).rows.device, current);
  }
}

TEST(EmulatedBackwardLaunch, ErrorsAreReturned) {
  const GradientCase c = plain(DType::f32, 2, 64);
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
  const BackwardParams p = problem.params();
  expect_error(cudaErrorNoKernelImageForDevice,
               rmsnorm::cuda::backward(p, nullptr, on(older_device)));
  expect_error(cudaErrorInvalidDevice, rmsnorm::cuda::backward(p, nullptr, on(1000)));
  const std::uint64_t before = last_launch().launches;
  for (const int others : {0, 1}) {
    cuda_emulation::fail_next_launch(cudaErrorLaunchFailure, others);
    expect_error(cudaErrorLaunchFailure, rmsnorm::cuda::backward(p, nullptr));
  }
  EXPECT_EQ(last_launch().launches, before + 1) << "nothing after a launch that failed";
  EXPECT_TRUE(rmsnorm::cuda::backward(p, nullptr).ok());
}

// ---- shared memory ----

// Another thread asks for less of it between this one's preparations and its launch.
TEST(EmulatedBackwardLaunch, AThreadTakesNoSharedMemoryFromAnotherOne) {
  if (device_version() == 75) return;  // rows that fit there all take as much
  const auto problem_of = [](std::int64_t vectors) {
    return BackwardProblem(plain(DType::f32, 1, 4 * vectors), rmsnorm::cuda::backward_workspace);
  };
  BackwardProblem longer = problem_of(has_clusters() ? 20480 : 5120);
  bool interrupted = false;
  cuda_emulation::interrupt_next_launch([&] {
    std::thread([&] {
      BackwardProblem shorter = problem_of(has_clusters() ? 8193 : 1025);
      run_on_device(shorter);
      interrupted = true;
    }).join();
  });
  run_on_device(longer);
  EXPECT_TRUE(interrupted);
  EXPECT_GT(launch_before_last().shared_bytes, 3 * piece + 512);
}

// ---- calls ----

TEST(EmulatedBackwardLaunch, TwoLaunchesAndNothingElse) {
  const OnDevice guard(fresh_device);
  for (const std::int64_t n : {64, 65, 4000, has_clusters() ? 40000 : 4800}) {
    const GradientCase c = plain(DType::f32, 1, n);
    launches_of(c);
    const std::uint64_t before = cuda_emulation::device_calls();
    launches_of(c);
    EXPECT_EQ(cuda_emulation::device_calls(), before) << n;
  }
}

TEST(EmulatedBackwardLaunch, OnlyWhatThereIsToWriteIsLaunched) {
  const auto count = [](std::vector<std::int64_t> sizes, bool with_sums, bool with_mean_square) {
    GradientCase c = plain(DType::f32, 1, 1);
    c.forward.sizes = std::move(sizes);
    if (!with_sums) c.dweight = {};
    if (with_mean_square) c.forward.mean_square = c.d_mean_square = tensor(DType::f32);
    const std::uint64_t before = last_launch().launches;
    BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
    run_on_device(problem);
    return last_launch().launches - before;
  };
  EXPECT_EQ(count({0, 64}, true, false), 1u) << "dweight is zero";
  EXPECT_EQ(count({0, 64}, false, false), 0u);
  EXPECT_EQ(count({3, 0}, true, false), 0u);
  EXPECT_EQ(count({3, 0}, true, true), 1u) << "d_mean_square";
  EXPECT_EQ(count({0, 0}, true, true), 0u);
  EXPECT_EQ(count({3, 64}, true, false), 2u);
  EXPECT_EQ(count({3, 64}, false, false), 1u);
}

TEST(EmulatedBackwardLaunch, TheWorkspaceDependsOnSizesAlone) {
  GradientCase c = plain(DType::bf16, 100, 200);
  const auto bytes = [&] {
    BackwardProblem problem(c, [](const BackwardParams&) { return 0; });
    return rmsnorm::cuda::backward_workspace(problem.params());
  };
  // A row has 25 vectors, and a block 8 teams of 4 rows each.
  EXPECT_EQ(bytes(), 4 * 224 * 4);
  c.dy.layout = Layout::column_major;
  c.forward.x.offset = 1;
  EXPECT_EQ(bytes(), 4 * 224 * 4);
  c.dbias = tensor(DType::bf16);
  EXPECT_EQ(bytes(), 2 * 4 * 224 * 4);
  // A row of doubles has 100 vectors, and a block one team.
  c.dbias.dtype = DType::f64;
  EXPECT_EQ(bytes(), 2 * 25 * 224 * 8);
  c.dbias = c.dweight = {};
  EXPECT_EQ(bytes(), 0);
}

TEST(EmulatedBackwardLaunch, WrongCallsLaunchNothing) {
  const GradientCase c = plain(DType::f32, 2, 64);
  BackwardProblem problem(c, rmsnorm::cuda::backward_workspace);
  const std::uint64_t launches = last_launch().launches, calls = cuda_emulation::device_calls();
  const auto expect = [&](Code code, Argument argument,
                          const std::function<void(BackwardParams&)>& change) {
    BackwardParams p = problem.params();
    change(p);
    const Status status = rmsnorm::cuda::backward(p, nullptr, on(1000));
    EXPECT_EQ(status.code, code) << rmsnorm::name(argument);
    EXPECT_EQ(status.argument, argument) << rmsnorm::name(argument);
  };
  expect(Code::missing, Argument::dy, [](BackwardParams& p) { p.dy = {}; });
  expect(Code::invalid_size, Argument::dweight, [](BackwardParams& p) { --p.dweight.sizes[0]; });
  expect(Code::overlap, Argument::dx, [](BackwardParams& p) { p.dx.data = p.dweight.data; });
  expect(Code::null_data, Argument::workspace, [](BackwardParams& p) { p.workspace = nullptr; });
  expect(Code::invalid_size, Argument::workspace, [](BackwardParams& p) { --p.workspace_bytes; });
  expect(Code::invalid_value, Argument::workspace,
         [](BackwardParams& p) { p.workspace = static_cast<char*>(p.workspace) + 4; });
  expect(Code::overlap, Argument::workspace,
         [](BackwardParams& p) { p.workspace = const_cast<void*>(p.x.data); });
  EXPECT_EQ(last_launch().launches, launches);
  EXPECT_EQ(cuda_emulation::device_calls(), calls);
  BackwardParams wrong = problem.params();
  wrong.dx = {};
  EXPECT_EQ(rmsnorm::cuda::backward_workspace(wrong), 0);
}

}  // namespace
}  // namespace rmsnorm_test
