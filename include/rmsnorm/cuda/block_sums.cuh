// The sums of dy * xhat and of dy over the rows of a block, each thread's for the columns that it
// has, and the sums of the blocks' sums.
//
// A team adds its rows in ascending order. Where a block has several teams, their sums meet in its
// shared memory, those of the upper half of teams added to those of the lower one until one is
// left.
#pragma once

#include "gradient_elements.cuh"
#include "row_holders.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// Shared memory of a block for one of the two sums.
template <class C>
RMSNORM_HIDDEN constexpr std::size_t team_sum_bytes(int teams, std::int64_t columns) {
  return teams > 1 ? static_cast<std::size_t>(teams) * static_cast<std::size_t>(columns) * sizeof(C)
                   : 0;
}

// One of the two sums.
template <class C, int width>
class TeamSum {
 public:
  struct alignas(16) Columns {
    C v[width];
  };

  // `sums`: of the block, in the workspace; null: not wanted. `place`: of the two, in shared
  // memory.
  __device__ __forceinline__ TeamSum(char* sums, unsigned place, std::int64_t vectors)
      : of_block_(reinterpret_cast<Columns*>(sums)), own_(of_block_), vectors_(vectors) {
    if (sums != nullptr && blockDim.y > 1) {
      own_ = static_cast<Columns*>(shared_memory()) + (place * blockDim.y + threadIdx.y) * vectors;
    }
  }

  __device__ __forceinline__ bool is_wanted() const { return own_ != nullptr; }
  __device__ __forceinline__ Columns& at(std::int64_t vector) const { return own_[vector]; }

  __device__ __forceinline__ void clear(const Team& team) const {
    for (std::int64_t i = team.thread(); i < vectors_; i += team.threads()) own_[i] = Columns{};
  }

  // Of all teams to the workspace; by all threads of the block.
  __device__ __forceinline__ void merge_teams(const Team& team) const {
    if (own_ == of_block_) return;
#pragma unroll 1
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.y >= half) continue;
      for (std::int64_t i = team.thread(); i < vectors_; i += team.threads()) {
        const Columns more = own_[i + half * vectors_];
#pragma unroll
        for (int j = 0; j < width; ++j) own_[i].v[j] = add(own_[i].v[j], more.v[j]);
      }
    }
    if (threadIdx.y != 0) return;
    for (std::int64_t i = team.thread(); i < vectors_; i += team.threads()) of_block_[i] = own_[i];
  }

 private:
  Columns* of_block_;
  Columns* own_;
  std::int64_t vectors_;
};

// In registers until the block's rows are done: for packed rows, which have no bias.
template <class Elements, int vectors>
class SumsInRegisters {
 public:
  using C = typename Elements::Compute;
  static constexpr int width = Elements::width;

  __device__ __forceinline__ SumsInRegisters(const typename Elements::Params& p, std::int64_t block,
                                             const Team&)
      : dweight_(p.sums.dweight == nullptr ? nullptr : p.sums.dweight + block * p.sums.block_stride,
                 0, p.vectors) {}

  __device__ __forceinline__ void add_row(Place place, const C (&dy)[width],
                                          const C (&xhat)[width]) {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      sums_[place.slot][j] = multiply_add(dy[j], xhat[j], sums_[place.slot][j]);
    }
  }

  __device__ __forceinline__ void store(const Team& team, std::int64_t count) {
    if (!dweight_.is_wanted()) return;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const std::int64_t vector = team.thread() + static_cast<unsigned>(k) * team.threads();
      if (vector >= count) continue;
      typename TeamSum<C, width>::Columns columns;
#pragma unroll
      for (int j = 0; j < width; ++j) columns.v[j] = sums_[k][j];
      dweight_.at(vector) = columns;
    }
    dweight_.merge_teams(team);
  }

 private:
  TeamSum<C, width> dweight_;
  C sums_[vectors][width] = {};
};

// In memory, the workspace's or shared.
template <class Elements>
class SumsInMemory {
 public:
  using C = typename Elements::Compute;
  static constexpr int width = Elements::width;

  __device__ __forceinline__ SumsInMemory(const typename Elements::Params& p, std::int64_t block,
                                          const Team& team)
      : dweight_(at_block(p.sums.dweight, p.sums, block), 0, p.vectors),
        dbias_(at_block(p.sums.dbias, p.sums, block), p.sums.dweight != nullptr ? 1 : 0,
               p.vectors) {
    if (dweight_.is_wanted()) dweight_.clear(team);
    if (dbias_.is_wanted()) dbias_.clear(team);
  }

