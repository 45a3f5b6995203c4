// The forward kernel: one algorithm over two ways to reach elements (elements.cuh) and two ways to
// hold a row between its sum and its results.
#pragma once

#include "elements.cuh"
#include "team.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// Which vectors of a row a thread holds is the same for both: every threads()th, in ascending
// order.

// In registers, `vectors` a thread. All loads are issued before the first is waited for.
template <class Elements, int vectors>
class RowInRegisters {
 public:
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  static constexpr bool is_long = false;

  __device__ __forceinline__ RowInRegisters(const Elements& e, const Team& team)
      : e_(e), first_(team.thread()), step_(team.threads()) {}

  __device__ __forceinline__ void load_weights(const Row& row, std::int64_t count) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < static_cast<int>(count)) weights_[k] = e_.load_weights(row, vector(k));
    }
  }
  // Issues the loads; finish() waits for them.
  __device__ __forceinline__ void load(const Row& row, std::int64_t count) {
    count_ = static_cast<int>(count);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) loaded_[k] = e_.load(row, vector(k));
    }
  }
  __device__ __forceinline__ void finish(const Row& row) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) chunks_[k] = e_.add_residual(row, vector(k), loaded_[k]);
    }
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) visit(vector(k), chunks_[k].held());
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_weighted(Visit visit) const {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) visit(vector(k), chunks_[k].held(), weights_[k]);
    }
  }

 private:
  // A register row has at most 2^14 vectors.
  __device__ __forceinline__ int vector(int k) const {
    return static_cast<int>(first_ + static_cast<unsigned>(k) * step_);
  }

  const Elements& e_;
  unsigned first_;
  unsigned step_;
  int count_ = 0;
  typename Elements::Loaded loaded_[vectors];
  Chunk chunks_[vectors];
  typename Elements::Weights weights_[vectors];
};

// In shared memory, or read again each time: then the sum with the residual is computed again too,
// so that outputs may lie over inputs.
template <class Elements, int at_once>
class RowReadAgain {
 public:
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  static constexpr bool is_long = true;

  __device__ __forceinline__ RowReadAgain(const Elements& e, const Team& team, bool staged)
      : e_(e), first_(team.thread()), step_(team.threads()) {
    if (staged) {
      staged_ = reinterpret_cast<Chunk*>(
          static_cast<char*>(shared_memory()) +
          reduction_bytes(static_cast<int>(blockDim.x), static_cast<int>(gridDim.y)));
    }
  }

  __device__ __forceinline__ void load_weights(const Row&, std::int64_t) {}
  __device__ __forceinline__ void load(const Row& row, std::int64_t count) {
    row_ = row;
    count_ = count;
  }
  // Each thread reads back what itself has written to shared memory: no barrier.
  __device__ __forceinline__ void finish(const Row&) {
    if (staged_ == nullptr) return;
    Chunk* place = staged_ + threadIdx.x;
    for (std::int64_t i = first_; i < count_; i += std::int64_t{at_once} * step_) {
      Chunk chunks[at_once];
      read(i, chunks);
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (vector(i, k) < count_) place[static_cast<unsigned>(k) * blockDim.x] = chunks[k];
      }
      place += at_once * blockDim.x;
    }
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    unsigned place = threadIdx.x;
    for (std::int64_t i = first_; i < count_; i += std::int64_t{at_once} * step_) {
      Chunk chunks[at_once];
      if (staged_ == nullptr) {
        read(i, chunks);
      } else {
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          if (vector(i, k) < count_) chunks[k] = staged_[place];
          place += blockDim.x;
        }
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (vector(i, k) < count_) visit(vector(i, k), chunks[k]);
      }
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_weighted(Visit visit) const {
    for_each([&](std::int64_t vector, const Chunk& chunk) {
      visit(vector, chunk, e_.load_weights(row_, vector));
    });
  }

 private:
  __device__ __forceinline__ void read(std::int64_t i, Chunk (&chunks)[at_once]) const {
    typename Elements::Loaded loaded[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (vector(i, k) < count_) loaded[k] = e_.load(row_, vector(i, k));
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (vector(i, k) < count_) chunks[k] = e_.add_residual(row_, vector(i, k), loaded[k]);
    }
  }
  __device__ __forceinline__ std::int64_t vector(std::int64_t i, int k) const {
    return i + static_cast<std::int64_t>(static_cast<unsigned>(k) * step_);
  }

  const Elements& e_;
  unsigned first_;
  unsigned step_;
  Chunk* staged_ = nullptr;
  Row row_ = {};
  std::int64_t count_ = 0;
};

// A row is normalised as (x * 2^exponent) * rstd. The exponent is mostly 0; one multiplication more
// an element spares every kernel a second copy of its last loop.
//
// The power of two that a row is scaled by, in halves: either is a normal number, and elements and
// rstd that take one each lose no bits that the result could show.
template <class C>
struct Scale {
  static constexpr int most = sizeof(C) == sizeof(float) ? 126 : 1022;

  int exponent;

  __device__ __forceinline__ C factor() const { return power_of_two<C>(clamped(exponent / 2)); }
  __device__ __forceinline__ C rest() const {
    return power_of_two<C>(clamped(exponent - clamped(exponent / 2)));
  }

 private:
  // Exponents beyond both halves come from eps or given statistics that leave nothing finite.
  static __device__ __forceinline__ int clamped(int e) {
    return e > most ? most : e < -most ? -most : e;
  }
};

