// The forward kernel: one algorithm over two ways to reach elements (elements.cuh) and two ways to
// hold a row between its sum and its results (row_holders.cuh).
#pragma once

#include "elements.cuh"
#include "row_statistics.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// One row, by all threads of its team. `active` is false for threads without a row, which only
// take part in exchanges.
template <class Elements, class Holder>
class Forward {
 public:
  using C = typename Elements::Compute;
  using Params = typename Elements::Params;
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  using Weights = typename Elements::Weights;

  __device__ __forceinline__ Forward(const Params& p, const Elements& e, Team& team,
                                     const Holder& holder)
      : p_(p), e_(e), team_(team), holder_(holder) {}

  __device__ __forceinline__ void run(const Row& row, bool active) {
    if constexpr (!Elements::is_packed) {
      if (p_.mean_square.present && !p_.mean_square_is_output) {
        const double given = active ? e_.given_mean_square(row) : 1.0;
        return store(row, normaliser_of(given, p_.statistics), active);
      }
    }
    RowStatistics<Elements, Holder> statistics(p_.statistics, e_, team_, holder_);
    const auto mean = statistics.mean_square(active);
    if constexpr (!Elements::is_packed) {
      if (p_.mean_square_is_output) {
        const double value = std::ldexp(value_of(mean.scaled), -2 * mean.normaliser.scale.exponent);
        if (active && team_.thread() == 0) e_.store_mean_square(row, value);
        return;
      }
    }
    store(row, mean.normaliser, active);
  }

 private:
  __device__ __forceinline__ void store(const Row& row, Normaliser<C> normaliser,
                                        bool active) const {
    if (active && team_.thread() == 0) e_.store_rstd(row, normaliser.returned());
    const RowFactors<Elements> factors(normaliser.scale, e_.rounded_rstd(normaliser.rstd));
    holder_.for_each_weighted([&](Place place, const Chunk& chunk, const Weights& weights) {
      e_.store_sum(row, place.vector, chunk);
      C v[Elements::width];
      e_.values(chunk, v);
#pragma unroll
      for (int j = 0; j < Elements::width; ++j) v[j] = factors.scaled(v[j]);
      e_.store_normalised(row, place.vector, v, factors.rstd(), weights);
    });
  }

  const Params& p_;
  const Elements& e_;
  Team& team_;
  const Holder& holder_;
};

// All threads stay to the end, as the exchanges of a warp and the barriers of a block ask for. A
// block has one group of rows: a loop over several would keep 20 registers a thread for itself.
template <class Elements, class Holder>
__device__ __forceinline__ void normalize_rows(const typename Elements::Params& p,
                                               const Elements& e, Team& team, Holder& holder) {
  const std::int64_t block = std::int64_t{blockIdx.z} * gridDim.x + blockIdx.x;
  const std::int64_t index = block * blockDim.y + threadIdx.y;
  const bool active = index < p.rows;
  const typename Elements::Row row = e.row_at(active ? index : 0);
  const std::int64_t count = active ? p.vectors : 0;
  if (p.weight_is_constant) holder.load_weights(row, count);
  wait_for_previous_kernels();
  holder.load(row, count);
  if (!p.weight_is_constant) holder.load_weights(row, count);
  // Its wait is for the end of this kernel, wherever it is allowed to start.
  allow_next_kernel();
  holder.finish(row, count);
  team.wait_until_all_run();
  Forward<Elements, Holder>(p, e, team, holder).run(row, active);
}

// ---- kernels ----

template <class Elements, int vectors>
__global__ void __launch_bounds__(max_threads)
    forward_in_registers(const __grid_constant__ typename Elements::Params p) {
  const Elements e(p);
  Team team;
  RowInRegisters<Elements, vectors> holder(e, team);
  normalize_rows(p, e, team, holder);
}

template <class Elements, int at_once>
__global__ void __launch_bounds__(max_threads)
    forward_reading_again(const __grid_constant__ typename Elements::Params p) {
  const Elements e(p);
  Team team;
  RowReadAgain<Elements, at_once> holder(e, team, p.staged);
  normalize_rows(p, e, team, holder);
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
