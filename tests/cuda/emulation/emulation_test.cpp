// The emulation's own tests: that correct kernels compute what they should in every order, and
// that wrong ones are told.
#include <gtest/gtest.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cooperative_groups.h"
#include "cuda.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "fibre.hpp"

namespace {

using cuda_emulation::Device;
using cuda_emulation::last_launch;
using cuda_emulation::set_devices;
using cuda_emulation::set_seed;
using cuda_emulation::shared_memory;

constexpr unsigned all = 0xffffffffu;

const Device compiled_for(__CUDA_ARCH__ / 100, __CUDA_ARCH__ / 10 % 10);

class Emulation : public testing::Test {
 protected:
  void SetUp() override {
    set_devices({compiled_for});
    set_seed(0);
  }
  void TearDown() override { cudaGetLastError(); }
};

using Arithmetic = Emulation;
using Blocks = Emulation;
using BlocksDeathTest = Emulation;
using Warps = Emulation;
using WarpsDeathTest = Emulation;
using Host = Emulation;

cudaLaunchConfig_t config_of(dim3 grid, dim3 block, std::size_t shared_bytes = 0) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return config;
}

template <class... Expected, class... Actual>
cudaError_t run(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Expected...),
                Actual... arguments) {
  const cudaLaunchConfig_t config = config_of(grid, block, shared_bytes);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// --- Arithmetic ---

double ulp_of_format(double magnitude, int precision, int min_exponent) {
  const int exponent = magnitude == 0 ? min_exponent : std::ilogb(magnitude);
  return std::ldexp(1.0, std::max(exponent, min_exponent) - precision + 1);
}

// The rounding to a format by nearbyint, which the emulation does on bits.
double rounded_to(double value, int precision, int min_exponent, double largest) {
  if (value == 0 || std::isinf(value)) return value;
  const double ulp = ulp_of_format(std::fabs(value), precision, min_exponent);
  const double rounded = std::nearbyint(value / ulp) * ulp;
  return std::fabs(rounded) > largest ? std::copysign(HUGE_VAL, value) : rounded;
}

TEST_F(Arithmetic, half_conversions_round_to_nearest_even) {
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const __half h = __ushort_as_half(static_cast<unsigned short>(bits));
    const float value = __half2float(h);
    if ((bits & 0x7fffu) > 0x7c00u) {
      ASSERT_EQ(__float_as_uint(value), 0x7fffffffu);
      continue;
    }
    ASSERT_EQ(__half_as_ushort(__float2half_rn(value)), bits);
    // Between neighbours: the midpoint, and the floats beside it.
    if ((bits & 0x7fffu) >= 0x7bffu) continue;
    const float next = __half2float(__ushort_as_half(static_cast<unsigned short>(bits + 1)));
    const float middle = (value + next) / 2;
    for (const float v : {std::nextafterf(middle, value), middle, std::nextafterf(middle, next)}) {
      ASSERT_EQ(__half2float(__float2half_rn(v)), rounded_to(v, 11, -14, 65504)) << bits;
    }
  }
  const float limit = 65520;
  EXPECT_EQ(__half_as_ushort(__float2half_rn(std::nextafterf(limit, 0))), 0x7bff);
  EXPECT_EQ(__half_as_ushort(__float2half_rn(-limit)), 0xfc00);
  EXPECT_EQ(__half_as_ushort(__float2half_rn(-HUGE_VALF)), 0xfc00);
  EXPECT_EQ(__half_as_ushort(__float2half_rn(__uint_as_float(0xff800001u))), 0x7fff);
  EXPECT_EQ(__half_as_ushort(__float2half_rn(-0.0f)), 0x8000);
  const __half2 two = __floats2half2_rn(1.0f, -2.0f);
  EXPECT_EQ(__half_as_ushort(two.x), 0x3c00);
  EXPECT_EQ(__half22float2(two).y, -2.0f);
}

TEST_F(Arithmetic, bfloat16_conversions_round_to_nearest_even) {
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const __nv_bfloat16 b = __ushort_as_bfloat16(static_cast<unsigned short>(bits));
    const float value = __bfloat162float(b);
    if ((bits & 0x7fffu) > 0x7f80u) {
      ASSERT_TRUE(std::isnan(value));
      ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(value)), 0x7fff);
      continue;
    }
    ASSERT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(value)), bits);
    if ((bits & 0x7fffu) >= 0x7f7fu) continue;
    const float middle = __uint_as_float((bits << 16) + 0x8000u);
    for (const float v : {__uint_as_float((bits << 16) + 0x7fffu), middle,
                          __uint_as_float((bits << 16) + 0x8001u)}) {
      ASSERT_EQ(__bfloat162float(__float2bfloat16_rn(v)), rounded_to(v, 8, -126, 0x1.fep127))
          << bits;
    }
  }
  EXPECT_EQ(__bfloat16_as_ushort(__float2bfloat16_rn(std::numeric_limits<float>::max())), 0x7f80);
  const __nv_bfloat162 two = __floats2bfloat162_rn(1.0f, -2.0f);
  EXPECT_EQ(__bfloat16_as_ushort(two.x), 0x3f80);
  EXPECT_EQ(__bfloat16_as_ushort(two.y), 0xc000);
}

