// Sums of products, mostly squares, and what becomes of these: 1 / sqrt of the mean, rounded once.
#pragma once

#include <type_traits>

#include "../statistics.hpp"
#include "device.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// As that of doubles in statistics.hpp.
__device__ __forceinline__ Statistic<float> exact_sum(float a, float b) {
  const float sum = add(a, b);
  const float grown = subtract(sum, a);
  return {sum, add(subtract(a, subtract(sum, grown)), subtract(b, grown))};
}
using rmsnorm::detail::exact_sum;

// A sum of products in one float. Between 16-bit rows the few additions of a thread cannot show: 32
// of them err by 2^-19 at most, against 2^-12, half a unit of f16.
struct PlainSum {
  float sum = 0;

  __device__ __forceinline__ void add_product(float a, float b) { sum = multiply_add(a, b, sum); }
  __device__ __forceinline__ void merge(const PlainSum& o) { sum = add(sum, o.sum); }
  __device__ __forceinline__ void settle() {}
  __device__ __forceinline__ PlainSum exchanged(unsigned distance) const {
    return {__shfl_xor_sync(0xffffffffu, sum, static_cast<int>(distance))};
  }
  __device__ __forceinline__ float error() const { return 0; }
};

// A sum of products and the errors of all its roundings, of every product and every addition,
// summed apart (Knuth, TAOCP 2, 4.2.2 theorem B). settle() moves the errors to the sum every few
// elements, so that they stay small: the relative error is then at most 2^-45 for each piece of
// four floats that a thread adds, and 2^-43 for one of eight 16-bit numbers. Ten operations an
// element, a tenth of what the element's bytes leave time for, where double arithmetic would take
// all of it on chips that have 1/64 of their units in double.
template <class C>
struct CompensatedSum {
  C sum = 0;
  C errors = 0;

  __device__ __forceinline__ void add_product(C a, C b) {
    const C product = multiply(a, b);
    const C product_error = multiply_subtract(a, b, product);
    const C addition_error = grow(product);
    errors = add(errors, add(product_error, addition_error));
  }
  // The errors of an infinite sum are NaN, and are dropped.
  __device__ __forceinline__ void settle() {
    if (!(std::fabs(errors) < magnitude_of_infinity<C>())) errors = 0;
    const C total = add(sum, errors);
    errors = subtract(errors, subtract(total, sum));
    sum = total;
  }
  // Symmetric: both partners of an exchange get the same bits.
  __device__ __forceinline__ void merge(const CompensatedSum& o) {
    const C addition_error = grow(o.sum);
    errors = add(add(errors, o.errors), addition_error);
  }
  __device__ __forceinline__ CompensatedSum exchanged(unsigned distance) const {
    return {__shfl_xor_sync(0xffffffffu, sum, static_cast<int>(distance)),
            __shfl_xor_sync(0xffffffffu, errors, static_cast<int>(distance))};
  }
  __device__ __forceinline__ C error() const { return errors; }

 private:
  // Adds v to the sum and returns what the rounding lost, exactly.
  __device__ __forceinline__ C grow(C v) {
    const Statistic<C> total = exact_sum(sum, v);
    sum = total.high;
    return total.low;
  }
};

// Either of the two above, chosen at run time; reduced as the one that it is.
struct ChosenSum {
  CompensatedSum<float> parts;
  bool plain;

  __device__ __forceinline__ void add_product(float a, float b) {
    if (plain) {
      parts.sum = multiply_add(a, b, parts.sum);
    } else {
      parts.add_product(a, b);
    }
  }
  __device__ __forceinline__ void settle() {
    if (!plain) parts.settle();
  }
  __device__ __forceinline__ void merge(const ChosenSum& o) {
    if (plain) {
      parts.sum = add(parts.sum, o.parts.sum);
    } else {
      parts.merge(o.parts);
    }
  }
};

// Which of them a row of T takes that is packed; and any row, where it is asked at run time.
template <class T, bool row_is_long>
using PackedSum =
    typename std::conditional<sizeof(T) == 2 && !row_is_long, PlainSum,
                              CompensatedSum<typename std::conditional<
                                  std::is_same<T, double>::value, double, float>::type>>::type;
template <class C>
using AnySum =
    typename std::conditional<std::is_same<C, double>::value, CompensatedSum<C>, ChosenSum>::type;

template <class C>
__device__ __forceinline__ AnySum<C> make_any_sum(bool plain) {
  if constexpr (std::is_same<C, double>::value) {
    return {};
  } else {
    return {{}, plain};
  }
}

// The largest magnitude of a row as bits, NaN above all.
struct LargestMagnitude {
  unsigned long long bits = 0;

