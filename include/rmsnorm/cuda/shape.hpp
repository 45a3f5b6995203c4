// How a row is shared among threads. A function of the row's length, its dtypes and the
// architecture alone: never of the number of rows, of strides or of alignment, so that a row's bits
// depend on none of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmsnorm {
namespace cuda {

// A GPU as far as kernels depend on it.
struct Architecture {
  int version;  // of the code that runs, ten times the compute capability
  int multiprocessors;
  std::size_t max_shared_memory;  // bytes that a block may ask for
};

namespace detail {

constexpr int first_version_with_clusters = 90;

struct RowShape {
  int threads;  // of a block for one row
  int rows_per_block;
  int vectors;  // that a thread holds in registers; 0: the row is read again or staged
  int cluster;  // blocks that share a row
};

constexpr int round_up(std::int64_t value, int multiple) {
  return static_cast<int>((value + multiple - 1) / multiple) * multiple;
}

// `vectors`: 16-byte pieces of a row. Four of them a thread are 64 bytes on the way from each of
// 512 to 1024 threads of a multiprocessor: above the 20 to 40 KB that cover the latency of its
// share of an H100's memory (3.35 TB/s / 132 * 0.8 us = 20 KB).
constexpr RowShape row_shape(std::int64_t vectors, int version) {
  constexpr int warp = 32, small_block = 128, largest_block = 512, in_registers = 4;
  constexpr std::int64_t block_capacity = std::int64_t{largest_block} * in_registers;
  // Parts of a warp: shuffles alone.
  int lanes = 1;
  while (lanes < warp && lanes < vectors) lanes *= 2;
  if (vectors <= warp) return {lanes, small_block / lanes, 1, 1};
  if (vectors <= 2 * warp) return {warp, small_block / warp, 2, 1};
  if (vectors <= in_registers * warp) return {warp, small_block / warp, in_registers, 1};
  // A block: one barrier.
  if (vectors <= block_capacity) {
    const std::int64_t threads = (vectors + in_registers - 1) / in_registers;
    return {round_up(threads, warp), 1, in_registers, 1};
  }
  if (version < first_version_with_clusters) return {largest_block, 1, 0, 1};
  // Clusters: one barrier of theirs.
  int cluster = 2;
  while (cluster < 8 && vectors > cluster * block_capacity) cluster *= 2;
  if (vectors > cluster * block_capacity) return {largest_block, 1, 0, cluster};
  const std::int64_t share = (vectors + cluster - 1) / cluster;
  return {round_up((share + in_registers - 1) / in_registers, warp), 1, in_registers, cluster};
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