TEST_F(Arithmetic, reciprocal_root_is_rounded_once) {
  // From 1 to 4 every significand occurs with both parities of the exponent.
  for (std::uint32_t bits = 0x3f800000u; bits < 0x40800000u; bits += 37) {
    const float x = __uint_as_float(bits);
    const long double exact = 1 / std::sqrt(static_cast<long double>(x));
    ASSERT_EQ(__frsqrt_rn(x), static_cast<float>(exact)) << bits;
  }
  EXPECT_EQ(__frsqrt_rn(0x1p-149f), static_cast<float>(1 / std::sqrt(0x1p-149L)));
  EXPECT_EQ(__frsqrt_rn(0x1p-148f), 0x1p74f);
  EXPECT_EQ(__frsqrt_rn(0.0f), HUGE_VALF);
  EXPECT_EQ(__frsqrt_rn(-0.0f), -HUGE_VALF);
  EXPECT_EQ(__frsqrt_rn(HUGE_VALF), 0.0f);
  EXPECT_TRUE(std::isnan(__frsqrt_rn(-1.0f)));
  EXPECT_TRUE(std::isnan(__frsqrt_rn(std::numeric_limits<float>::quiet_NaN())));
}

TEST_F(Arithmetic, single_operations_are_not_fused) {
  volatile float a = 1 + 0x1p-12f;
  volatile float rounded_square = 1 + 0x1p-11f;
  EXPECT_EQ(__fsub_rn(__fmul_rn(a, a), rounded_square), 0.0f);
  EXPECT_EQ(__fadd_rn(__fmul_rn(a, a), -rounded_square), 0.0f);
  EXPECT_EQ(__fmaf_rn(a, a, -rounded_square), 0x1p-24f);
  volatile double b = 1 + 0x1p-27;
  volatile double rounded_double_square = 1 + 0x1p-26;
  EXPECT_EQ(__dsub_rn(__dmul_rn(b, b), rounded_double_square), 0.0);
  EXPECT_EQ(__dadd_rn(__dmul_rn(b, b), -rounded_double_square), 0.0);
  EXPECT_EQ(__fma_rn(b, b, -rounded_double_square), 0x1p-54);
  EXPECT_EQ(__fsqrt_rn(2.0f), std::sqrt(2.0f));
  EXPECT_EQ(__dsqrt_rn(2.0), std::sqrt(2.0));
  EXPECT_EQ(__fdiv_rn(1.0f, 3.0f), 1.0f / 3.0f);
  EXPECT_EQ(__ddiv_rn(1.0, 3.0), 1.0 / 3.0);
  EXPECT_EQ(__umulhi(0xffffffffu, 0xfffffffeu), 0xfffffffdu);
  EXPECT_EQ(__longlong_as_double(__double_as_longlong(-0.5)), -0.5);
}

TEST_F(Arithmetic, cached_loads_and_stores_move_their_vector) {
  uint4 from = make_uint4(1, 2, 3, 4);
  uint4 to{};
  __stcs(&to, __ldcs(&from));
  EXPECT_EQ(to.w, 4u);
  EXPECT_EQ(__ldg(&from).x, 1u);
  alignas(16) unsigned char bytes[32] = {};
  const float* odd = reinterpret_cast<const float*>(bytes + 2);
  EXPECT_DEATH(__ldg(odd), "misaligned access at emulation_test.cpp");
}

// --- Blocks ---

struct Place {
  unsigned thread[3], block[3];
};

__global__ void __launch_bounds__(64) record_places(Place* places, unsigned* calls) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  places[i] = Place{{threadIdx.x, threadIdx.y, threadIdx.z}, {blockIdx.x, blockIdx.y, blockIdx.z}};
  ++calls[i];
}

TEST_F(Blocks, every_index_runs_once) {
  const dim3 grid(5, 3, 2);
  const dim3 block(7, 2, 3);
  for (const unsigned seed : {0u, 1u, 2u}) {
    set_seed(seed);
    const std::size_t count = 5 * 3 * 2 * 7 * 2 * 3;
    std::vector<Place> places(count);
    std::vector<unsigned> calls(count);
    ASSERT_EQ(run(grid, block, 0, record_places, places.data(), calls.data()), cudaSuccess);
    EXPECT_EQ(calls, std::vector<unsigned>(count, 1));
    std::set<std::string> different;
    for (const Place& p : places) {
      EXPECT_LT(p.thread[0], block.x);
      EXPECT_LT(p.block[2], grid.z);
      different.insert(std::string(reinterpret_cast<const char*>(&p), sizeof p));
    }
    EXPECT_EQ(different.size(), count);
  }
}

// Sums a row per block, through every kind of meeting that blocks outside clusters have.
template <class T>
__global__ void sum_rows(const T* rows, unsigned n, T* sums) {
  T* partial = static_cast<T*>(shared_memory());
  T sum = 0;
  for (unsigned i = threadIdx.x; i < n; i += blockDim.x) sum += __ldg(rows + blockIdx.x * n + i);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);
    if (threadIdx.x == 0) partial[0] = sum;
  }
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) sums[blockIdx.x] = partial[0];
}

template <class T>
void check_sum_rows() {
  const unsigned rows = 9;
  const unsigned n = 1000;
  std::vector<T> x(rows * n);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(i % 1013);
  for (unsigned seed = 0; seed < 20; ++seed) {
    set_seed(seed);
    for (const unsigned threads : {32u, 64u, 256u, 512u, 1024u}) {
      std::vector<T> sums(rows, T(0));
      ASSERT_EQ(run(rows, threads, threads / 32 * sizeof(T), sum_rows<T>, x.data(), n, sums.data()),
                cudaSuccess);
      for (unsigned row = 0; row < rows; ++row) {
        T expected = 0;
        for (unsigned i = 0; i < n; ++i) expected += x[row * n + i];
        ASSERT_EQ(sums[row], expected) << "seed " << seed << ", " << threads << " threads";
      }
      EXPECT_EQ(last_launch().block_barriers, std::vector<unsigned>(rows, 2));
    }
  }
}

TEST_F(Blocks, rows_are_summed_in_every_order) {
  check_sum_rows<float>();
  check_sum_rows<double>();
  check_sum_rows<int>();
  check_sum_rows<unsigned>();
  check_sum_rows<unsigned long long>();
}

// Thread i reads what thread i + 32 wrote, or did not write yet.
__global__ void neighbour(bool with_barrier, unsigned* out) {
  unsigned* shared = static_cast<unsigned*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
}

TEST_F(Blocks, a_missing_barrier_shows_in_some_order) {
  std::vector<unsigned> expected(128);
  for (unsigned i = 0; i < 128; ++i) expected[i] = (i + 32) % 128;
  unsigned wrong = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    set_seed(seed);
    std::vector<unsigned> out(128);
    run(1, 128, 512, neighbour, true, out.data());
    EXPECT_EQ(out, expected);
    run(1, 128, 512, neighbour, false, out.data());
    wrong += out != expected;
  }
  EXPECT_GT(wrong, 5u);
}

__global__ void copy_shared(unsigned char* out, unsigned bytes) {
  const unsigned char* shared = static_cast<const unsigned char*>(shared_memory());
  if (threadIdx.x == 0) std::memcpy(out, shared, bytes);
  std::memset(shared_memory(), 0, bytes);
}

TEST_F(Blocks, shared_memory_starts_poisoned_and_aligned) {
  for (const unsigned bytes : {1u, 40u, 4096u}) {
    std::vector<unsigned char> out(bytes);
    run(3, 1, bytes, copy_shared, out.data(), bytes);
    EXPECT_EQ(out, std::vector<unsigned char>(bytes, 0xff));
  }
}

__global__ void write_shared(unsigned i) { static_cast<unsigned char*>(shared_memory())[i] = 1; }

TEST_F(BlocksDeathTest, overrun_of_shared_memory_is_seen) {
  run(1, 1, 100, write_shared, 99u);
#if CUDA_EMULATION_ASAN
  EXPECT_DEATH(run(1, 1, 100, write_shared, 100u), "heap-buffer-overflow");
  EXPECT_DEATH(run(1, 1, 0, write_shared, 0u), "use-after-poison");
#else
  GTEST_SKIP() << "needs AddressSanitizer";
#endif
}

__global__ void stay_away(unsigned thread) {
  if (threadIdx.x == thread) return;
  __syncthreads();
}

__global__ void wait_apart(unsigned thread) {
  if (threadIdx.x == thread) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST_F(BlocksDeathTest, barriers_that_threads_miss_are_told) {
  for (const unsigned seed : {0u, 5u}) {
    set_seed(seed);
    for (const unsigned thread : {0u, 20u, 63u}) {
      const std::string exited = "1 thread, \\(" + std::to_string(thread) + ",0,0\\), exited";
      EXPECT_DEATH(run(1, 64, 0, stay_away, thread), exited);
      EXPECT_DEATH(run(1, 64, 0, stay_away, thread),
                   "63 threads from .* wait at the block's barrier, emulation_test.cpp:");
      EXPECT_DEATH(run(1, 64, 0, wait_apart, thread), "divergent barriers: __syncthreads at");
    }
  }
}

__global__ void launch_again() { run(1, 1, 0, stay_away, 0u); }

TEST_F(BlocksDeathTest, device_functions_belong_in_kernels_and_launches_outside) {
  EXPECT_DEATH(__syncthreads(), "__syncthreads outside of a kernel");
  EXPECT_DEATH(run(1, 1, 0, launch_again), "a launch inside a kernel");
}

__global__ void add_one_and_tiny(float* out) { *out = 1.0f + *out; }

TEST_F(Blocks, kernels_have_a_float_environment_of_their_own) {
  std::fesetround(FE_UPWARD);
  float value = 0x1p-40f;
  run(1, 1, 0, add_one_and_tiny, &value);
  const int mode = std::fegetround();
  std::fesetround(FE_TONEAREST);
  EXPECT_EQ(value, 1.0f);
  EXPECT_EQ(mode, FE_UPWARD);
}

struct Parameters {
  const unsigned* from;
  unsigned* to;
  double numbers[40];
};

__global__ void take_parameters(const __grid_constant__ Parameters p, double factor) {
  p.to[threadIdx.x] = p.from[threadIdx.x] + static_cast<unsigned>(p.numbers[39] * factor);
}

TEST_F(Blocks, arguments_are_converted_and_copied) {
  const unsigned from[2] = {10, 20};
  unsigned to[2] = {};
  Parameters p{from, to, {}};
  p.numbers[39] = 3;
  run(1, 2, 0, take_parameters, p, 2);  // the int becomes a double
  EXPECT_EQ(to[0], 16u);
  EXPECT_EQ(to[1], 26u);
}

TEST_F(Blocks, several_os_threads_may_launch) {
  std::vector<std::thread> threads;
  std::vector<int> failures(4);
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&failures, t] {
      std::vector<unsigned> x(256, static_cast<unsigned>(t));
      for (int i = 0; i < 50; ++i) {
        unsigned sum = 0;
        run(1, 128, 16, sum_rows<unsigned>, x.data(), 256u, &sum);
        failures[t] += sum != 256 * t;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, std::vector<int>(4, 0));
}

// --- Warps ---

__global__ void warp_functions(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  unsigned* mine = out + threadIdx.x * 5;
  mine[0] = __shfl_sync(all, threadIdx.x, 5);
  mine[1] = __ballot_sync(all, lane % 3 == 0);
  mine[2] = static_cast<unsigned>(__any_sync(all, lane == 31));
  // Halves of a warp apart, at the same line.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  mine[3] = __shfl_xor_sync(half, lane, 15);
  if (lane < 8) {
    mine[4] = static_cast<unsigned>(__any_sync(0xffu, 0)) + __ballot_sync(0xffu, 1);
    __syncwarp(0xff);
  }
  __syncwarp();
}

TEST_F(Warps, functions_exchange_between_the_lanes_of_the_mask) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    set_seed(seed);
    std::vector<unsigned> out(96 * 5, 77);
    run(1, 96, 0, warp_functions, out.data());
    for (unsigned i = 0; i < 96; ++i) {
      const unsigned lane = i % 32;
      EXPECT_EQ(out[i * 5], i / 32 * 32 + 5);
      EXPECT_EQ(out[i * 5 + 1], 0x49249249u);
      EXPECT_EQ(out[i * 5 + 2], 1u);
      EXPECT_EQ(out[i * 5 + 3], lane ^ 15);
      EXPECT_EQ(out[i * 5 + 4], lane < 8 ? 0xffu : 77u);
    }
  }
}