  __device__ __forceinline__ void merge(const LargestMagnitude& o) {
    if (o.bits > bits) bits = o.bits;
  }
  __device__ __forceinline__ LargestMagnitude exchanged(unsigned distance) const {
    return {__shfl_xor_sync(0xffffffffu, bits, static_cast<int>(distance))};
  }
};

// Of floats the double that they are together.
template <class C>
__device__ __forceinline__ double value_of(Statistic<C> v) {
  return rounded(Statistic<double>{static_cast<double>(v.high), static_cast<double>(v.low)});
}
__device__ __forceinline__ float rounded(Statistic<float> v) {
  return v.low - v.low == 0.0f ? add(v.high, v.low) : v.high;
}

// A root rounded to C, and what it lacks.
template <class C>
struct Root {
  C value;
  C rest;
};

// A double as two numbers of C. What exceeds float becomes infinite, and is then never safe.
template <class C>
RMSNORM_HOST_DEVICE inline Statistic<C> split(double v) {
  const C high = static_cast<C>(v);
  return {high, static_cast<C>(v - static_cast<double>(high))};
}

// The divisor and eps of a launch, prepared on the host.
template <class C>
struct StatisticOptions {
  double count;
  double eps;
  Statistic<C> inverse_count;
  Statistic<C> eps_parts;
};

template <class C>
inline StatisticOptions<C> make_statistic_options(std::int64_t count, double eps) {
  const double divisor = static_cast<double>(count);
  return {divisor, eps, split<C>(1.0 / divisor), split<C>(eps)};
}

// Whether rstd belongs to a mean square + eps in SafeRange, so that x * rstd and a product with
// rstd lose nothing.
__device__ __forceinline__ bool is_safe_rstd(float rstd) {
  return rstd >= 0x1p-63f && rstd <= 0x1p50f;
}
__device__ __forceinline__ bool is_safe_rstd(double rstd) {
  return rstd >= 0x1p-500 && rstd <= 0x1p500;
}

// ---- float: pairs of floats, since many chips have next to no double units ----

__device__ __forceinline__ Statistic<float> plus(Statistic<float> mean, Statistic<float> eps) {
  const Statistic<float> sum = exact_sum(mean.high, eps.high);
  const float low = add(sum.low, add(mean.low, eps.low));
  const float high = add(sum.high, low);
  return {high, subtract(low, subtract(high, sum.high))};
}

__device__ __forceinline__ Statistic<float> mean_of(float sum, float error,
                                                    const StatisticOptions<float>& o) {
  const float high = multiply(sum, o.inverse_count.high);
  float low = multiply_subtract(sum, o.inverse_count.high, high);
  low = multiply_add(sum, o.inverse_count.low, low);
  return {high, multiply_add(error, o.inverse_count.high, low)};
}

// So that no term of reciprocal_root below is denormal.
__device__ __forceinline__ bool is_safe(Statistic<float> v) {
  return v.high >= 0x1p-80f && v.high <= 0x1p80f && v.low - v.low == 0.0f;
}

// r + r (1 - v r^2) / 2 from an r good to a few units of its last place: the sum's only rounding is
// that of the last operation, the terms left out are below 2^-44 of it.
__device__ __forceinline__ Root<float> rounded_root(Statistic<float> v) {
  const float r = __frsqrt_rn(v.high);
  const float square = multiply(r, r);
  const float square_error = multiply_subtract(r, r, square);
  float excess = multiply_subtract(v.high, square, 1.0f);
  excess = multiply_add(v.high, square_error, excess);
  excess = multiply_add(v.low, square, excess);
  const float half = multiply(-0.5f, r);
  const float value = multiply_add(half, excess, r);
  return {value, multiply_add(half, excess, subtract(r, value))};
}

// ---- double ----

// Of a mean that has no low part. That of an infinite sum is NaN; it is not safe and not used.
__device__ __forceinline__ Statistic<double> plus(Statistic<double> mean, Statistic<double> eps) {
  return exact_sum(mean.high, eps.high);
}
// Rounded once, so that the mean square that is stored is the one that forward uses.
__device__ __forceinline__ Statistic<double> mean_of(double sum, double error,
                                                     const StatisticOptions<double>& o) {
  return {rounded(rmsnorm::detail::mean_of({sum, error}, o.count)), 0.0};
}
__device__ __forceinline__ bool is_safe(Statistic<double> v) {
  return v.high >= SafeRange<double>::least && v.high <= SafeRange<double>::most;
}
__device__ __forceinline__ Root<double> rounded_root(Statistic<double> v) {
  const RowScale scale = scale_of_root<double>(v, 0);
  return {scale.rstd, scale.rest};
}

template <class C>
__device__ __forceinline__ C reciprocal_root(Statistic<C> v) {
  return rounded_root(v).value;
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
