// What is launched, on which device, and what becomes of errors: seen by the emulation.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "case_grid.hpp"
#include "device_memory.hpp"
#include "emulated_calls.hpp"
#include "emulated_machine.hpp"
#include "emulated_process.hpp"
#include "wrong_calls.hpp"

namespace rmsnorm_test {
namespace {

using cuda_emulation::Device;
using cuda_emulation::last_launch;
using cuda_emulation::LastLaunch;
using rmsnorm::Code;
using rmsnorm::Status;
using rmsnorm::cuda::LaunchOptions;

Device device_of_version(int version) { return Device(version / 10, version % 10); }

class Machine : public testing::Environment {
 public:
  void SetUp() override {
    const int version = device_version();
    std::vector<Device> devices(emulated_device_count, device_of_version(version));
    devices[older_device] = device_of_version(70);
    devices[older_device].ptx_version = version;
    devices[newer_device] = device_of_version(version == 75 ? 86 : 90);
    devices[newer_device].ptx_version = version;
    cuda_emulation::set_devices(devices);
  }
};
const testing::Environment* const machine = testing::AddGlobalTestEnvironment(new Machine);

Case plain(DType t, std::int64_t rows, std::int64_t n) {
  Case c;
  c.sizes = {rows, n};
  c.x = c.y = c.weight = tensor(t);
  return c;
}

LastLaunch launch_of(const Case& c, const LaunchOptions& options = {}) {
  const std::uint64_t before = last_launch().launches;
  ForwardProblem problem(c);
  run_on_device(problem, options);
  EXPECT_EQ(last_launch().launches, before + 1) << describe(c);
  return last_launch();
}

// ---- shapes ----

// How a row of a number of 16-byte vectors is to run.
struct Shape {
  std::int64_t vectors;
  unsigned threads, rows_per_block, cluster;
  unsigned in_registers;     // vectors of a thread; 0: staged or read again
  std::size_t staged_bytes;  // of a block; 0: none
};

constexpr Shape shapes_everywhere[] = {
    {1, 1, 128, 1, 1, 0},  {2, 2, 64, 1, 1, 0},   {3, 4, 32, 1, 1, 0},    {4, 4, 32, 1, 1, 0},
    {5, 8, 16, 1, 1, 0},   {8, 8, 16, 1, 1, 0},   {9, 16, 8, 1, 1, 0},    {16, 16, 8, 1, 1, 0},
    {17, 32, 4, 1, 1, 0},  {32, 32, 4, 1, 1, 0},  {33, 32, 4, 1, 2, 0},   {64, 32, 4, 1, 2, 0},
    {65, 32, 4, 1, 4, 0},  {128, 32, 4, 1, 4, 0}, {129, 64, 1, 1, 4, 0},  {256, 64, 1, 1, 4, 0},
    {257, 96, 1, 1, 4, 0}, {384, 96, 1, 1, 4, 0}, {385, 128, 1, 1, 4, 0}, {2048, 512, 1, 1, 4, 0},
};
constexpr std::size_t piece = 512 * 16;  // one vector of each thread of the largest block
constexpr Shape shapes_of_75[] = {
    {2049, 512, 1, 1, 0, 5 * piece},
    {3584, 512, 1, 1, 0, 7 * piece},
    {3585, 512, 1, 1, 0, 0},
};
constexpr Shape shapes_of_80[] = {
    {2049, 512, 1, 1, 0, 5 * piece},
    {10240, 512, 1, 1, 0, 20 * piece},
    {10241, 512, 1, 1, 0, 0},
};
constexpr Shape shapes_of_90[] = {
    {2049, 288, 1, 2, 4, 0},          {4096, 512, 1, 2, 4, 0},
    {4097, 288, 1, 4, 4, 0},          {8192, 512, 1, 4, 4, 0},
    {8193, 288, 1, 8, 4, 0},          {16384, 512, 1, 8, 4, 0},
    {16385, 512, 1, 8, 0, 5 * piece}, {110592, 512, 1, 8, 0, 27 * piece},
    {110593, 512, 1, 8, 0, 0},
};

std::vector<Shape> shapes_here() {
  std::vector<Shape> shapes(std::begin(shapes_everywhere), std::end(shapes_everywhere));
  const auto append = [&](const auto& more) {
    for (const Shape& s : more) {
      if (!grid_is_small() || s.vectors < 20000) shapes.push_back(s);
    }
  };
  if (device_version() == 75) append(shapes_of_75);
  if (device_version() == 80) append(shapes_of_80);
  if (device_version() == 90) append(shapes_of_90);
  return shapes;
}

std::size_t reduction_bytes(const Shape& s) {
  return s.threads > 32 || s.cluster > 1 ? 2 * 16 * s.cluster * (s.threads / 32) : 0;
}

void expect_shape(const Case& c, const Shape& s, std::size_t staged_bytes,
                  const LastLaunch& launch) {
  EXPECT_EQ(launch.block.x, s.threads) << describe(c);
  EXPECT_EQ(launch.block.y, s.rows_per_block) << describe(c);
  EXPECT_EQ(launch.block.z, 1u);
  EXPECT_EQ(launch.grid.x, (c.rows() + s.rows_per_block - 1) / s.rows_per_block) << describe(c);
  EXPECT_EQ(launch.grid.y, s.cluster) << describe(c);
  EXPECT_EQ(launch.grid.z, 1u);
  EXPECT_EQ(launch.cluster.x * launch.cluster.z, 1u) << describe(c);
  EXPECT_EQ(launch.cluster.y, s.cluster) << describe(c);
  EXPECT_EQ(launch.shared_bytes, reduction_bytes(s) + staged_bytes) << describe(c);
  // One reduction, and all blocks of a cluster running before it.
  const bool meets = s.threads > 32 || s.cluster > 1;
  for (const unsigned barriers : launch.block_barriers) {
    EXPECT_EQ(barriers, meets && s.cluster == 1 ? 1u : 0u) << describe(c);
  }
  for (const unsigned barriers : launch.cluster_barriers) {
    EXPECT_EQ(barriers, s.cluster > 1 ? 2u : 0u) << describe(c);
  }
}

TEST(EmulatedLaunch, RowsRunInTheirShape) {
  for (const DType t : all_dtypes) {
    for (const bool with_residual : {false, true}) {
      std::set<const void*> kernels[5];
      for (const Shape& s : shapes_here()) {
        if (s.vectors > 20000 && t != DType::f64) continue;
        Case c = plain(t, s.rows_per_block > 1 ? 5 : 2, s.vectors * 16 / rmsnorm::size_in_bytes(t));
        if (s.vectors > 5000) c.sizes[0] = 1;
        if (with_residual) c.residual = c.residual_out = tensor(t);
        const LastLaunch launch = launch_of(c);
        expect_shape(c, s, s.staged_bytes, launch);
        kernels[s.in_registers].insert(launch.kernel);
      }
      // A kernel for each number of vectors, and none for two.
      std::set<const void*> all;
      for (const int in_registers : {0, 1, 2, 4}) {
        if (in_registers != 0 || !grid_is_small() || !has_clusters()) {
          EXPECT_EQ(kernels[in_registers].size(), 1u) << in_registers;
        }
        all.insert(kernels[in_registers].begin(), kernels[in_registers].end());
      }
      EXPECT_EQ(all.size(), has_clusters() && grid_is_small() ? all.size() : 4u);
      if (HasFailure()) return;
    }
  }
}

// The same shape for rows that are reached element by element; nothing of theirs is in registers.
TEST(EmulatedLaunch, UnalignedRowsRunInTheSameShape) {
  for (const DType t : all_dtypes) {
    std::set<const void*> kernels;
    for (const Shape& s : shapes_here()) {
      if (s.vectors > 20000) continue;
      Case c = plain(t, 1, s.vectors * 16 / rmsnorm::size_in_bytes(t));
      c.x.offset = 1;
      const LastLaunch launch = launch_of(c);
      // Staged as the values that are computed with, which for 16-bit rows are twice as long.
      const std::size_t growth = rmsnorm::size_in_bytes(t) == 2 ? 2 : 1;
      const std::size_t most = device_version() == 75   ? 65536
                               : device_version() == 80 ? 163 << 10
                                                        : 227 << 10;
      const std::size_t pieces =
          s.in_registers == 0
              ? (static_cast<std::size_t>(s.vectors) + 512 * s.cluster - 1) / (512 * s.cluster)
              : 0;
      const std::size_t wanted = growth * pieces * piece;
      expect_shape(c, s, reduction_bytes(s) + wanted <= most ? wanted : 0, launch);
      kernels.insert(launch.kernel);
    }
    EXPECT_EQ(kernels.size(), 1u);
    Case packed = plain(t, 1, 64);
    EXPECT_EQ(kernels.count(launch_of(packed).kernel), 0u) << rmsnorm::name(t);
  }
}

// Which cases the packed kernels take: those of models, and nothing that they do not compute.
TEST(EmulatedLaunch, PackedKernelsTakeWhatTheyCan) {
  for (const DType t : all_dtypes) {
    const bool narrow = rmsnorm::size_in_bytes(t) == 2;
    const DType other = t == DType::bf16 ? DType::f16 : DType::bf16;
    const auto kernel_of = [&](const std::function<void(Case&)>& change) {
      Case c = plain(t, 3, 64);
      change(c);
      return launch_of(c).kernel;
    };
    const void* const any = kernel_of([](Case& c) { c.x.offset = 1; });
    const auto is_packed = [&](const std::function<void(Case&)>& change) {
      return kernel_of(change) != any;
    };
    EXPECT_TRUE(is_packed([](Case&) {}));
    EXPECT_TRUE(is_packed([](Case& c) { c.weight.present = false; }));
    EXPECT_TRUE(is_packed([](Case& c) { c.rounding = Rounding::rstd, c.weight_offset = 1; }));
    EXPECT_TRUE(is_packed([](Case& c) { c.x.layout = Layout::reversed_rows; }));
    EXPECT_TRUE(is_packed([](Case& c) { c.y_over = Alias::x; }));
    EXPECT_TRUE(is_packed([&](Case& c) { c.residual = c.residual_out = tensor(t); }));
    EXPECT_TRUE(
        is_packed([](Case& c) { c.rstd = tensor(c.rstd_type(), Layout::inner_stride_two); }));
    if (narrow) EXPECT_TRUE(is_packed([](Case& c) { c.weight.dtype = DType::f32; }));
    EXPECT_TRUE(is_packed([](Case& c) {
      c.sizes = {2, 3, 64}, c.broadcast = Broadcast::per_head;
    }));

    EXPECT_FALSE(is_packed([](Case& c) { c.y.offset = 1; }));
    EXPECT_FALSE(is_packed([](Case& c) { c.weight.offset = 1; }));
    EXPECT_FALSE(is_packed([&](Case& c) { c.residual = tensor(t, Layout::contiguous, 1); }));
    EXPECT_FALSE(is_packed([](Case& c) { c.x.layout = Layout::inner_stride_two; }));
    EXPECT_FALSE(is_packed([](Case& c) { c.y.layout = Layout::reversed; }));
    EXPECT_FALSE(is_packed([](Case& c) { c.x.layout = Layout::padded_rows; }));
    EXPECT_FALSE(is_packed([&](Case& c) { c.bias = tensor(t); }));
    EXPECT_FALSE(is_packed([](Case& c) { c.partial = 0.5; }));
    EXPECT_FALSE(is_packed([](Case& c) { c.mean_square = tensor(DType::f32); }));
    EXPECT_FALSE(is_packed([](Case& c) { c.sizes[1] = 65; }));
    EXPECT_FALSE(is_packed([](Case& c) {
      c.rstd = tensor(c.rstd_type());
      c.rstd.shift = 1;
    }));
    if (t == DType::f64) continue;
    EXPECT_NE(kernel_of([&](Case& c) { c.weight.dtype = other; }), kernel_of([](Case&) {}));
    EXPECT_FALSE(is_packed([&](Case& c) { c.y.dtype = other; }));
    EXPECT_FALSE(is_packed([&](Case& c) { c.residual = tensor(other); }));
    EXPECT_FALSE(is_packed([&](Case& c) {
      c.residual = tensor(t);
      c.residual_out = tensor(other);
    }));
    if (narrow) {
      EXPECT_FALSE(is_packed([&](Case& c) {
        c.residual = tensor(t);
        c.round_residual = false;
      }));
    }
  }
}

// A row to be scaled adds a maximum and a second sum, each with its barrier.
TEST(EmulatedLaunch, ScalingTakesTwoReductionsMore) {
  const std::int64_t n = 4 * (has_clusters() ? 3000 : 1000);
  Case c = plain(DType::f32, 3, n);
  c.eps = 0;
  ForwardProblem problem(c);
  for (std::int64_t i = n; i < 2 * n; ++i) problem.x.set(i, 1e-30);
  problem.keep();
  run_on_device(problem);
  const LastLaunch launch = last_launch();
  const std::vector<unsigned>& barriers =
      has_clusters() ? launch.cluster_barriers : launch.block_barriers;
  const unsigned before = has_clusters() ? 1 : 0, blocks = has_clusters() ? 2 : 1;
  ASSERT_EQ(barriers.size(), 3 * blocks);
  // blockIdx.x is the row.
  for (unsigned i = 0; i < barriers.size(); ++i) {
    EXPECT_EQ(barriers[i], before + (i % 3 == 1 ? 3u : 1u)) << i;
  }
}

// ---- order ----

std::vector<Case> cases_for_orders() {
  std::vector<Case> cases;
  for (const std::int64_t n : {24, 160, 1032, 4104, 17408, 70000}) {
    for (const DType t : {DType::bf16, DType::f32}) {
      if (grid_is_small() && n > 5000) continue;
      Case c = plain(t, n > 5000 ? 1 : 9, n);
      c.rstd = tensor(DType::f32);
      c.eps = 0;
      if (t == DType::f32) c.residual = c.residual_out = tensor(t);
      cases.push_back(c);
      c.x.offset = 1;
      c.y_over = Alias::x;
      cases.push_back(c);
    }
  }
  return cases;
}

TEST(EmulatedLaunch, EveryOrderOfThreadsGivesTheSameBits) {
  for (const Case& c : cases_for_orders()) {
    ForwardProblem problem(c);
    for (std::int64_t i = 0; i < problem.x.count(); ++i) {
      // Every third row, or the only one, is scaled.
      if (i / c.n() % 3 != 0 || problem.residual.present()) continue;
      problem.x.set(i, std::ldexp(problem.x.value(i), -90));
    }
    problem.keep();
    const Results expected = run_on_device(problem);
    for (std::uint64_t seed = 1; seed <= (c.n() > 5000 ? 3u : 8u); ++seed) {
      cuda_emulation::set_seed(seed);
      expect_same(c, expected, run_on_device(problem), "another order");
    }
    cuda_emulation::set_seed(0);
    if (HasFailure()) return;
  }
}

// ---- the kernel ahead ----

TEST(EmulatedLaunch, ProgrammaticLaunchesAreForTheArchitecturesThatHaveThem) {
  for (const std::int64_t n : {64, 4096, 70000}) {
    const Case c = plain(DType::bf16, 1, n);
    for (const bool asked : {false, true}) {
      LaunchOptions options;
      options.programmatic = asked;
      const LastLaunch launch = launch_of(c, options);
      EXPECT_EQ(launch.programmatic, asked && has_clusters());
      const std::uint64_t threads = has_clusters() ? std::uint64_t{launch.grid.x} * launch.grid.y *
                                                         launch.block.x * launch.block.y
                                                   : 0;
      EXPECT_EQ(launch.waited_for_previous_grid, threads);
      EXPECT_EQ(launch.allowed_next_grid, threads);
    }
  }
}

// Inputs that the kernel ahead writes at the last moment, and a y that it still reads.
TEST(EmulatedLaunch, NothingIsTouchedBeforeTheKernelAheadHasFinished) {
  if (!has_clusters()) return;
  std::vector<Case> cases;
  for (const std::int64_t n : {20, 64, 1000, 4096, 20000, 150000}) {
    if (grid_is_small() && n > 5000) continue;
    for (const int variant : {0, 1, 2}) {
      Case c = plain(DType::f32, n > 5000 ? 1 : 3, n);
      if (variant >= 1) c.residual = c.residual_out = tensor(DType::f32);
      if (variant == 2) {
        c.bias = tensor(DType::f32);
        c.mean_square = tensor(DType::f64);
      }
      cases.push_back(c);
    }
  }
  for (const Case& c : cases) {
    for (const bool constant_weight : {false, true}) {
      ForwardProblem problem(c);
      const Results expected = run_on_device(problem);
      const Results got = run_on_device(problem, [&](const rmsnorm::ForwardParams& p) {
        // All elements are side by side.
        std::vector<std::pair<unsigned char*, std::vector<unsigned char>>> written;
        const auto hide = [&](const rmsnorm::ConstTensor& t, std::int64_t count) {
          if (!t.present()) return;
          const auto bytes = static_cast<std::size_t>(count * rmsnorm::size_in_bytes(t.dtype));
          auto* data = static_cast<unsigned char*>(const_cast<void*>(t.data));
          written.emplace_back(data, std::vector<unsigned char>(data, data + bytes));
          std::fill(data, data + bytes, static_cast<unsigned char>(0xff));
        };
        const std::int64_t count = c.rows() * c.n();
        hide(p.x, count), hide(p.residual, count), hide(p.mean_square, c.rows());
        hide(p.bias, c.n());
        if (!constant_weight) hide(p.weight, c.n());
        const auto* y = static_cast<const unsigned char*>(p.y.data);
        const std::vector<unsigned char> y_before(y, y + 4 * count);
        bool finished = false;
        cuda_emulation::finish_previous_grid_late([&] {
          EXPECT_TRUE(std::equal(y_before.begin(), y_before.end(), y)) << describe(c);
          for (auto& w : written) std::copy(w.second.begin(), w.second.end(), w.first);
          finished = true;
        });
        const Status status = rmsnorm::cuda::forward(p, nullptr, programmatic(constant_weight));
        EXPECT_TRUE(finished);
        return status;
      });
      expect_same(c, expected, got, "a kernel ahead");
      if (HasFailure()) return;
    }
  }
}

// What the promise is for: the weight is on its way while the kernel ahead still runs.
TEST(EmulatedLaunch, AConstantWeightIsReadBeforeTheKernelAheadHasFinished) {
  if (!has_clusters()) return;
  for (const std::int64_t n : {8, 64, 512, 1024, 4096, 70000}) {
    const Case c = plain(DType::bf16, 1, n);
    ForwardProblem problem(c);
    const Results expected = run_on_device(problem);
    const auto run_late = [&](bool constant) {
      return run_on_device(problem, [&](const rmsnorm::ForwardParams& p) {
        auto* weight = static_cast<unsigned char*>(const_cast<void*>(p.weight.data));
        const std::vector<unsigned char> before(weight, weight + 2 * n);
        cuda_emulation::finish_previous_grid_late(
            [=] { std::fill(weight, weight + 2 * n, static_cast<unsigned char>(0)); });
        const Status status = rmsnorm::cuda::forward(p, nullptr, programmatic(constant));
        std::copy(before.begin(), before.end(), weight);
        return status;
      });
    };
    // The first thread reads its part before it waits, and everyone else after.
    EXPECT_EQ(run_late(true).y[0], expected.y[0]) << n;
    EXPECT_EQ(decode(DType::bf16, run_late(false).y[0]), 0) << n;
  }
}

// ---- streams and devices ----

TEST(EmulatedLaunch, GoesToTheStream) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  for (const Case& c : {plain(DType::f32, 2, 64), plain(DType::f32, 2, 65)}) {
    ForwardProblem problem(c);
    run_on_device(problem, [&](const rmsnorm::ForwardParams& p) {
      return rmsnorm::cuda::forward(p, stream);
    });
    EXPECT_EQ(last_launch().stream, stream);
    launch_of(c);
    EXPECT_EQ(last_launch().stream, nullptr);
  }
  MeanSquareProblem problem(DType::f32, DType::f32, {2, 64}, -1, Layout::contiguous, 1);
  problem.run(
      [&](const rmsnorm::MeanSquareParams& p) { return rmsnorm::cuda::mean_square(p, stream); });
  EXPECT_EQ(last_launch().stream, stream);
  cudaStreamDestroy(stream);
}

TEST(EmulatedLaunch, RunsOnTheDeviceThatIsAskedFor) {
  const Case c = plain(DType::f32, 2, 64);
  for (const int current : {usual_device, other_device}) {
    const OnDevice guard(current);
    for (const int asked : {usual_device, other_device}) {
      EXPECT_EQ(launch_of(c, on(asked)).device, asked);
      EXPECT_EQ(current_device(), current);
    }
    EXPECT_EQ(launch_of(c).device, current);
    EXPECT_EQ(current_device(), current);
  }
  // Shared memory is allowed for each device.
  const std::int64_t vectors = has_clusters() ? 50000 : 3300;
  for (const int asked : {other_device, usual_device, other_device}) {
    EXPECT_EQ(launch_of(plain(DType::f32, 1, 4 * vectors), on(asked)).device, asked);
    EXPECT_GT(last_launch().shared_bytes, 48u << 10);
    EXPECT_EQ(current_device(), usual_device);
  }
}

// A device that runs code for an older one has no clusters, and shared memory of its own.
TEST(EmulatedLaunch, TheCodeDecidesWhatADeviceCanDo) {
  if (has_clusters()) return;
  Case c = plain(DType::f32, 1, 4 * 11000);
  LaunchOptions options = on(newer_device);
  options.programmatic = true;
  const LastLaunch launch = launch_of(c, options);
  EXPECT_EQ(launch.device, newer_device);
  EXPECT_EQ(launch.grid.y, 1u);
  EXPECT_EQ(launch.cluster.y, 1u);
  EXPECT_FALSE(launch.programmatic);
  const std::size_t needed = 512 + 22 * piece;
  EXPECT_EQ(launch.shared_bytes, device_version() == 80 ? needed : 512u);
}

struct DeviceCall {
  float x[64] = {}, y[64] = {}, out = 0;

