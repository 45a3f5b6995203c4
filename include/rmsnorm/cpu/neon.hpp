// NEON (Advanced SIMD of aarch64): 4 floats or 2 doubles a register. The f16 conversions used here
// belong to the base architecture.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "../convert.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"

namespace rmsnorm {
namespace cpu {
namespace detail {
namespace neon {

using f32v = float32x4_t;
using f64v = float64x2_t;

inline uint16x4_t load_bits(const void* p) {
  return vld1_u16(static_cast<const std::uint16_t*>(p));
}
inline void store_bits(void* p, uint16x4_t bits) { vst1_u16(static_cast<std::uint16_t*>(p), bits); }

inline f32v load(const float* p) { return vld1q_f32(p); }
inline f64v load(const double* p) { return vld1q_f64(p); }
inline f32v load(const float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits(p))); }
inline f32v load(const bfloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_bits(p), 16)); }

// v rounded to bf16 in the upper half of each element, the lower half undefined; explained in
// avx2.hpp.
template <Nans nans>
inline uint32x4_t bf16_upper(f32v v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  if constexpr (nans == Nans::of_bf16) return rounded;
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t is_number = vceqq_f32(v, v);
  return vbslq_u32(is_number, rounded, quiet);
}

inline void store(float* p, f32v v) { vst1q_f32(p, v); }
inline void store(double* p, f64v v) { vst1q_f64(p, v); }
inline void store(float16* p, f32v v) { store_bits(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline void store(bfloat16* p, f32v v) { store_bits(p, vshrn_n_u32(bf16_upper<Nans::any>(v), 16)); }

inline f32v rounded_to(const float*, f32v v) { return v; }
inline f64v rounded_to(const double*, f64v v) { return v; }
inline f32v rounded_to(const float16*, f32v v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
inline f32v rounded_to(const bfloat16*, f32v v) {
  return vreinterpretq_f32_u32(vandq_u32(bf16_upper<Nans::of_bf16>(v), vdupq_n_u32(0xffff0000u)));
}

struct Pair {
  f32v even, odd;
};
inline Pair load_pair(const bfloat16* p) {
  const uint16x8_t halves = vld1q_u16(reinterpret_cast<const std::uint16_t*>(p));
  const uint32x4_t bits = vreinterpretq_u32_u16(halves);
  return {vreinterpretq_f32_u32(vshlq_n_u32(bits, 16)),
          vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000u)))};
}
inline Pair load_pair(const float* p) {
  const float32x4x2_t split = vld2q_f32(p);
  return {split.val[0], split.val[1]};
}
template <Nans nans>
inline void store_pair(bfloat16* p, Pair v) {
  // Shifts the even results below the odd ones.
  const uint32x4_t both = vsriq_n_u32(bf16_upper<nans>(v.odd), bf16_upper<nans>(v.even), 16);
  vst1q_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpretq_u16_u32(both));
}

// No store past the caches is used here: streaming_bytes() keeps it from being chosen.
template <class T, class V>
inline void stream(T* p, V v) {
  store(p, v);
}
template <Nans nans>
inline void stream_pair(bfloat16* p, Pair v) {
  store_pair<nans>(p, v);
}

constexpr bool has_partial_registers = false;

inline f32v splat(float s) { return vdupq_n_f32(s); }
inline f64v splat(double s) { return vdupq_n_f64(s); }
inline f32v add(f32v a, f32v b) { return vaddq_f32(a, b); }
inline f64v add(f64v a, f64v b) { return vaddq_f64(a, b); }
inline f64v subtract(f64v a, f64v b) { return vsubq_f64(a, b); }
inline f32v multiply(f32v a, f32v b) { return vmulq_f32(a, b); }
inline f64v multiply(f64v a, f64v b) { return vmulq_f64(a, b); }
inline f64v multiply_rounded(f64v a, f64v b) {
  f64v product = multiply(a, b);
  RMSNORM_ROUND_HERE(product);
  return product;
}
inline f32v fma(f32v a, f32v b, f32v c) { return vfmaq_f32(c, a, b); }
inline f64v fma(f64v a, f64v b, f64v c) { return vfmaq_f64(c, a, b); }

inline f64v divide(f64v a, f64v b) { return vdivq_f64(a, b); }
inline f64v square_root(f64v v) { return vsqrtq_f64(v); }
inline f64v rounded_to_float(f64v v) { return vcvt_f64_f32(vcvt_f32_f64(v)); }
inline bool all_within(f64v v, double least, double most) {
  const uint64x2_t within = vandq_u64(vcgeq_f64(v, splat(least)), vcleq_f64(v, splat(most)));
  return (vgetq_lane_u64(within, 0) & vgetq_lane_u64(within, 1)) != 0;
}
inline double square_root(double v) { return vget_lane_f64(vsqrt_f64(vdup_n_f64(v)), 0); }
inline double row_total(const f64v (&row)[4]) {
  return vpaddd_f64(add(add(row[0], row[2]), add(row[1], row[3])));
}
inline f64v row_totals(const f64v (&rows)[2][4]) {
  const f64v a = add(add(rows[0][0], rows[0][2]), add(rows[0][1], rows[0][3]));
  const f64v b = add(add(rows[1][0], rows[1][2]), add(rows[1][1], rows[1][3]));
  return vpaddq_f64(a, b);
}

inline f64v load_double(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }

template <int i>
inline f64v half(f32v v) {
  return i == 0 ? vcvt_f64_f32(vget_low_f32(v)) : vcvt_high_f64_f32(v);
}

#define RMSNORM_KERNEL RMSNORM_FLATTEN
#define RMSNORM_KERNEL_PART RMSNORM_NOINLINE RMSNORM_FLATTEN
#include "kernels.inl"
#undef RMSNORM_KERNEL_PART
#undef RMSNORM_KERNEL

}  // namespace neon
}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm
