// From the rows that a team holds to rstd: the sums over a row, and what becomes of rows whose
// squares overflow or underflow.
#pragma once

#include "row_holders.cuh"
#include "sums.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// The power of two that a row is scaled by, in halves: either is a normal number, and elements and
// rstd that take one each lose no bits that the result could show. What eps and given statistics
// ask for beyond both leaves next to nothing finite but zeros, and is a third factor.
template <class C>
struct Scale {
  static constexpr int most = sizeof(C) == sizeof(float) ? 126 : 1022;

  int exponent;

  __device__ __forceinline__ C factor() const { return power_of_two<C>(first()); }
  __device__ __forceinline__ C rest() const { return power_of_two<C>(second()); }
  __device__ __forceinline__ C beyond() const {
    return power_of_two<C>(clamped(exponent - first() - second()));
  }

 private:
  __device__ __forceinline__ int first() const { return clamped(exponent / 2); }
  __device__ __forceinline__ int second() const { return clamped(exponent - first()); }
  static __device__ __forceinline__ int clamped(int e) {
    return e > most ? most : e < -most ? -most : e;
  }
};

// A row with an infinity or a NaN is left as it is, and one of nothing but zeros where eps is zero.
template <class C>
__device__ __forceinline__ int exponent_of_row(unsigned long long largest, double eps) {
  if (largest >= infinity_bits<C>() || (largest == 0 && eps == 0.0)) return 0;
  return exponent_to_one(magnitude_of_bits<C>(largest), eps);
}

// From the mean square of values scaled by 2^exponent.
template <class C>
__device__ __forceinline__ Root<C> rescued_rstd(Statistic<C> mean, double eps, int exponent) {
  if (exponent == 0) {
    const double v = value_of(mean) + eps;
    return {static_cast<C>(rmsnorm::detail::reciprocal_root<C>({v, 0.0})), C(0)};
  }
  return rounded_root(plus(mean, split<C>(std::ldexp(eps, 2 * exponent))));
}

// A row is normalised as (x * 2^exponent) * rstd. The exponent is mostly 0; one multiplication more
// an element spares every kernel a second copy of its last loop.
template <class C>
struct Normaliser {
  C rstd;
  Scale<C> scale;
  C rest = 0;  // of RowScale

  __device__ __forceinline__ C returned() const {
    if (scale.exponent == 0) return rstd;
    return returned_rstd<C>({static_cast<double>(rstd), scale.exponent, static_cast<double>(rest)});
  }
};

// What an element is multiplied by: scaled(), then rstd(). The third factor of the scale belongs to
// elements, as the first; packed rows, whose statistics are their own, need it for nothing but an
// eps beside which they vanish, and have it in rstd.
template <class Elements>
class RowFactors {
 public:
  using C = typename Elements::Compute;

  __device__ __forceinline__ RowFactors(Scale<C> scale, C rstd)
      : factor_(scale.factor()), beyond_(scale.beyond()), rstd_(multiply(rstd, scale.rest())) {
    if constexpr (Elements::is_packed) rstd_ = multiply(rstd_, beyond_);
  }

  __device__ __forceinline__ C scaled(C v) const {
    v = multiply(v, factor_);
    if constexpr (!Elements::is_packed) v = multiply(v, beyond_);
    return v;
  }
  __device__ __forceinline__ C rstd() const { return rstd_; }

 private:
  C factor_;
  C beyond_;
  C rstd_;
};

// From a mean square that was given.
template <class C>
__device__ __forceinline__ Normaliser<C> normaliser_of(double mean_square,
                                                       const StatisticOptions<C>& options) {
  const Statistic<C> v = plus(split<C>(mean_square), options.eps_parts);
  if (is_safe(v)) return {reciprocal_root(v), {0}};
  const RowScale scale = rescue_given<C>({mean_square + options.eps, 0.0});
  return {static_cast<C>(scale.rstd), {scale.exponent}, static_cast<C>(scale.rest)};
}

// Of the row that the holder has, by all threads of its team. `active` is false for threads without
// a row, which only take part in exchanges.
template <class Elements, class Holder>
class RowStatistics {
 public:
  using C = typename Elements::Compute;
  using Chunk = typename Elements::Chunk;

  struct MeanSquare {
    Statistic<C> scaled;  // of x * 2^exponent
    Normaliser<C> normaliser;
  };

  __device__ __forceinline__ RowStatistics(const StatisticOptions<C>& options, const Elements& e,
                                           Team& team, const Holder& holder)
      : options_(options), e_(e), team_(team), holder_(holder) {}

  __device__ __forceinline__ MeanSquare mean_square(bool active) {
    Scale<C> scale = {0};
    Statistic<C> mean = mean_of_squares<false>(scale);
    const Statistic<C> v = plus(mean, options_.eps_parts);
    // A row whose mean_square + eps is outside of the range in which it can be computed as it is
    // gets scaled. Rows that share a warp take this way together, for their exchanges.
    const bool unsafe = active && !is_safe(v);
    if (team_.any(unsafe)) {
      const unsigned long long largest = largest_magnitude();
      const int exponent = exponent_of_row<C>(largest, options_.eps);
      if (unsafe) scale.exponent = exponent;
      mean = mean_of_squares<true>(scale);
    }
    if (!unsafe) return {mean, {reciprocal_root(v), scale}};
    const Root<C> rstd = rescued_rstd(mean, options_.eps, scale.exponent);
    return {mean, {rstd.value, scale, rstd.rest}};
  }

  // The total over the team, and its error.
  template <class Sum>
  __device__ __forceinline__ Statistic<C> total(const Sum& sum) {
    const Sum all = team_.reduce(sum);
    return {all.sum, all.error()};
  }
  __device__ __forceinline__ Statistic<float> total(const ChosenSum& sum) {
    return sum.plain ? total(PlainSum{sum.parts.sum}) : total(sum.parts);
  }

 private:
  // Two sums a thread, of even and odd elements, halve the chain of dependent additions.
  template <bool scaled>
  __device__ __forceinline__ Statistic<C> mean_of_squares(Scale<C> scale) {
    const C factor = scale.factor(), rest = scale.rest();
    auto even = e_.template zero_sum<Holder::is_long>(), odd = even;
    holder_.for_each([&](std::int64_t vector, const Chunk& chunk) {
      C v[Elements::width];
      e_.counted_values(chunk, vector, v);
#pragma unroll
      for (int j = 0; j < Elements::width; ++j) {
        if (scaled) v[j] = multiply(multiply(v[j], factor), rest);
        if (j % 2 == 0) {
          even.add_product(v[j], v[j]);
        } else {
          odd.add_product(v[j], v[j]);
        }
      }
      even.settle();
      odd.settle();
    });
    even.merge(odd);
    const Statistic<C> sum = total(even);
    return mean_of(sum.high, sum.low, options_);
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

  const StatisticOptions<C>& options_;
  const Elements& e_;
  Team& team_;
  const Holder& holder_;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
