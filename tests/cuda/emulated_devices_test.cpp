// What the Python module asks of CUDA beside the norms, seen by the emulation: which devices get a
// context, and behind what memory is freed.
#include <gtest/gtest.h>

#include <thread>

#include "cuda_devices.hpp"
#include "emulated_calls.hpp"
#include "emulated_process.hpp"

namespace rmsnorm_test {
namespace {

using cuda_emulation::context_stack_size;
using cuda_emulation::has_context;
using namespace rmsnorm::cuda;

void set_devices_like_this_one(std::size_t count) {
  const int version = device_version();
  cuda_emulation::set_devices(
      std::vector<cuda_emulation::Device>(count, {version / 10, version % 10}));
}

struct Row {
  float x[64] = {}, y[64] = {}, dx[64] = {}, mean = 0;

  bool computes_everything(const LaunchOptions& options) {
    rmsnorm::ForwardParams forward;
    forward.x = rmsnorm::matrix<const float>(x, 1, 64);
    forward.y = rmsnorm::matrix(y, 1, 64);
    rmsnorm::MeanSquareParams mean_square;
    mean_square.x = forward.x;
    mean_square.mean_square = rmsnorm::vector(&mean, 1);
    rmsnorm::BackwardParams backward;
    backward.x = backward.dy = forward.x;
    backward.dx = rmsnorm::matrix(dx, 1, 64);
    return rmsnorm::cuda::forward(forward, nullptr, options).ok() &&
           rmsnorm::cuda::mean_square(mean_square, nullptr, options).ok() &&
           rmsnorm::cuda::backward(backward, nullptr, options).ok();
  }
};

void use_device(int device) {
  Row row;
  EXPECT_TRUE(row.computes_everything(on(device)));
  void *memory = nullptr, *event = nullptr;
  EXPECT_EQ(memory_allocate_async(&memory, 100, nullptr, device), 0);
  EXPECT_EQ(memory_free_async(memory, nullptr, device), 0);
  EXPECT_EQ(memory_allocate_async(&memory, 100, nullptr, device), 0);
  EXPECT_EQ(record_event(&event, nullptr, device), 0);
  EXPECT_EQ(make_stream_wait(nullptr, event, device), 0);
  EXPECT_EQ(memory_free_behind(memory, event, device), 0);
}

void expect_contexts_on(int device) {
  for (int i = 0; i < 4; ++i) EXPECT_EQ(has_context(i), i == device) << i;
}

TEST(EmulatedContextsDeathTest, OnlyTheDeviceThatIsUsedGetsOne) {
  EXPECT_EXIT(run_and_exit([] {
                set_devices_like_this_one(4);
                int count = 0, error = -1;
                count = device_count(&error);
                EXPECT_EQ(count, 4);
                expect_contexts_on(-1);
                use_device(3);
                EXPECT_EQ(current_device(), 0);
                EXPECT_EQ(context_stack_size(), 0u);
                expect_contexts_on(3);
                // The work goes on after the call.
                std::thread([] {
                  use_device(3);
                  EXPECT_EQ(context_stack_size(), 0u);
                }).join();
                expect_contexts_on(3);
              }),
              testing::ExitedWithCode(0), "");
}

TEST(EmulatedContextsDeathTest, TheThreadKeepsTheOneThatItHad) {
  EXPECT_EXIT(run_and_exit([] {
                set_devices_like_this_one(4);
                ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
                use_device(3);
                EXPECT_EQ(current_device(), 1);
                EXPECT_EQ(context_stack_size(), 1u);
                for (int i = 0; i < 4; ++i) EXPECT_EQ(has_context(i), i == 1 || i == 3) << i;
                ASSERT_EQ(cudaSetDevice(3), cudaSuccess);
                const std::uint64_t calls = cuda_emulation::device_calls();
                Row row;
                EXPECT_TRUE(row.computes_everything(on(3)));
                EXPECT_EQ(cuda_emulation::device_calls(), calls) << "device 3 is current";
              }),
              testing::ExitedWithCode(0), "");
}

TEST(EmulatedContextsDeathTest, ADeviceThatCannotBeUsedLeavesTheThreadAsItWas) {
  EXPECT_EXIT(run_and_exit([] {
                set_devices_like_this_one(2);
                void* memory = nullptr;
                EXPECT_EQ(memory_allocate_async(&memory, 100, nullptr, 2), invalid_device);
                EXPECT_EQ(memory, nullptr);
                EXPECT_EQ(memory_allocate_async(&memory, 100, nullptr, -2), invalid_device);
                EXPECT_EQ(context_stack_size(), 0u);
                EXPECT_FALSE(has_context(0) || has_context(1));
                EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
              }),
              testing::ExitedWithCode(0), "");
}

TEST(EmulatedDevicesDeathTest, MachinesWithoutCudaAreAnError) {
  const auto expect_everywhere = [](int error) {
    void *memory = nullptr, *event = nullptr;
    EXPECT_EQ(memory_allocate_async(&memory, 100, nullptr, 0), error);
    EXPECT_EQ(memory, nullptr);
    EXPECT_EQ(record_event(&event, nullptr, 0), error);
    EXPECT_EQ(event, nullptr);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  };
  EXPECT_EXIT(run_and_exit([&] {
                cuda_emulation::set_devices({});
                expect_everywhere(no_device);
              }),
              testing::ExitedWithCode(0), "");
  EXPECT_EXIT(run_and_exit([&] {
                cuda_emulation::Device device(9, 0);
                device.driver = false;
                cuda_emulation::set_devices({device});
                expect_everywhere(insufficient_driver);
                EXPECT_EQ(driver_version(), 0);
              }),
              testing::ExitedWithCode(0), "");
}

// ---- memory ----

class Stream {
 public:
  Stream() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { destroy(); }
  operator cudaStream_t() const { return stream_; }
  void destroy() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    stream_ = nullptr;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

// A row's result in memory of the stream's, as the Python module makes it.
void* compute_on(cudaStream_t stream) {
  static Row row;
  void* memory = nullptr;
  EXPECT_EQ(memory_allocate_async(&memory, sizeof(row.y), stream, 0), 0);
  rmsnorm::ForwardParams p;
  p.x = rmsnorm::matrix<const float>(row.x, 1, 64);
  p.y = rmsnorm::matrix(static_cast<float*>(memory), 1, 64);
  EXPECT_TRUE(rmsnorm::cuda::forward(p, stream).ok());
  return memory;
}

TEST(EmulatedMemory, IsFreedBehindTheKernelOfAStreamThatIsGone) {
  Stream stream;
  void* const memory = compute_on(stream);
  void* event = nullptr;
  ASSERT_EQ(record_event(&event, stream, 0), 0);
  stream.destroy();
  EXPECT_EQ(memory_free_behind(memory, event, 0), 0);
}

TEST(EmulatedMemory, IsFreedInTheOrderOfItsOwnStream) {
  Stream stream;
  EXPECT_EQ(memory_free_async(compute_on(stream), stream, 0), 0);
}

TEST(EmulatedMemory, AConsumerWaitsForTheEvent) {
  Stream producer, consumer;
  void* const memory = compute_on(producer);
  void* event = nullptr;
  ASSERT_EQ(record_event(&event, producer, 0), 0);
  producer.destroy();
  EXPECT_EQ(make_stream_wait(consumer, event, 0), 0);
  EXPECT_EQ(memory_free_async(memory, consumer, 0), 0);
  EXPECT_EQ(memory_free_behind(nullptr, event, 0), 0);
}

TEST(EmulatedMemoryDeathTest, IsNotFreedBesideTheKernel) {
  Stream stream;
  void* const memory = compute_on(stream);
  EXPECT_DEATH(memory_free_async(memory, nullptr, 0), "does not wait for another one's use");
  EXPECT_EQ(memory_free_async(memory, stream, 0), 0);
}

}  // namespace
}  // namespace rmsnorm_test