enum class Fault {
  lane_exits,
  lane_at_barrier,
  lane_in_other_operation,
  lanes_at_other_lines,
  self_not_named,
  reads_unnamed_lane,
};

__global__ void faulty_warp(Fault fault) {
  const bool odd_one = threadIdx.x == 17;
  switch (fault) {
    case Fault::lane_exits:
      if (!odd_one) __syncwarp();
      return;
    case Fault::lane_at_barrier:
      if (odd_one) __syncthreads();
      __shfl_xor_sync(all, 1.0f, 1);
      if (!odd_one) __syncthreads();
      return;
    case Fault::lane_in_other_operation:
      if (odd_one) {
        __any_sync(all, 1);
      } else {
        __ballot_sync(all, 1);
      }
      return;
    case Fault::lanes_at_other_lines:
      if (odd_one) {
        __syncwarp();
      } else {
        __syncwarp();
      }
      return;
    case Fault::self_not_named: __syncwarp(0xffff); return;
    case Fault::reads_unnamed_lane:
      if (threadIdx.x < 16) __shfl_sync(0xffff, 1, 16);
      return;
  }
}

TEST_F(WarpsDeathTest, lanes_that_miss_an_operation_are_told) {
  for (const unsigned seed : {0u, 3u}) {
    set_seed(seed);
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::lane_exits),
                 "lanes that have exited|for the lanes of a warp operation");
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::lane_at_barrier),
                 "31 threads from .* wait for the lanes of a warp operation, .* mask 0xffffffff");
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::lane_in_other_operation),
                 "1 thread, .17,0,0., waits for the lanes of a warp operation");
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::lanes_at_other_lines),
                 "that lane [0-9]+ calls at emulation_test.cpp");
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::self_not_named),
                 "whose mask does not name the calling lane");
    EXPECT_DEATH(run(1, 32, 0, faulty_warp, Fault::reads_unnamed_lane),
                 "reads lane 16, which the mask does not name");
    // A block of 48 threads has half a second warp.
    EXPECT_DEATH(run(1, 48, 64, sum_rows<int>, nullptr, 0u, nullptr),
                 "lanes beyond the block's end");
  }
}

// --- Clusters ---

#if __CUDA_ARCH__ >= 900

using Clusters = Emulation;
using ClustersDeathTest = Emulation;

