// Backward on a device: captured and replayed, the same bits in every run and launch, and rows
// beyond 2^31 elements.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "case_grid.hpp"
#include "device_call.hpp"
#include "graph.hpp"

namespace rmsnorm_test {
namespace {

using Bytes = std::vector<unsigned char>;
using rmsnorm::cuda::LaunchOptions;

// dx and dweight from dy, x, weight and, where the shape adds one, d_residual; with a bias the
// kernels that take everything.
class GradientCall {
 public:
  explicit GradientCall(const CallShape& shape, bool has_bias = false)
      : dy(shape.bytes()),
        x(shape.bytes()),
        d_residual(shape.adds_residual ? shape.bytes() : 0),
        weight(row_bytes(shape)),
        dx(shape.bytes()),
        dweight(row_bytes(shape)),
        dbias(has_bias ? row_bytes(shape) : 0),
        shape_(shape),
        workspace_(static_cast<std::size_t>(rmsnorm::cuda::backward_workspace(tensors()))) {
    if (allocated()) draw(1);
  }

  bool allocated() const {
    for (const DeviceMemory* m :
         {&dy, &x, &d_residual, &weight, &dx, &dweight, &dbias, &workspace_}) {
      if (m->bytes() != 0 && m->data() == nullptr) return false;
    }
    return true;
  }

  const CallShape& shape() const { return shape_; }

  rmsnorm::BackwardParams params() const {
    rmsnorm::BackwardParams p = tensors();
    p.workspace = workspace_.data();
    p.workspace_bytes = static_cast<std::int64_t>(workspace_.bytes());
    return p;
  }

  void draw(std::uint64_t seed) {
    fill(dy, make_pattern(shape_.dtype, 4 * seed));
    fill(x, make_pattern(shape_.dtype, 4 * seed + 1));
    fill(weight, make_pattern(shape_.dtype, 4 * seed + 2));
    fill(d_residual, make_pattern(shape_.dtype, 4 * seed + 3));
  }
  // Outputs, and what must not matter, are NaNs.
  void poison() {
    for (const DeviceMemory* m : {&dx, &dweight, &dbias, &workspace_}) {
      if (m->bytes() == 0) continue;
      EXPECT_EQ(cudaMemset(m->data(), 0xff, m->bytes()), cudaSuccess);
    }
  }
  void launch(cudaStream_t stream = nullptr, const LaunchOptions& options = LaunchOptions()) {
    const rmsnorm::Status status = rmsnorm::cuda::backward(params(), stream, options);
    EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' '
                             << rmsnorm::cuda::error_text(status) << "; " << shape_.rows
                             << " rows of " << shape_.n << ' ' << rmsnorm::name(shape_.dtype);
  }
  // dweight, dbias, then dx.
  Bytes outputs() const {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    Bytes all = dweight.read();
    for (const DeviceMemory* m : {&dbias, &dx}) {
      const Bytes more = m->read();
      all.insert(all.end(), more.begin(), more.end());
    }
    return all;
  }
  Bytes expected() {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    poison();
    launch();
    return outputs();
  }

  DeviceMemory dy, x, d_residual, weight, dx, dweight, dbias;

 private:
  // Without the workspace.
  rmsnorm::BackwardParams tensors() const {
    rmsnorm::BackwardParams p;
    const auto rows = [this](const DeviceMemory& m) {
      return rows_of(shape_.dtype, m.data(), shape_.rows, shape_.n);
    };
    p.dy = rows(dy);
    p.x = rows(x);
    p.dx = rows(dx);
    if (shape_.adds_residual) p.d_residual = rows(d_residual);
    p.weight = vector_of(shape_.dtype, weight.data(), shape_.n);
    p.dweight = vector_of(shape_.dtype, dweight.data(), shape_.n);
    if (dbias.bytes() != 0) p.dbias = vector_of(shape_.dtype, dbias.data(), shape_.n);
    return p;
  }

  static std::size_t row_bytes(const CallShape& shape) {
    return static_cast<std::size_t>(shape.n * rmsnorm::size_in_bytes(shape.dtype));
  }

  CallShape shape_;
  DeviceMemory workspace_;
};

class GradientGraphs : public testing::Test {
 protected:
  GradientGraphs() {
    for (const CallShape& shape : shapes_of_all_kernels()) {
      calls_.push_back(std::make_unique<GradientCall>(shape, calls_.size() % 3 == 2));
      EXPECT_TRUE(calls_.back()->allocated());
    }
  }

  void expect_replays(const LaunchOptions& options) {
    const Graph graph([&](cudaStream_t stream) {
      for (const auto& call : calls_) call->launch(stream, options);
    });
    EXPECT_EQ(graph.nodes(), 2 * calls_.size()) << "two kernels a call, and nothing else";
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      std::vector<Bytes> expected;
      for (const auto& call : calls_) {
        call->draw(seed);
        expected.push_back(call->expected());
        call->poison();
      }
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      for (int k = 0; k < 3; ++k) graph.replay();
      for (std::size_t i = 0; i < calls_.size(); ++i) {
        EXPECT_TRUE(calls_[i]->outputs() == expected[i])
            << "rows of " << calls_[i]->shape().n << ", seed " << seed;
      }
    }
  }

  std::vector<std::unique_ptr<GradientCall>> calls_;
};

TEST_F(GradientGraphs, Replay) { expect_replays(LaunchOptions()); }

TEST_F(GradientGraphs, ReplayProgrammaticLaunches) {
  LaunchOptions options;
  options.programmatic = true;
  expect_replays(options);
  options.constant_weight = true;
  expect_replays(options);
}

TEST(GradientRuns, GiveTheSameBits) {
  const std::int64_t times = grid_is_small() ? 1 : 20;
  for (const CallShape& shape :
       {CallShape{400 * times, 128}, CallShape{100 * times, 4096},
        CallShape{100 * times, 4096, DType::f32, true}, CallShape{20 * times, 32768}}) {
    GradientCall call(shape);
    ASSERT_TRUE(call.allocated());
    const Bytes expected = call.expected();
    for (int run = 0; run < 5; ++run) {
      EXPECT_TRUE(call.expected() == expected) << "rows of " << shape.n;
    }
  }
}

// The last rows of many have the dx that they have alone.
TEST(GradientRuns, OffsetsAreSixtyFourBitsWide) {
  const std::int64_t n = 4096, few = 8;
  const std::int64_t rows = grid_is_small() ? 5000 : (std::int64_t{1} << 31) / n + few;
  GradientCall many({rows, n}), last({few, n});
  if (!many.allocated()) GTEST_SKIP() << "no memory";
  const auto bytes = static_cast<std::size_t>(few * n * 2);
  const std::size_t before = many.x.bytes() - bytes;
  for (const auto& [to, from] : {std::pair{&last.x, &many.x}, std::pair{&last.dy, &many.dy}}) {
    ASSERT_EQ(cudaMemcpy(to->data(), from->data() + before, bytes, cudaMemcpyDeviceToDevice),
              cudaSuccess);
  }
  many.poison();
  many.launch();
  last.poison();
  last.launch();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(many.dx.read(before, bytes) == last.dx.read());
}

}  // namespace
}  // namespace rmsnorm_test