  rmsnorm::ForwardParams forward() {
    rmsnorm::ForwardParams p;
    p.x = rmsnorm::matrix<const float>(x, 1, 64);
    p.y = rmsnorm::matrix(y, 1, 64);
    return p;
  }
  rmsnorm::MeanSquareParams mean_square() {
    rmsnorm::MeanSquareParams p;
    p.x = rmsnorm::matrix<const float>(x, 1, 64);
    p.mean_square = rmsnorm::vector(&out, 1);
    return p;
  }
};

void expect_error_everywhere(cudaError_t error, const LaunchOptions& options) {
  DeviceCall call;
  const std::uint64_t before = last_launch().launches;
  for (int i = 0; i < 2; ++i) {
    expect_error(error, rmsnorm::cuda::forward(call.forward(), nullptr, options));
    expect_error(error, rmsnorm::cuda::mean_square(call.mean_square(), nullptr, options));
  }
  EXPECT_EQ(last_launch().launches, before);
}

TEST(EmulatedLaunch, DevicesThatCannotRunItAreAnError) {
  for (const int current : {usual_device, other_device}) {
    const OnDevice guard(current);
    expect_error_everywhere(cudaErrorNoKernelImageForDevice, on(older_device));
    for (const int none : {int{emulated_device_count}, 63, 64, 1000, -2}) {
      expect_error_everywhere(cudaErrorInvalidDevice, on(none));
    }
    EXPECT_EQ(current_device(), current);
  }
  launch_of(plain(DType::f32, 2, 64));
}

TEST(EmulatedLaunch, ErrorsOfTheLaunchAreReturned) {
  for (const cudaError_t error : {cudaErrorLaunchFailure, cudaErrorMemoryAllocation}) {
    for (const int asked : {rmsnorm::cuda::current_device, int{other_device}}) {
      DeviceCall call;
      cuda_emulation::fail_next_launch(error);
      expect_error(error, rmsnorm::cuda::forward(call.forward(), nullptr, on(asked)));
      cuda_emulation::fail_next_launch(error);
      expect_error(error, rmsnorm::cuda::mean_square(call.mean_square(), nullptr, on(asked)));
      EXPECT_EQ(current_device(), usual_device);
      EXPECT_TRUE(rmsnorm::cuda::forward(call.forward(), nullptr, on(asked)).ok());
    }
  }
}

// ---- shared memory ----

struct StagedRows {
  std::int64_t shorter, longer;  // vectors
};
StagedRows staged_rows() {
  return has_clusters() ? StagedRows{16385, 50000} : StagedRows{2049, 3300};
}

Case row_of(std::int64_t vectors) { return plain(DType::f32, 1, 4 * vectors); }

// Another thread asks for less of it between this one's preparations and its launch.
TEST(EmulatedLaunch, AThreadTakesNoSharedMemoryFromAnotherOne) {
  const StagedRows rows = staged_rows();
  for (const int device : {usual_device, other_device}) {
    ForwardProblem longer(row_of(rows.longer));
    bool interrupted = false;
    cuda_emulation::interrupt_next_launch([&] {
      std::thread([&] {
        ForwardProblem shorter(row_of(rows.shorter));
        run_on_device(shorter, on(device));
        interrupted = true;
      }).join();
    });
    run_on_device(longer, on(device));
    EXPECT_TRUE(interrupted);
    EXPECT_GT(last_launch().shared_bytes, 48u << 10);
  }
}

TEST(EmulatedLaunch, ThreadsStageRowsOfDifferentLengthsAtOnce) {
  const StagedRows rows = staged_rows();
  std::vector<std::thread> threads;
  for (const std::int64_t vectors : {rows.shorter, rows.longer, rows.shorter, rows.longer}) {
    threads.emplace_back([vectors] {
      for (int i = 0; i < (grid_is_small() ? 1 : 5); ++i) {
        ForwardProblem problem(row_of(vectors));
        run_on_device(problem, on(other_device));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- a process of its own for another machine ----

// A reset takes a device's context, and what kernels may have there.
TEST(EmulatedLaunchDeathTest, RowsAreStagedAfterAReset) {
  EXPECT_EXIT(run_and_exit([] {
                const Case c = row_of(staged_rows().longer);
                const LastLaunch before = launch_of(c);
                EXPECT_GT(before.shared_bytes, 48u << 10);
                ASSERT_EQ(cudaDeviceReset(), cudaSuccess);
                EXPECT_EQ(launch_of(c).shared_bytes, before.shared_bytes);
                EXPECT_EQ(cudaGetLastError(), cudaSuccess);
                const std::uint64_t calls = cuda_emulation::device_calls();
                launch_of(c);
                EXPECT_EQ(cuda_emulation::device_calls(), calls);
              }),
              testing::ExitedWithCode(0), "");
}

TEST(EmulatedLaunchDeathTest, MachinesWithoutCudaAreAnError) {
  EXPECT_EXIT(run_and_exit([] {
                cuda_emulation::set_devices({});
                expect_error_everywhere(cudaErrorNoDevice, {});
                expect_error_everywhere(cudaErrorNoDevice, on(0));
              }),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(run_and_exit([] {
                Device device = device_of_version(device_version());
                device.driver = false;
                cuda_emulation::set_devices({device});
                expect_error_everywhere(cudaErrorInsufficientDriver, {});
                expect_error_everywhere(cudaErrorInsufficientDriver, on(0));
              }),
              testing::ExitedWithCode(0), "");
}

// Numbers beyond what is remembered of devices.
TEST(EmulatedLaunchDeathTest, ThereMayBeManyDevices) {
  EXPECT_EXIT(
      run_and_exit([] {
        cuda_emulation::set_devices(std::vector<Device>(70, device_of_version(device_version())));
        const std::int64_t vectors = has_clusters() ? 50000 : 3300;
        for (const int device : {63, 64, 69, 63, 69}) {
          EXPECT_EQ(launch_of(plain(DType::f32, 1, 4 * vectors), on(device)).device, device);
          EXPECT_GT(last_launch().shared_bytes, 48u << 10);
        }
      }),
      testing::ExitedWithCode(0), "");
}

// ---- calls ----

TEST(EmulatedLaunch, OneLaunchAndNothingElse) {
  const OnDevice guard(fresh_device);
  for (const std::int64_t n : {64, 65, 4000, has_clusters() ? 200000 : 13200}) {
    const Case c = plain(DType::f32, 1, n);
    launch_of(c);
    const std::uint64_t before = cuda_emulation::device_calls();
    launch_of(c);
    launch_of(c, on(fresh_device));
    EXPECT_EQ(cuda_emulation::device_calls(), before) << n;
  }
  MeanSquareProblem problem(DType::f32, DType::f32, {2, 64}, -1, Layout::contiguous, 1);
  const std::uint64_t launches = last_launch().launches, calls = cuda_emulation::device_calls();
  run_on_device(problem);
  EXPECT_EQ(last_launch().launches, launches + 1);
  EXPECT_EQ(cuda_emulation::device_calls(), calls);
}

TEST(EmulatedLaunch, NothingIsLaunchedForNoRowsOrNoElements) {
  const std::uint64_t before = last_launch().launches;
  for (const DType t : all_dtypes) {
    for (const std::vector<std::int64_t>& sizes :
         {std::vector<std::int64_t>{0, 64}, {0, 7}, {3, 0}, {0, 0}}) {
      Case c = plain(t, 1, 1);
      c.sizes = sizes;
      ForwardProblem problem(c);
      run_on_device(problem);
    }
    MeanSquareProblem none(t, DType::f64, {0, 10}, -1, Layout::contiguous, 1);
    run_on_device(none);
  }
  EXPECT_EQ(last_launch().launches, before);
}

TEST(EmulatedLaunch, WrongCallsLaunchNothing) {
  const std::uint64_t before = last_launch().launches;
  const std::uint64_t calls = cuda_emulation::device_calls();
  for (const WrongCall& wrong : wrong_calls()) {
    GoodCall g;
    wrong.make(g);
    const std::vector<unsigned char> bytes = bytes_of(g);
    const Status status = rmsnorm::cuda::forward(g.p, nullptr, on(1000));
    EXPECT_EQ(status.code, wrong.code) << wrong.what;
    EXPECT_EQ(status.argument, wrong.argument) << wrong.what;
    EXPECT_STREQ(rmsnorm::cuda::error_text(status), text(wrong.code));
    EXPECT_EQ(bytes_of(g), bytes) << wrong.what;
  }
  for (const WrongMeanSquare& wrong : wrong_mean_squares()) {
    const GoodCall g;
    rmsnorm::MeanSquareParams p = good_mean_square(g);
    wrong.make(p);
    const std::vector<unsigned char> bytes = bytes_of(g);
    const Status status = rmsnorm::cuda::mean_square(p, nullptr, on(1000));
    EXPECT_EQ(status.code, wrong.code) << wrong.what;
    EXPECT_EQ(status.argument, wrong.argument) << wrong.what;
    EXPECT_EQ(bytes_of(g), bytes) << wrong.what;
  }
  EXPECT_EQ(last_launch().launches, before);
  EXPECT_EQ(cuda_emulation::device_calls(), calls);
  GoodCall good;
  EXPECT_TRUE(rmsnorm::cuda::forward(good.p, nullptr).ok());
  EXPECT_EQ(last_launch().launches, before + 1);
  EXPECT_STREQ(rmsnorm::cuda::error_text({}), "success");
}

}  // namespace
}  // namespace rmsnorm_test
