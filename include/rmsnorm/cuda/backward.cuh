// The backward kernel: a block of threads, or a cluster of them, takes a block of rows one after
// the other, or as many at a time as it has teams. As in forward one algorithm over two ways to
// reach elements (gradient_elements.cuh) and two ways to hold a row (row_holders.cuh).
#pragma once

#include "block_sums.cuh"
#include "gradient_elements.cuh"
#include "row_statistics.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// One row, by all threads of its team. `active` is false for threads without a row, which only
// take part in exchanges.
template <class Elements, class Holder, class Sums>
class Backward {
 public:
  using C = typename Elements::Compute;
  using Params = typename Elements::Params;
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  using Weights = typename Elements::Weights;
  using Factors = RowFactors<Elements>;
  static constexpr int width = Elements::width;

  __device__ __forceinline__ Backward(const Params& p, const Elements& e, Team& team,
                                      const Holder& holder, Sums& sums)
      : p_(p),
        e_(e),
        team_(team),
        holder_(holder),
        sums_(sums),
        statistics_(p.statistics, e, team, holder) {}

  // given_rstd: anything where there is none.
  __device__ __forceinline__ void run(const Row& row, C given_rstd, bool active) {
    const Normaliser<C> normaliser = normaliser_of_row(row, given_rstd, active);
    const Factors f(normaliser.scale, normaliser.rstd);
    const Statistic<C> sum = correlation(row, f);
    if constexpr (!Elements::is_packed) {
      if (p_.d_mean_square.present && active && team_.thread() == 0) {
        // The power of two last: the square of rstd may leave the range where the product does not.
        const double r = static_cast<double>(normaliser.rstd);
        e_.store_d_mean_square(
            row, std::ldexp(-0.5 * r * r * value_of(sum), 2 * normaliser.scale.exponent));
      }
    }
    store(row, f, rounded(mean_of(sum.high, sum.low, p_.statistics)));
  }

 private:
  // A given rstd counts where a row of that magnitude is computed without scaling.
  __device__ __forceinline__ Normaliser<C> normaliser_of_row(const Row& row, C given_rstd,
                                                             bool active) {
    const Normaliser<C> given = {given_rstd, {0}};
    const bool use_given = e_.has_rstd() && is_safe_rstd(given_rstd);
    if (!team_.any(active && !use_given)) return given;
    const Normaliser<C> computed = computed_normaliser(row, active);
    return use_given ? given : computed;
  }
  __device__ __forceinline__ Normaliser<C> computed_normaliser(const Row& row, bool active) {
    if constexpr (!Elements::is_packed) {
      if (p_.mean_square.present) {
        return normaliser_of(active ? e_.mean_square(row) : 1.0, p_.statistics);
      }
    }
    return statistics_.mean_square(active).normaliser;
  }

  // xhat and g of a vector.
  __device__ __forceinline__ void values(const Row& row, std::int64_t vector, const Chunk& chunk,
                                         const Weights& weights, const Factors& f, C (&xhat)[width],
                                         C (&dy)[width], C (&g)[width]) const {
    e_.values(chunk, xhat);
    e_.gradients(chunk, dy);
    e_.weight_values(row, vector, weights, g);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      xhat[j] = multiply(f.scaled(xhat[j]), f.rstd());
      g[j] = multiply(dy[j], g[j]);
    }
  }

  // The sum of g * xhat over the row: of even and of odd elements apart, as the sum of squares.
  // What a vector has beyond the row's end are zeros only as long as no factor is infinite.
  __device__ __forceinline__ Statistic<C> correlation(const Row& row, const Factors& f) {
    auto even = e_.template zero_sum<Holder::is_long>(), odd = even;
    holder_.for_each_weighted([&](Place place, const Chunk& chunk, const Weights& weights) {
      C xhat[width], dy[width], g[width];
      values(row, place.vector, chunk, weights, f, xhat, dy, g);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (!e_.is_in_row(place.vector, j)) continue;
        if (j % 2 == 0) {
          even.add_product(g[j], xhat[j]);
        } else {
          odd.add_product(g[j], xhat[j]);
        }
      }
      even.settle();
      odd.settle();
    });
    even.merge(odd);
    return statistics_.total(even);
  }

  __device__ __forceinline__ void store(const Row& row, const Factors& f, C c) {
    holder_.for_each_weighted([&](Place place, const Chunk& chunk, const Weights& weights) {
      C xhat[width], dy[width], g[width];
      values(row, place.vector, chunk, weights, f, xhat, dy, g);
      sums_.add_row(place, dy, xhat);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (e_.is_counted(place.vector, j)) g[j] = multiply_add(-c, xhat[j], g[j]);
        g[j] = f.scaled(g[j]);
      }
      e_.store_gradient(row, place.vector, chunk, g, f.rstd());
    });
  }

  const Params& p_;
  const Elements& e_;
  Team& team_;
  const Holder& holder_;
  Sums& sums_;
  RowStatistics<Elements, Holder> statistics_;
};

