// CUDA graphs: every kernel captured, replayed on other contents, and captured as a process's very
// first call, which must ask the device for nothing that a capture forbids.
#include <gtest/gtest.h>

#include <memory>

#include "case_grid.hpp"
#include "device_call.hpp"
#include "graph.hpp"

namespace rmsnorm_test {
namespace {

using Bytes = std::vector<unsigned char>;
using rmsnorm::cuda::LaunchOptions;

class Graphs : public testing::Test {
 protected:
  Graphs() {
    for (const CallShape& shape : shapes_of_all_kernels()) {
      calls_.push_back(std::make_unique<DeviceCall>(shape));
      EXPECT_TRUE(calls_.back()->allocated());
    }
  }

  void expect_replays(const LaunchOptions& options) {
    const Graph graph([&](cudaStream_t stream) {
      for (const auto& call : calls_) call->launch(stream, options);
    });
    EXPECT_EQ(graph.nodes(), calls_.size()) << "one kernel a call, and nothing else";
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

  std::vector<std::unique_ptr<DeviceCall>> calls_;
};

// Declared first, so that it runs first.
TEST_F(Graphs, CaptureTheFirstCall) { expect_replays(LaunchOptions()); }

TEST_F(Graphs, ReplayProgrammaticLaunches) {
  LaunchOptions options;
  options.programmatic = true;
  expect_replays(options);
  options.constant_weight = true;
  expect_replays(options);
}

TEST(GraphChains, ReplayDependentProgrammaticLaunches) {
  for (const std::int64_t n : {128, 4096, 32768}) {
    DeviceCall call({grid_is_small() ? 2 : 8, n});
    LaunchOptions options;
    const auto chain = [&](cudaStream_t stream) {
      rmsnorm::ForwardParams p = call.params();
      for (int k = 0; k < 21; ++k) {
        EXPECT_TRUE(rmsnorm::cuda::forward(p, stream, options).ok());
        void* const read = const_cast<void*>(p.x.data);
        p.x.data = p.y.data;
        p.y.data = read;
      }
    };
    const auto results = [&] {
      call.draw(9);
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      Graph(chain).replay();
      return call.outputs();
    };
    const Bytes expected = results();
    options.programmatic = options.constant_weight = true;
    for (int k = 0; k < 5; ++k) EXPECT_TRUE(results() == expected) << "rows of " << n;
  }
}

}  // namespace
}  // namespace rmsnorm_test