template <class... Expected, class... Actual>
cudaError_t run_clusters(dim3 cluster, dim3 grid, dim3 block, std::size_t shared_bytes,
                         void (*kernel)(Expected...), Actual... arguments) {
  cudaLaunchConfig_t config = config_of(grid, block, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster.x;
  attribute.val.clusterDim.y = cluster.y;
  attribute.val.clusterDim.z = cluster.z;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Each barrier is one that the kernel needs.
struct With {
  bool start = true;  // before the first remote access
  bool middle = true;
  bool end = true;  // after the last one
  bool split = false;
};

// Every block writes its rank to a slot of its own in all blocks, then adds up its slots.
__global__ void exchange_ranks(With with, unsigned* sums) {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  unsigned* slots = static_cast<unsigned*>(shared_memory());
  const unsigned rank = cluster.block_rank();
  __syncthreads();
  if (with.start) cluster.sync();
  for (unsigned i = threadIdx.x; i < cluster.num_blocks(); i += blockDim.x) {
    cluster.map_shared_rank(slots, i)[rank] = rank + 1;
  }
  if (with.middle) {
    if (with.split) {
      auto token = cluster.barrier_arrive();
      cluster.barrier_wait(std::move(token));
    } else {
      cluster.barrier_arrive();
      cluster.barrier_wait();
    }
  }
  // Read remotely: from the next block.
  const unsigned* next = cluster.map_shared_rank(slots, (rank + 1) % cluster.num_blocks());
  __syncwarp();
  unsigned sum = 0;
  for (unsigned i = 0; i < cluster.num_blocks(); ++i) sum += next[i];
  if (threadIdx.x == 0) sums[blockIdx.x + gridDim.x * blockIdx.y] = sum;
  if (with.end) cluster.sync();
}

TEST_F(Clusters, blocks_reach_each_others_shared_memory) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    set_seed(seed);
    for (const unsigned size : {1u, 2u, 8u}) {
      std::vector<unsigned> sums(24, 0);
      With with;
      with.split = seed % 2 == 1;
      ASSERT_EQ(run_clusters(size, 24, 64, size * 4, exchange_ranks, with, sums.data()),
                cudaSuccess);
      EXPECT_EQ(sums, std::vector<unsigned>(24, size * (size + 1) / 2));
      EXPECT_EQ(last_launch().cluster_barriers, std::vector<unsigned>(24, 3));
      EXPECT_EQ(last_launch().block_barriers, std::vector<unsigned>(24, 1));
    }
    std::vector<unsigned> sums(24, 0);
    run_clusters(dim3(2, 3), dim3(4, 6), 32, 24, exchange_ranks, With{}, sums.data());
    EXPECT_EQ(sums, std::vector<unsigned>(24, 21));
  }
}

TEST_F(Clusters, a_missing_barrier_in_the_middle_shows_in_some_order) {
  With with;
  with.middle = false;
  unsigned wrong = 0;
  for (unsigned seed = 0; seed < 10; ++seed) {
    set_seed(seed);
    std::vector<unsigned> sums(4, 0);
    run_clusters(4, 4, 32, 16, exchange_ranks, with, sums.data());
    wrong += sums != std::vector<unsigned>(4, 10);
  }
  EXPECT_GT(wrong, 5u);
}

TEST_F(ClustersDeathTest, remote_access_needs_a_running_block) {
  std::vector<unsigned> sums(4, 0);
  With no_start;
  no_start.start = false;
  EXPECT_DEATH(run_clusters(4, 4, 32, 16, exchange_ranks, no_start, sums.data()),
               "to rank 1, which may not have started");
  With no_end;
  no_end.end = false;
  EXPECT_DEATH(
      {
        for (unsigned seed = 0; seed < 20; ++seed) {
          set_seed(seed);
          run_clusters(4, 4, 32, 16, exchange_ranks, no_end, sums.data());
        }
      },
      "which has exited|use-after-poison");
}

// Block 0 keeps a pointer into block 1, which is gone when it writes there.
__global__ void write_late() {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  unsigned* own = static_cast<unsigned*>(shared_memory());
  cluster.sync();
  unsigned* other = cluster.map_shared_rank(own, 1);
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  __syncthreads();
  *other = 1;
}

__global__ void faulty_cluster(int fault) {
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  unsigned* own = static_cast<unsigned*>(shared_memory());
  if (fault == 0 && cluster.block_rank() == 1) return;
  if (fault == 1) cluster.barrier_arrive();
  if (fault == 2) cluster.barrier_wait();
  cluster.sync();
  if (fault == 3) cluster.map_shared_rank(own, 2);
  if (fault == 4) {
    unsigned local = 0;
    cluster.map_shared_rank(&local, 1);
  }
}

TEST_F(ClustersDeathTest, faults_are_told) {
  EXPECT_DEATH(
      {
        for (unsigned seed = 0; seed < 20; ++seed) {
          set_seed(seed);
          run_clusters(2, 2, 32, 16, write_late);
        }
      },
      CUDA_EMULATION_ASAN ? "use-after-poison" : "was written after the block had exited");
  EXPECT_DEATH(run_clusters(2, 2, 32, 16, faulty_cluster, 0),
               "32 threads from .0,0,0., wait at the cluster's barrier");
  EXPECT_DEATH(run_clusters(2, 2, 32, 16, faulty_cluster, 1), "again without having waited");
  EXPECT_DEATH(run_clusters(2, 2, 32, 16, faulty_cluster, 2), "without having arrived");
  EXPECT_DEATH(run_clusters(2, 2, 32, 16, faulty_cluster, 3), "rank 2, which the cluster does not");
  EXPECT_DEATH(run_clusters(2, 2, 32, 16, faulty_cluster, 4), "not in its block's shared memory");
}

TEST_F(Clusters, sizes_are_checked) {
  unsigned sums[32];
  EXPECT_EQ(run_clusters(3, 4, 32, 12, exchange_ranks, With{}, sums), cudaErrorInvalidClusterSize);
  EXPECT_EQ(run_clusters(0, 4, 32, 12, exchange_ranks, With{}, sums), cudaErrorInvalidClusterSize);
  EXPECT_EQ(run_clusters(16, 32, 32, 64, exchange_ranks, With{}, sums),
            cudaErrorInvalidClusterSize);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidClusterSize);
  ASSERT_EQ(cudaFuncSetAttribute(exchange_ranks, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
            cudaSuccess);
  EXPECT_EQ(run_clusters(16, 32, 32, 64, exchange_ranks, With{}, sums), cudaSuccess);
  EXPECT_EQ(sums[0], 136u);
  Device older(8, 0);
  set_devices({older});
  EXPECT_EQ(run_clusters(1, 4, 32, 4, exchange_ranks, With{}, sums), cudaErrorNotSupported);
}

