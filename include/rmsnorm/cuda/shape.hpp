// How a row is shared among threads. A function of the row's length, its dtypes and the
// architecture alone: never of the number of rows, of strides or of alignment, so that a row's bits
// depend on none of them. How many rows share a block's sums of gradients depends on sizes alone.
#pragma once

#include <cstdint>

namespace rmsnorm {
namespace cuda {

// A GPU as far as kernels depend on it.
struct Architecture {
  int version;  // of the code that runs, ten times the compute capability
  int multiprocessors;
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

// `vectors`: 16-byte pieces of a row; `in_registers`: how many a thread holds at most;
// `small_block`: threads of a block of rows that parts of a warp share.
constexpr RowShape row_shape(std::int64_t vectors, int version, int in_registers, int small_block) {
  constexpr int warp = 32, largest_block = 512;
  const std::int64_t block_capacity = std::int64_t{largest_block} * in_registers;
  // Parts of a warp: shuffles alone.
  int lanes = 1;
  while (lanes < warp && lanes < vectors) lanes *= 2;
  if (vectors <= warp) return {lanes, small_block / lanes, 1, 1};
  for (int held = 2; held <= in_registers; held *= 2) {
    if (vectors <= held * warp) return {warp, small_block / warp, held, 1};
  }
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

// Four vectors a thread are 64 bytes on the way from each of 512 to 1024 threads of a
// multiprocessor: above the 20 to 40 KB that cover the latency of its share of an H100's memory
// (3.35 TB/s / 132 * 0.8 us = 20 KB).
constexpr RowShape row_shape(std::int64_t vectors, int version) {
  return row_shape(vectors, version, 4, 128);
}

// Two vectors of dy and of x a thread are the same 64 bytes; the sums of a thread's columns, the
// row, its weights and the next row take the registers that are left.
constexpr RowShape gradient_shape(std::int64_t vectors, int version) {
  return row_shape(vectors, version, 2, 256);
}

// Rows that share a block's sums, where `rows` are computed together. An H100 has 132
// multiprocessors: two blocks for each of them are 264, four are 528.
//
// Writing and reading a row of float sums moves 8 bytes a column, against 3 * 2 of each row of
// 16-bit dy, x and dx: 4 % at 32 rows (of f32 and f64 the same at 16). Up to 32 rows there are 264
// blocks, whose sums (n KB) stay in the L2 cache; then up to 528; then up to 128 rows for each
// team, whose sum errs by 2^-17 of the magnitudes at most; then more blocks. Fewer than 4 rows are
// not worth a block: its start and end take as long. A row of more than 1024 vectors has several
// blocks of threads (or, without clusters, one that moves 32 KB at a time): half as many blocks of
// rows.
constexpr std::int64_t gradient_rows_per_block(std::int64_t rows, std::int64_t vectors) {
  constexpr std::int64_t least = 4, enough = 32, most = 128;
  const std::int64_t blocks = vectors > 1024 ? 132 : 264;
  const std::int64_t together = gradient_shape(vectors, 0).rows_per_block;  // whatever the version
  std::int64_t share = (rows + blocks - 1) / blocks;
  if (share > enough) share = enough;
  if (share < least * together) share = least * together;
  const std::int64_t of_most = (rows + 2 * blocks - 1) / (2 * blocks);
  if (share < of_most) share = of_most;
  if (share > most * together) share = most * together;
  return (share + together - 1) / together * together;
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