  __device__ __forceinline__ void add_row(Place place, const C (&dy)[width],
                                          const C (&xhat)[width]) const {
    if (dweight_.is_wanted()) {
      typename TeamSum<C, width>::Columns columns = dweight_.at(place.vector);
#pragma unroll
      for (int j = 0; j < width; ++j) columns.v[j] = multiply_add(dy[j], xhat[j], columns.v[j]);
      dweight_.at(place.vector) = columns;
    }
    if (dbias_.is_wanted()) {
      typename TeamSum<C, width>::Columns columns = dbias_.at(place.vector);
#pragma unroll
      for (int j = 0; j < width; ++j) columns.v[j] = add(columns.v[j], dy[j]);
      dbias_.at(place.vector) = columns;
    }
  }

  __device__ __forceinline__ void store(const Team& team, std::int64_t) const {
    if (dweight_.is_wanted()) dweight_.merge_teams(team);
    if (dbias_.is_wanted()) dbias_.merge_teams(team);
  }

 private:
  static __device__ __forceinline__ char* at_block(char* first, const BlockSums& sums,
                                                   std::int64_t block) {
    return first == nullptr ? nullptr : first + block * sums.block_stride;
  }

  TeamSum<C, width> dweight_;
  TeamSum<C, width> dbias_;
};

// ---- the second kernel ----

// Some of the dimensions that tell groups of rows apart.
struct GroupDimensions {
  int rank;
  std::int64_t count;  // of their indices
  std::int64_t sizes[max_row_rank];
  std::int64_t steps[max_row_rank];    // groups
  std::int64_t strides[max_row_rank];  // bytes of the output, where it varies over them
};

// One output: a row for each index of `rows`, each the sum of the blocks of the groups along
// `shared`.
struct SummedOutput {
  const char* sums;  // of block 0; null: absent
  GroupDimensions rows, shared;
  AnyOperand out;
};

struct SumBlocksParams {
  AnyRows shape;  // n and the normalised dimensions
  std::int64_t blocks_per_group;
  std::int64_t block_stride;  // bytes
  std::int64_t tiles;         // of a row, each as many columns as a warp has lanes
  SummedOutput outputs[2];
};

constexpr int tile_columns = warp_size;
constexpr int most_tile_threads = 16;  // for one column

template <class Visit>
__device__ __forceinline__ void for_each_step(const GroupDimensions& g, std::int64_t index,
                                              Visit visit) {
#pragma unroll 1
  for (int d = g.rank - 1; d >= 0; --d) {
    const std::int64_t quotient = index / g.sizes[d];
    visit(d, index - quotient * g.sizes[d]);
    index = quotient;
  }
}

// A tile of columns a block, blockIdx.y the output. Thread y of a column takes every blockDim.y-th
// of the blocks' sums, in ascending order and in double; then those of the threads are added, and
// the result rounded once.
template <class C>
__global__ void __launch_bounds__(tile_columns* most_tile_threads)
    sum_blocks(const __grid_constant__ SumBlocksParams p) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const SummedOutput& o = p.outputs[blockIdx.y];
  const std::int64_t tile = std::int64_t{blockIdx.z} * gridDim.x + blockIdx.x;
  const std::int64_t row = tile / p.tiles;
  const std::int64_t column = (tile - row * p.tiles) * tile_columns + threadIdx.x;
  if (row >= o.rows.count) return;

  std::int64_t group = 0;
  char* out = o.out.data;
  for_each_step(o.rows, row, [&](int d, std::int64_t i) {
    group += i * o.rows.steps[d];
    out += i * o.rows.strides[d];
  });
  double sum = 0;
  if (column < p.shape.n) {
    const char* const sums = o.sums + column * static_cast<std::int64_t>(sizeof(C));
    for (std::int64_t shared = 0; shared < o.shared.count; ++shared) {
      std::int64_t of_group = group;
      for_each_step(o.shared, shared,
                    [&](int d, std::int64_t i) { of_group += i * o.shared.steps[d]; });
      const char* const first = sums + of_group * p.blocks_per_group * p.block_stride;
#pragma unroll 8
      for (std::int64_t b = threadIdx.y; b < p.blocks_per_group; b += blockDim.y) {
        sum =
            add(sum, static_cast<double>(*reinterpret_cast<const C*>(first + b * p.block_stride)));
      }
    }
  }
  double* const partial = static_cast<double*>(shared_memory());
  partial[threadIdx.y * tile_columns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.shape.n) return;
  for (unsigned y = 1; y < blockDim.y; ++y) {
    sum = add(sum, partial[y * tile_columns + threadIdx.x]);
  }
  store_anywhere<double>(p.shape, o.out, out, column, sum);
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