// A row with an infinity, a NaN or nothing but zeros is left as it is.
template <class C>
__device__ __forceinline__ int exponent_of_row(unsigned long long largest, double eps) {
  if (largest == 0 || largest >= infinity_bits<C>()) return 0;
  return exponent_to_one(magnitude_of_bits<C>(largest), eps);
}

// From the mean square of values scaled by 2^exponent.
template <class C>
__device__ __forceinline__ C rescued_rstd(Statistic<C> mean, double eps, int exponent) {
  if (exponent == 0) {
    return static_cast<C>(rmsnorm::detail::reciprocal_root<C>(mean.value() + eps));
  }
  return reciprocal_root(plus(mean, split<C>(std::ldexp(eps, 2 * exponent))));
}

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
        return store_given(row, active);
      }
    }
    Scale<C> scale = {0};
    Statistic<C> mean = mean_square<false>(scale);
    const Statistic<C> v = plus(mean, p_.statistics.eps_parts);
    // A row whose mean_square + eps is outside of the range in which it can be computed as it is
    // gets scaled. Rows that share a warp take this way together, for their exchanges.
    const bool unsafe = active && !is_safe(v);
    if (team_.any(unsafe)) {
      const unsigned long long largest = largest_magnitude();
      const int exponent = exponent_of_row<C>(largest, p_.statistics.eps);
      if (unsafe) scale.exponent = exponent;
      mean = mean_square<true>(scale);
      // The errors of an infinite sum are NaN.
      if (largest == infinity_bits<C>()) mean = {magnitude_of_infinity<C>(), C(0)};
    }
    if constexpr (!Elements::is_packed) {
      if (p_.mean_square_is_output) {
        const double value = std::ldexp(mean.value(), -2 * scale.exponent);
        if (active && team_.thread() == 0) e_.store_mean_square(row, value);
        return;
      }
    }
    const C rstd =
        unsafe ? rescued_rstd(mean, p_.statistics.eps, scale.exponent) : reciprocal_root(v);
    store(row, rstd, scale, active);
  }

 private:
  __device__ __forceinline__ void store_given(const Row& row, bool active) const {
    const double given = active ? e_.given_mean_square(row) : 1.0;
    const Statistic<C> v = plus(split<C>(given), p_.statistics.eps_parts);
    if (is_safe(v)) return store(row, reciprocal_root(v), {0}, active);
    const RowScale scale = rescue_given<C>(given + p_.statistics.eps);
    store(row, static_cast<C>(scale.rstd), {scale.exponent}, active);
  }

  template <bool scaled>
  __device__ __forceinline__ Statistic<C> mean_square(Scale<C> scale) {
    constexpr bool plain = Elements::sums_plainly && !Holder::is_long;
    if constexpr (Elements::is_packed || sizeof(C) == sizeof(double)) {
      using Sum = typename std::conditional<plain, PlainSum, CompensatedSum<C>>::type;
      return mean_of_total(sum_of_squares<scaled>(scale, Sum()));
    } else {
      const ChosenSum sum = sum_of_squares<scaled>(scale, ChosenSum{{}, p_.sums_plainly});
      return p_.sums_plainly ? mean_of_total(PlainSum{sum.parts.sum}) : mean_of_total(sum.parts);
    }
  }
  // Two sums a thread, of even and odd elements, halve the chain of dependent additions.
  template <bool scaled, class Sum>
  __device__ __forceinline__ Sum sum_of_squares(Scale<C> scale, Sum zero) const {
    const C factor = scale.factor(), rest = scale.rest();
    Sum even = zero, odd = zero;
    holder_.for_each([&](std::int64_t vector, const Chunk& chunk) {
      C v[Elements::width];
      e_.counted_values(chunk, vector, v);
#pragma unroll
      for (int j = 0; j < Elements::width; ++j) {
        if (scaled) v[j] = multiply(multiply(v[j], factor), rest);
        if (j % 2 == 0) {
          even.add_square(v[j]);
        } else {
          odd.add_square(v[j]);
        }
      }
      even.settle();
      odd.settle();
    });
    even.merge(odd);
    return even;
  }
  template <class Sum>
  __device__ __forceinline__ Statistic<C> mean_of_total(const Sum& sum) {
    const Sum total = team_.reduce(sum);
    return mean_of(total.sum, total.error(), p_.statistics);
  }

  __device__ __forceinline__ unsigned long long largest_magnitude() {
    LargestMagnitude largest;
    holder_.for_each([&](std::int64_t vector, const Chunk& chunk) {
      C v[Elements::width];
      e_.counted_values(chunk, vector, v);
#pragma unroll
      for (int j = 0; j < Elements::width; ++j) largest.merge({magnitude_bits(v[j])});
    });
    return team_.reduce(largest).bits;
  }

  __device__ __forceinline__ void store(const Row& row, C unrounded_rstd, Scale<C> scale,
                                        bool active) const {
    if (active && team_.thread() == 0) {
      const double rstd = static_cast<double>(unrounded_rstd);
      e_.store_rstd(row, scale.exponent == 0 ? unrounded_rstd
                                             : static_cast<C>(std::ldexp(rstd, scale.exponent)));
    }
    const C factor = scale.factor();
    const C rstd = multiply(e_.rounded_rstd(unrounded_rstd), scale.rest());
    holder_.for_each_weighted([&](std::int64_t vector, const Chunk& chunk, const Weights& weights) {
      e_.store_sum(row, vector, chunk);
      C v[Elements::width];
      e_.values(chunk, v);
#pragma unroll
      for (int j = 0; j < Elements::width; ++j) v[j] = multiply(v[j], factor);
      e_.store_normalised(row, vector, v, rstd, weights);
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
  holder.finish(row);
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