__global__ void depend(unsigned waiting) {
  if (threadIdx.x < waiting) {
    cudaGridDependencySynchronize();
    cudaGridDependencySynchronize();
  }
  cudaTriggerProgrammaticLaunchCompletion();
}

TEST_F(Clusters, programmatic_launches_are_recorded) {
  cudaLaunchConfig_t config = config_of(3, 64);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  ASSERT_EQ(cudaLaunchKernelEx(&config, depend, 40u), cudaSuccess);
  EXPECT_TRUE(last_launch().programmatic);
  EXPECT_EQ(last_launch().waited_for_previous_grid, 120u);
  EXPECT_EQ(last_launch().allowed_next_grid, 192u);
}

__global__ void add_one(int* value) { *value += 1; }
__global__ void wait_and_add_one(int* value) {
  cudaGridDependencySynchronize();
  *value += 1;
}

TEST_F(Clusters, the_previous_grid_may_finish_at_the_wait) {
  int value = 0;
  cuda_emulation::finish_previous_grid_late([&] { value = 10; });
  ASSERT_EQ(run(1, 1, 0, add_one, &value), cudaSuccess);
  EXPECT_EQ(value, 1);
  ASSERT_EQ(run(2, 1, 0, wait_and_add_one, &value), cudaSuccess);
  EXPECT_EQ(value, 12);
}

#endif

// --- Host ---

__global__ void nothing() {}
__global__ void nothing_else() {}

TEST_F(Host, launches_are_recorded) {
  const std::uint64_t before = last_launch().launches;
  set_devices({compiled_for, compiled_for});
  cudaSetDevice(1);
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  cudaLaunchConfig_t config = config_of(dim3(3, 2), dim3(8, 4), 100);
  config.stream = stream;
  ASSERT_EQ(cudaLaunchKernelEx(&config, nothing), cudaSuccess);
  const cuda_emulation::LastLaunch launch = last_launch();
  EXPECT_EQ(launch.grid.y, 2u);
  EXPECT_EQ(launch.block.x, 8u);
  EXPECT_EQ(launch.cluster.x, 1u);
  EXPECT_EQ(launch.shared_bytes, 100u);
  EXPECT_EQ(launch.stream, stream);
  EXPECT_EQ(launch.device, 1);
  EXPECT_EQ(launch.kernel, reinterpret_cast<const void*>(nothing));
  EXPECT_FALSE(launch.programmatic);
  EXPECT_EQ(launch.launches, before + 1);
  ASSERT_EQ(cudaLaunchKernelEx(&config, nothing_else), cudaSuccess);
  EXPECT_EQ(last_launch().launches, before + 2);
  EXPECT_EQ(cuda_emulation::launch_before_last().kernel, reinterpret_cast<const void*>(nothing));
  EXPECT_EQ(cuda_emulation::launch_before_last().launches, before + 1);
  cudaStreamDestroy(stream);
}

