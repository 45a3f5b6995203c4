// Launches that overlap: streams and host threads at once, and chains of programmatic launches,
// whose kernels start before the ones ahead of them have finished.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "case_grid.hpp"
#include "device_call.hpp"

namespace rmsnorm_test {
namespace {

using Bytes = std::vector<unsigned char>;
using rmsnorm::cuda::LaunchOptions;

class Stream {
 public:
  Stream() { EXPECT_EQ(cudaStreamCreate(&stream_), cudaSuccess); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

LaunchOptions programmatic(bool constant_weight) {
  LaunchOptions options;
  options.programmatic = true;
  options.constant_weight = constant_weight;
  return options;
}

int rounds() { return grid_is_small() ? 2 : 50; }

TEST(Streams, RunAtOnce) {
  std::vector<std::unique_ptr<DeviceCall>> calls;
  std::vector<Bytes> expected;
  std::vector<std::unique_ptr<Stream>> streams;
  for (const CallShape& shape : shapes_of_all_kernels()) {
    calls.push_back(std::make_unique<DeviceCall>(shape, calls.size()));
    ASSERT_TRUE(calls.back()->allocated());
    expected.push_back(calls.back()->expected());
    streams.push_back(std::make_unique<Stream>());
  }
  for (int round = 0; round < rounds(); ++round) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      calls[i]->poison(*streams[i]);
      for (int k = 0; k < 4; ++k) calls[i]->launch(*streams[i]);
    }
  }
  for (std::size_t i = 0; i < calls.size(); ++i) {
    EXPECT_TRUE(calls[i]->outputs() == expected[i]) << "rows of " << calls[i]->shape().n;
  }
}

// The first calls of a process come from all threads at once when this test is run by itself.
TEST(HostThreads, CallAtOnce) {
  std::vector<std::unique_ptr<DeviceCall>> calls;
  for (const CallShape& shape : shapes_of_all_kernels()) {
    calls.push_back(std::make_unique<DeviceCall>(shape, calls.size()));
    ASSERT_TRUE(calls.back()->allocated());
    calls.back()->poison();
  }
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (const auto& call : calls) {
    threads.emplace_back([&failures, &call] {
      cudaStream_t stream = nullptr;
      if (cudaStreamCreate(&stream) != cudaSuccess) ++failures;
      for (int k = 0; k < rounds(); ++k) {
        if (!rmsnorm::cuda::forward(call->params(), stream).ok()) ++failures;
      }
      if (cudaStreamSynchronize(stream) != cudaSuccess) ++failures;
      cudaStreamDestroy(stream);
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(failures, 0);
  for (const auto& call : calls) {
    const Bytes got = call->outputs();
    EXPECT_TRUE(got == call->expected()) << "rows of " << call->shape().n;
  }
}

// How much shared memory a kernel may have is one value for all threads, and these rows are staged
// in different amounts of it by the same kernel: on a cluster of 8, in 33 and 128 KiB a block.
TEST(HostThreads, StageRowsOfDifferentLengthsAtOnce) {
  DeviceCall shorter({1, (1 << 17) + 1024}, 1), longer({1, 1 << 19}, 2);
  ASSERT_TRUE(shorter.allocated() && longer.allocated());
  const Bytes expected[] = {shorter.expected(), longer.expected()};
  shorter.poison();
  longer.poison();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (DeviceCall* const call : {&shorter, &longer, &shorter, &longer}) {
    threads.emplace_back([&failures, call] {
      cudaStream_t stream = nullptr;
      if (cudaStreamCreate(&stream) != cudaSuccess) ++failures;
      for (int k = 0; k < 40 * rounds(); ++k) {
        if (!rmsnorm::cuda::forward(call->params(), stream).ok()) ++failures;
      }
      if (cudaStreamSynchronize(stream) != cudaSuccess) ++failures;
      cudaStreamDestroy(stream);
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(failures, 0);
  EXPECT_TRUE(shorter.outputs() == expected[0]);
  EXPECT_TRUE(longer.outputs() == expected[1]);
}

// A reset of the device takes the kernels' shared memory with it. It would take that of the other
// tests as well, so that it is a process of its own.
TEST(DeviceDeathTest, StagesRowsAfterAReset) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto runs = [] {
    DeviceCall call({1, 1 << 19});
    return call.allocated() && call.launch().ok() && cudaDeviceSynchronize() == cudaSuccess &&
           cudaGetLastError() == cudaSuccess;
  };
  const auto run_and_reset = [&] {
    const bool before = runs() && cudaDeviceReset() == cudaSuccess;
    std::exit(before && runs() ? 0 : 1);
  };
  EXPECT_EXIT(run_and_reset(), testing::ExitedWithCode(0), "");
}

// y is the next call's x, back and forth between the two, `length` times.
void run_chain(DeviceCall& call, int length, cudaStream_t stream, const LaunchOptions& options) {
  rmsnorm::ForwardParams p = call.params();
  for (int k = 0; k < length; ++k) {
    ASSERT_TRUE(rmsnorm::cuda::forward(p, stream, options).ok());
    void* const read = const_cast<void*>(p.x.data);
    p.x.data = p.y.data;
    p.y.data = read;
    if (!call.shape().adds_residual) continue;
    // The sum goes on as the residual, as in a model.
    void* const residual = const_cast<void*>(p.residual.data);
    p.residual.data = p.residual_out.data;
    p.residual_out.data = residual;
  }
}

Bytes chain_results(DeviceCall& call, int length, const LaunchOptions& options) {
  call.draw(7);
  call.poison();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  {
    Stream stream;
    run_chain(call, length, stream, options);
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  }
  Bytes all = call.outputs();
  const Bytes x = call.x.read();
  all.insert(all.end(), x.begin(), x.end());
  return all;
}

TEST(ProgrammaticLaunches, ChainsGiveWhatOrdinaryLaunchesGive) {
  for (const CallShape& shape : shapes_of_all_kernels()) {
    DeviceCall call(shape);
    ASSERT_TRUE(call.allocated());
    // Odd, so that y and x end in each other's memory.
    const int length = grid_is_small() ? 3 : 33;
    const Bytes expected = chain_results(call, length, LaunchOptions());
    for (const bool constant_weight : {false, true}) {
      for (int repeat = 0; repeat < (grid_is_small() ? 1 : 10); ++repeat) {
        ASSERT_TRUE(chain_results(call, length, programmatic(constant_weight)) == expected)
            << "rows of " << shape.n << ", constant_weight=" << constant_weight << ", repeat "
            << repeat;
      }
    }
  }
}

// Few rows leave most of the device idle: the next kernel really runs beside this one.
TEST(ProgrammaticLaunches, ShortChainsOfOneRowGiveWhatOrdinaryLaunchesGive) {
  for (const std::int64_t n : {128, 1000, 4096, 8192, 32768, 1 << 18}) {
    DeviceCall call({1, n});
    const int length = grid_is_small() ? 3 : 401;
    const Bytes expected = chain_results(call, length, LaunchOptions());
    EXPECT_TRUE(chain_results(call, length, programmatic(true)) == expected) << "row of " << n;
    EXPECT_TRUE(chain_results(call, length, programmatic(false)) == expected) << "row of " << n;
  }
}

TEST(ProgrammaticLaunches, MixWithOrdinaryLaunchesAndCopies) {
  DeviceCall call({grid_is_small() ? 4 : 256, 4096, DType::bf16, true});
  const auto run = [&](bool overlapping) {
    call.draw(7);
    call.poison();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    Stream stream;
    for (int k = 0; k < rounds(); ++k) {
      const LaunchOptions options =
          overlapping && k % 3 != 2 ? programmatic(k % 2 == 0) : LaunchOptions();
      call.launch(stream, options);
      // The next call reads what a copy wrote.
      EXPECT_EQ(cudaMemcpyAsync(call.x.data(), call.y.data(), call.y.bytes(),
                                cudaMemcpyDeviceToDevice, stream),
                cudaSuccess);
      EXPECT_EQ(cudaMemcpyAsync(call.residual.data(), call.residual_out.data(), call.y.bytes(),
                                cudaMemcpyDeviceToDevice, stream),
                cudaSuccess);
    }
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    return call.outputs();
  };
  const Bytes expected = run(false);
  EXPECT_TRUE(run(true) == expected);
}

// Without constant_weight the weight may come from the kernel ahead.
TEST(ProgrammaticLaunches, SeeTheWeightThatTheKernelAheadWrites) {
  const std::int64_t n = 4096;
  DeviceCall maker({1, n}, 3), user({grid_is_small() ? 4 : 512, n}, 4);
  const auto run = [&](const LaunchOptions& options) {
    Bytes results;
    for (int k = 0; k < rounds(); ++k) {
      EXPECT_EQ(cudaMemsetAsync(user.weight.data(), 0xff, user.weight.bytes()), cudaSuccess);
      user.poison();
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      Stream stream;
      rmsnorm::ForwardParams p = maker.params();
      p.y.data = user.weight.data();
      EXPECT_TRUE(rmsnorm::cuda::forward(p, stream, options).ok());
      user.launch(stream, options);
      const Bytes y = user.outputs();
      if (k == 0) results = y;
      EXPECT_TRUE(y == results) << "round " << k;
    }
    return results;
  };
  const Bytes expected = run(LaunchOptions());
  EXPECT_TRUE(run(programmatic(false)) == expected);
}

TEST(Device, StaysCurrentAndKeepsNoError) {
  DeviceCall call({4, 256});
  const Bytes expected = call.expected();
  int before = -1, after = -1;
  ASSERT_EQ(cudaGetDevice(&before), cudaSuccess);
  LaunchOptions here;
  here.device = before;
  call.poison();
  call.launch(nullptr, here);
  EXPECT_TRUE(call.outputs() == expected);
  LaunchOptions nowhere;
  nowhere.device = 63;
  const rmsnorm::Status status = rmsnorm::cuda::forward(call.params(), nullptr, nowhere);
  EXPECT_EQ(status.code, rmsnorm::Code::cuda_error);
  EXPECT_STRNE(rmsnorm::cuda::error_text(status), "");
  ASSERT_EQ(cudaGetDevice(&after), cudaSuccess);
  EXPECT_EQ(after, before);
  // A last error left behind would surface in the caller's next check.
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  call.poison();
  call.launch();
  EXPECT_TRUE(call.outputs() == expected);
}

}  // namespace
}  // namespace rmsnorm_test
