// One element at a time: the reference for every other ISA, and what runs where there is none.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../convert.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {
namespace scalar {

// Wrapped, so that a vector of one float is a type of its own as it is on every other ISA.
struct f32v {
  float value;
};
struct f64v {
  double value;
};

template <class T>
inline f32v load(const T* p) {
  return {rmsnorm::detail::widen(*p)};
}
inline f64v load(const double* p) { return {*p}; }

template <class T, class V>
inline void store(T* p, V v) {
  *p = rmsnorm::detail::narrow<T>::from(v.value);
}
template <class T, class V>
inline V rounded_to(T*, V v) {
  return {rmsnorm::detail::widen(rmsnorm::detail::narrow<T>::from(v.value))};
}

struct Pair {
  f32v even, odd;
};
template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + 1)};
}
template <Nans>
inline void store_pair(bfloat16* p, Pair v) {
  store(p, v.even);
  store(p + 1, v.odd);
}

// There is no store past the caches in C++: streaming_bytes() keeps it from being chosen.
template <class T, class V>
inline void stream(T* p, V v) {
  store(p, v);
}
template <Nans nans>
inline void stream_pair(bfloat16* p, Pair v) {
  store_pair<nans>(p, v);
}

constexpr bool has_partial_registers = false;

inline f32v splat(float s) { return {s}; }
inline f64v splat(double s) { return {s}; }
inline f32v add(f32v a, f32v b) { return {a.value + b.value}; }
inline f64v add(f64v a, f64v b) { return {a.value + b.value}; }
inline f64v subtract(f64v a, f64v b) { return {a.value - b.value}; }
inline f32v multiply(f32v a, f32v b) { return {a.value * b.value}; }
inline f64v multiply(f64v a, f64v b) { return {a.value * b.value}; }
inline f64v multiply_rounded(f64v a, f64v b) {
  double product = a.value * b.value;
  RMSNORM_ROUND_HERE(product);
  return {product};
}
inline f32v fma(f32v a, f32v b, f32v c) { return {std::fma(a.value, b.value, c.value)}; }
inline f64v fma(f64v a, f64v b, f64v c) { return {std::fma(a.value, b.value, c.value)}; }

inline f64v divide(f64v a, f64v b) { return {a.value / b.value}; }
inline f64v square_root(f64v v) { return {std::sqrt(v.value)}; }
inline f64v rounded_to_float(f64v v) { return {static_cast<double>(static_cast<float>(v.value))}; }
inline bool all_within(f64v v, double least, double most) {
  return v.value >= least && v.value <= most;
}
inline double square_root(double v) { return std::sqrt(v); }
inline double row_total(const f64v (&row)[8]) {
  SquareSum sum;
  for (int i = 0; i < 8; ++i) sum.hi[i] = row[i].value;
  return sum.total();
}
inline f64v row_totals(const f64v (&rows)[1][8]) { return {row_total(rows[0])}; }

inline f64v load_double(const float* p) { return {static_cast<double>(*p)}; }

template <int i>
inline f64v half(f32v v) {
  return {static_cast<double>(v.value)};
}

#define RMSNORM_KERNEL
#define RMSNORM_KERNEL_PART inline
#include "kernels.inl"
#undef RMSNORM_KERNEL_PART
#undef RMSNORM_KERNEL

}  // namespace scalar
}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