TEST_F(Host, configurations_are_checked) {
  const std::uint64_t before = last_launch().launches;
  EXPECT_EQ(run(0, 1, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(dim3(1, 65536), 1, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(0x80000000u, 1, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(1, 0, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(1, 1025, 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(1, dim3(32, 33), 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(run(1, dim3(1, 1, 65), 0, nothing), cudaErrorInvalidConfiguration);
  EXPECT_EQ(last_launch().launches, before);
  EXPECT_EQ(cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(Host, shared_memory_is_opted_into_by_kernel_and_device) {
  set_devices({Device(9, 0), Device(9, 0)});
  const std::size_t large = 100 << 10;
  EXPECT_EQ(run(1, 1, 48 << 10, nothing), cudaSuccess);
  EXPECT_EQ(run(1, 1, (48 << 10) + 1, nothing), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(large)),
            cudaSuccess);
  EXPECT_EQ(run(1, 1, large, nothing), cudaSuccess);
  EXPECT_EQ(run(1, 1, large + 1, nothing), cudaErrorInvalidValue);
  EXPECT_EQ(run(1, 1, large, nothing_else), cudaErrorInvalidValue);
  cudaSetDevice(1);
  EXPECT_EQ(run(1, 1, large, nothing), cudaErrorInvalidValue);
  cudaFuncAttributes attributes{};
  EXPECT_EQ(cudaFuncGetAttributes(&attributes, nothing), cudaSuccess);
  EXPECT_EQ(attributes.maxDynamicSharedSizeBytes, 48 << 10);
  EXPECT_EQ(
      cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1),
      cudaErrorInvalidValue);
}

TEST_F(Host, devices_are_those_that_were_set) {
  EXPECT_EQ(Device(7, 5).shared_memory_opt_in, 64 << 10);
  EXPECT_EQ(Device(8, 0).shared_memory_opt_in, 163 << 10);
  EXPECT_EQ(Device(8, 9).shared_memory_opt_in, 99 << 10);
  EXPECT_EQ(Device(10, 0).shared_memory_opt_in, 227 << 10);
  Device no_image(7, 0);
  no_image.ptx_version = 75;
  Device newer(12, 0, 7);
  newer.ptx_version = 75;
  set_devices({compiled_for, no_image, newer});
  int value = 0;
  EXPECT_EQ(cudaGetDeviceCount(&value), cudaSuccess);
  EXPECT_EQ(value, 3);
  EXPECT_EQ(cudaSetDevice(3), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaErrorNoKernelImageForDevice);
  cudaFuncAttributes attributes{};
  EXPECT_EQ(cudaFuncGetAttributes(&attributes, nothing), cudaErrorNoKernelImageForDevice);
  EXPECT_EQ(cudaSetDevice(2), cudaSuccess);
  EXPECT_EQ(cudaFuncGetAttributes(&attributes, nothing), cudaSuccess);
  EXPECT_EQ(attributes.ptxVersion, 75);
  EXPECT_EQ(attributes.binaryVersion, 120);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 2), cudaSuccess);
  EXPECT_EQ(value, 7);

  // Each OS thread has a current device of its own.
  int other = -1;
  std::thread([&other] { cudaGetDevice(&other); }).join();
  EXPECT_EQ(other, 0);

  set_devices({});
  EXPECT_EQ(cudaGetDeviceCount(&value), cudaErrorNoDevice);
  EXPECT_EQ(value, 0);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaErrorNoDevice);
  Device no_driver(9, 0);
  no_driver.driver = false;
  set_devices({no_driver});
  EXPECT_EQ(cudaGetDevice(&value), cudaErrorInsufficientDriver);
  EXPECT_EQ(cudaDriverGetVersion(&value), cudaSuccess);
  EXPECT_EQ(value, 0);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorInsufficientDriver), "cudaErrorInsufficientDriver");
}

TEST_F(Host, calls_about_devices_are_counted) {
  int device = 0, value = 0;
  const std::uint64_t before = cuda_emulation::device_calls();
  cudaGetDevice(&device);
  ASSERT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(cuda_emulation::device_calls(), before);
  cudaSetDevice(device);
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  EXPECT_EQ(cuda_emulation::device_calls(), before + 2);
}

TEST_F(Host, a_launch_can_be_made_to_fail) {
  const std::uint64_t before = last_launch().launches;
  cuda_emulation::fail_next_launch(cudaErrorLaunchFailure);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(last_launch().launches, before + 1);
  cuda_emulation::fail_next_launch(cudaErrorLaunchFailure, 1);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(last_launch().launches, before + 3);
}

TEST_F(Host, memory_is_the_hosts) {
  unsigned* p = nullptr;
  ASSERT_EQ(cudaMalloc(&p, 8), cudaSuccess);
  EXPECT_EQ(p[0], all);
  const unsigned from[2] = {1, 2};
  cudaMemcpyAsync(p, from, 8, cudaMemcpyHostToDevice);
  EXPECT_EQ(p[1], 2u);
  cudaMemsetAsync(p, 0, 4);
  EXPECT_EQ(p[0], 0u);
  cudaFree(p);
}

// ---- Contexts ----

using cuda_emulation::context_stack_size;
using cuda_emulation::has_context;

TEST_F(Host, contexts_are_made_by_the_first_call_that_needs_one) {
  set_devices({compiled_for, compiled_for});
  int value = 0;
  cudaGetDevice(&value);
  cudaGetDeviceCount(&value);
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1);
  EXPECT_FALSE(has_context(0) || has_context(1));
  EXPECT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_TRUE(has_context(1));
  EXPECT_FALSE(has_context(0));
  std::thread([] { run(1, 1, 0, nothing); }).join();
  EXPECT_TRUE(has_context(0));
  void* p = nullptr;
  set_devices({compiled_for});
  EXPECT_FALSE(has_context(0));
  EXPECT_EQ(cudaMallocAsync(&p, 8, nullptr), cudaSuccess);
  EXPECT_EQ(cudaFreeAsync(p, nullptr), cudaSuccess);
  EXPECT_TRUE(has_context(0));
}

TEST_F(Host, contexts_are_stacked_and_counted) {
  set_devices({compiled_for, compiled_for});
  CUdevice device = -1;
  EXPECT_EQ(cuDeviceGet(&device, 2), CUDA_ERROR_INVALID_DEVICE);
  ASSERT_EQ(cuDeviceGet(&device, 1), CUDA_SUCCESS);
  CUcontext context = nullptr, popped = nullptr;
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, device), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxPushCurrent(context), CUDA_SUCCESS);
  int current = -1, active = -1;
  EXPECT_EQ(cudaGetDevice(&current), cudaSuccess);
  EXPECT_EQ(current, 1);
  EXPECT_EQ(run(1, 1, 0, nothing), cudaSuccess);
  EXPECT_EQ(last_launch().device, 1);
  EXPECT_EQ(cuCtxPopCurrent(&popped), CUDA_SUCCESS);
  EXPECT_EQ(popped, context);
  EXPECT_EQ(cuCtxPopCurrent(&popped), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cudaGetDevice(&current), cudaSuccess);
  EXPECT_EQ(current, 0);
  EXPECT_FALSE(has_context(0));
  EXPECT_EQ(cuDevicePrimaryCtxRelease(device), CUDA_SUCCESS);
  EXPECT_FALSE(has_context(1));
  EXPECT_EQ(cuDevicePrimaryCtxRelease(device), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuCtxPushCurrent(context), CUDA_ERROR_INVALID_CONTEXT);
  unsigned flags = 0;
  EXPECT_EQ(cuDevicePrimaryCtxGetState(device, &flags, &active), CUDA_SUCCESS);
  EXPECT_EQ(active, 0);
  EXPECT_EQ(context_stack_size(), 0u);
  void* function = &device;
  EXPECT_EQ(cudaGetDriverEntryPointByVersion("cuCtxPushCurrent", &function, 12000, 0), cudaSuccess);
  EXPECT_EQ(function, reinterpret_cast<void*>(cuCtxPushCurrent));
  EXPECT_EQ(cudaGetDriverEntryPointByVersion("cuNothing", &function, 12000, 0), cudaSuccess);
  EXPECT_EQ(function, nullptr);
}