// All threads stay to the end, as the exchanges of a warp and the barriers of a block ask for.
// While a row is computed, those that a thread holds of the next one are on their way.
template <class Sums, class Elements, class Holder>
__device__ __forceinline__ void differentiate_rows(const typename Elements::Params& p,
                                                   std::int64_t block, const Elements& e,
                                                   Team& team, Holder& holder) {
  using Row = typename Elements::Row;
  using C = typename Elements::Compute;
  const RowRange range = p.blocks.rows_of(block);
  const auto is_active = [&](std::int64_t first) { return first + threadIdx.y < range.end; };
  const auto row_at = [&](std::int64_t first) {
    return e.row_at(is_active(first) ? first + threadIdx.y : range.begin);
  };
  const auto count_at = [&](std::int64_t first) { return is_active(first) ? p.vectors : 0; };
  const auto rstd_at = [&](const Row& row, std::int64_t first) {
    return e.has_rstd() && is_active(first) ? e.rstd(row) : C(1);
  };

  const char* weight = row_at(range.begin).weight;
  if (p.weight_is_constant) holder.load_weights(row_at(range.begin), count_at(range.begin));
  wait_for_previous_kernels();
  holder.load(row_at(range.begin), count_at(range.begin));
  C next_rstd = rstd_at(row_at(range.begin), range.begin);
  if (!p.weight_is_constant) holder.load_weights(row_at(range.begin), count_at(range.begin));
  // Its wait is for the end of this kernel, wherever it is allowed to start.
  allow_next_kernel();
  Sums sums(p, block, team);
  team.wait_until_all_run();
  for (std::int64_t first = range.begin; first < range.end; first += blockDim.y) {
    const Row row = row_at(first);
    if (row.weight != weight) {
      weight = row.weight;
      holder.load_weights(row, count_at(first));
    }
    holder.finish(row, count_at(first));
    const C rstd = next_rstd;
    const std::int64_t next = first + blockDim.y;
    if (next < range.end) {
      const Row next_row = row_at(next);
      holder.load(next_row, count_at(next));
      next_rstd = rstd_at(next_row, next);
    }
    Backward<Elements, Holder, Sums>(p, e, team, holder, sums).run(row, rstd, is_active(first));
  }
  sums.store(team, p.vectors);
}

// ---- kernels ----

// The last layer of a grid may have blocks to spare.
template <class Params>
__device__ __forceinline__ bool find_block(const Params& p, std::int64_t* block) {
  *block = std::int64_t{blockIdx.z} * gridDim.x + blockIdx.x;
  return *block < p.blocks.count();
}

template <class Elements, int vectors>
__global__ void __launch_bounds__(max_threads)
    backward_in_registers(const __grid_constant__ typename Elements::Params p) {
  std::int64_t block;
  if (!find_block(p, &block)) return;
  const Elements e(p);
  Team team;
  RowInRegisters<Elements, vectors> holder(e, team);
  differentiate_rows<SumsInRegisters<Elements, vectors>>(p, block, e, team, holder);
}

// One vector at a time: two spilled a kilobyte in code for compute capability 10.0 and 12.0. One
// block a multiprocessor is enough, or ptxas spills to make room for two.
template <class Elements>
__global__ void __launch_bounds__(max_threads, 1)
    backward_reading_again(const __grid_constant__ typename Elements::Params p) {
  std::int64_t block;
  if (!find_block(p, &block)) return;
  const Elements e(p);
  Team team;
  RowReadAgain<Elements, 1> holder(e, team, p.staged);
  differentiate_rows<SumsInMemory<Elements>>(p, block, e, team, holder);
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