TEST_F(Host, kernel_attributes_are_a_contexts_and_all_threads_share_them) {
  const std::size_t large = Device(compiled_for).shared_memory_opt_in;
  const auto set = [](std::size_t bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  };
  ASSERT_EQ(set(large), cudaSuccess);
  EXPECT_EQ(run(1, 1, large, nothing), cudaSuccess);
  std::thread([&] { set(large - 1); }).join();
  EXPECT_EQ(run(1, 1, large, nothing), cudaErrorInvalidValue);
  cuda_emulation::interrupt_next_launch([&] { set(large); });
  EXPECT_EQ(run(1, 1, large, nothing), cudaSuccess);
  EXPECT_EQ(cudaDeviceReset(), cudaSuccess);
  EXPECT_FALSE(has_context(0));
  EXPECT_EQ(run(1, 1, large, nothing), cudaErrorInvalidValue);
  EXPECT_TRUE(has_context(0));
}

// ---- Order of streams ----

__global__ void write_one(unsigned* p) { *p = 1; }

class Order : public Emulation {
 protected:
  void SetUp() override {
    Emulation::SetUp();
    for (cudaStream_t& stream : free_) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamCreate(&blocking_);
    cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
  }
  void TearDown() override {
    for (cudaStream_t stream : {free_[0], free_[1], blocking_}) cudaStreamDestroy(stream);
    cudaEventDestroy(event_);
    Emulation::TearDown();
  }

  static unsigned* allocate(cudaStream_t stream) {
    unsigned* p = nullptr;
    EXPECT_EQ(cudaMallocAsync(&p, 64, stream), cudaSuccess);
    return p;
  }
  static void use(unsigned* p, cudaStream_t stream) {
    cudaLaunchConfig_t config = config_of(1, 1);
    config.stream = stream;
    EXPECT_EQ(cudaLaunchKernelEx(&config, write_one, p + 3), cudaSuccess);
  }
  static void free(unsigned* p, cudaStream_t stream) {
    EXPECT_EQ(cudaFreeAsync(p, stream), cudaSuccess);
  }

  cudaStream_t free_[2] = {}, blocking_ = nullptr;  // of the default stream, or waiting for it
  cudaEvent_t event_ = nullptr;
};
using OrderDeathTest = Order;

constexpr char freed_too_early[] = "freed on a stream that does not wait for another one's use";

TEST_F(Order, memory_is_freed_behind_its_uses) {
  unsigned* p = allocate(free_[0]);
  use(p, free_[0]);
  free(p, free_[0]);

  p = allocate(free_[0]);
  use(p, free_[0]);
  cudaEventRecord(event_, free_[0]);
  cudaStreamWaitEvent(free_[1], event_);
  use(p, free_[1]);
  free(p, free_[1]);

  p = allocate(nullptr);
  use(p, nullptr);
  free(p, blocking_);

  p = allocate(blocking_);
  use(p, blocking_);
  free(p, nullptr);

  p = allocate(free_[0]);
  use(p, free_[0]);
  cudaStreamSynchronize(free_[0]);
  free(p, free_[1]);

  p = allocate(free_[0]);
  use(p, free_[1]);
  cudaDeviceSynchronize();
  EXPECT_EQ(cudaFree(p), cudaSuccess);
}

TEST_F(OrderDeathTest, memory_that_is_freed_too_early_is_told) {
  unsigned* const p = allocate(free_[0]);
  EXPECT_DEATH(free(p, nullptr), freed_too_early) << "the allocation itself";
  cudaStreamSynchronize(free_[0]);
  use(p, free_[0]);
  EXPECT_DEATH(free(p, nullptr), freed_too_early);
  EXPECT_DEATH(free(p, free_[1]), freed_too_early);
  EXPECT_DEATH(cudaFree(p), freed_too_early);
  cudaEventRecord(event_, free_[0]);
  use(p, free_[0]);
  cudaStreamWaitEvent(nullptr, event_);
  EXPECT_DEATH(free(p, nullptr), freed_too_early) << "an event before the last use";
  cudaMemsetAsync(p, 0, 4, free_[1]);
  EXPECT_DEATH(free(p, free_[0]), freed_too_early) << "a use that is no kernel";
  cudaDeviceSynchronize();
  free(p, nullptr);
}

TEST_F(OrderDeathTest, streams_that_are_gone_or_elsewhere_are_told) {
  set_devices({compiled_for, compiled_for});
  cudaStream_t gone = nullptr;
  cudaStreamCreate(&gone);
  cudaStreamDestroy(gone);
  EXPECT_DEATH(cudaEventRecord(event_, gone), "a stream that was destroyed is used");
  cudaSetDevice(1);
  EXPECT_DEATH(cudaEventRecord(event_, blocking_), "a stream of another device is used");
}

}  // namespace
