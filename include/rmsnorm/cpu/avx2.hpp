// AVX2 + FMA + F16C: 8 floats or 4 doubles a register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../convert.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {
namespace avx2 {

using f32v = __m256;
using f64v = __m256d;

inline f32v load(const float* p) { return _mm256_loadu_ps(p); }
inline f64v load(const double* p) { return _mm256_loadu_pd(p); }
inline f32v load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline f32v load(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// v rounded to bf16 in the upper half of each element, the lower half undefined. Adding 0x7fff plus
// the lowest kept bit carries into the kept bits exactly when nearest-even rounds up.
inline __m256i bf16_upper_of_bf16_nans(f32v v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i lowest = _mm256_set1_epi32(0x10000);
  const __m256i is_odd = _mm256_cmpeq_epi32(_mm256_and_si256(bits, lowest), lowest);
  return _mm256_add_epi32(bits, _mm256_sub_epi32(_mm256_set1_epi32(0x7fff), is_odd));
}

// The same for any NaN, which must not be carried into and become quiet.
inline __m256i bf16_upper(f32v v) {
  const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(bf16_upper_of_bf16_nans(v), quiet, is_nan);
}

inline void store(float* p, f32v v) { _mm256_storeu_ps(p, v); }
inline void store(double* p, f64v v) { _mm256_storeu_pd(p, v); }
inline void store(float16* p, f32v v) {
  const __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
inline void store(bfloat16* p, f32v v) {
  const __m256i bits = _mm256_srli_epi32(bf16_upper(v), 16);
  const __m128i low = _mm256_castsi256_si128(bits), high = _mm256_extracti128_si256(bits, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

// Past the caches, at least in pieces of 16 bytes, to which p is aligned: the next pieces complete
// the line. Whole registers save 3 % of the time of f32 4096 x 4096.
inline void stream_bits(void* p, __m128i bits) { _mm_stream_si128(static_cast<__m128i*>(p), bits); }
inline void stream_bits(void* p, __m256i bits) {
  if (reinterpret_cast<std::uintptr_t>(p) % 32 == 0) {
    return _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  }
  stream_bits(p, _mm256_castsi256_si128(bits));
  stream_bits(static_cast<char*>(p) + 16, _mm256_extracti128_si256(bits, 1));
}
inline void stream(float* p, f32v v) { stream_bits(p, _mm256_castps_si256(v)); }
inline void stream(double* p, f64v v) { stream_bits(p, _mm256_castpd_si256(v)); }
inline void stream(float16* p, f32v v) {
  stream_bits(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline f32v rounded_to(const float*, f32v v) { return v; }
inline f64v rounded_to(const double*, f64v v) { return v; }
inline f32v rounded_to(const float16*, f32v v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline f32v rounded_to(const bfloat16*, f32v v) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_upper_of_bf16_nans(v), upper));
}

struct Pair {
  f32v even, odd;
};
inline Pair load_pair(const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(bits, upper))};
}
inline Pair load_pair(const float* p) {
  // Shuffles work within 128 bits; the permutation puts the four pairs in order.
  const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, _MM_SHUFFLE(3, 1, 2, 0))),
          _mm256_castpd_ps(_mm256_permute4x64_pd(odd, _MM_SHUFFLE(3, 1, 2, 0)))};
}
// One comparison finds a NaN in either half; choosing without a branch takes five operations more
// in each, of twelve.
template <Nans nans>
inline __m256i bf16_bits(Pair v) {
  __m256i even = bf16_upper_of_bf16_nans(v.even), odd = bf16_upper_of_bf16_nans(v.odd);
  if constexpr (nans == Nans::any) {
    const __m256 has_nan = _mm256_cmp_ps(v.even, v.odd, _CMP_UNORD_Q);
    if (_mm256_testz_ps(has_nan, has_nan) == 0) {
      even = bf16_upper(v.even);
      odd = bf16_upper(v.odd);
    }
  }
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}
template <Nans nans>
inline void store_pair(bfloat16* p, Pair v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_bits<nans>(v));
}
template <Nans nans>
inline void stream_pair(bfloat16* p, Pair v) {
  stream_bits(p, bf16_bits<nans>(v));
}

constexpr bool has_partial_registers = false;

inline f32v splat(float s) { return _mm256_set1_ps(s); }
inline f64v splat(double s) { return _mm256_set1_pd(s); }
inline f32v add(f32v a, f32v b) { return _mm256_add_ps(a, b); }
inline f64v add(f64v a, f64v b) { return _mm256_add_pd(a, b); }
inline f64v subtract(f64v a, f64v b) { return _mm256_sub_pd(a, b); }
inline f32v multiply(f32v a, f32v b) { return _mm256_mul_ps(a, b); }
inline f64v multiply(f64v a, f64v b) { return _mm256_mul_pd(a, b); }
inline f64v multiply_rounded(f64v a, f64v b) {
  f64v product = multiply(a, b);
  RMSNORM_ROUND_HERE(product);
  return product;
}
inline f32v fma(f32v a, f32v b, f32v c) { return _mm256_fmadd_ps(a, b, c); }
inline f64v fma(f64v a, f64v b, f64v c) { return _mm256_fmadd_pd(a, b, c); }

inline f64v divide(f64v a, f64v b) { return _mm256_div_pd(a, b); }
inline f64v square_root(f64v v) { return _mm256_sqrt_pd(v); }
inline f64v rounded_to_float(f64v v) { return _mm256_cvtps_pd(_mm256_cvtpd_ps(v)); }
inline bool all_within(f64v v, double least, double most) {
  const __m256d above = _mm256_cmp_pd(v, splat(least), _CMP_GE_OQ);
  const __m256d below = _mm256_cmp_pd(v, splat(most), _CMP_LE_OQ);
  return _mm256_movemask_pd(_mm256_and_pd(above, below)) == 15;
}
inline double square_root(double v) {
  const __m128d one = _mm_set_sd(v);
  return _mm_cvtsd_f64(_mm_sqrt_sd(one, one));
}
// Lanes j and j + 2 of four, then the last two.
inline double total_of_four(f64v v) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double row_total(const f64v (&row)[2]) { return total_of_four(add(row[0], row[1])); }
inline f64v row_totals(const f64v (&rows)[4][2]) {
  // Lanes j and j + 4, then of these sums j and j + 2 of two rows at a time, then the last two.
  const f64v a = add(rows[0][0], rows[0][1]), b = add(rows[1][0], rows[1][1]);
  const f64v c = add(rows[2][0], rows[2][1]), d = add(rows[3][0], rows[3][1]);
  const f64v ac = add(_mm256_permute2f128_pd(a, c, 0x20), _mm256_permute2f128_pd(a, c, 0x31));
  const f64v bd = add(_mm256_permute2f128_pd(b, d, 0x20), _mm256_permute2f128_pd(b, d, 0x31));
  return _mm256_hadd_pd(ac, bd);
}

inline f64v load_double(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }

template <int i>
inline f64v half(f32v v) {
  return _mm256_cvtps_pd(i == 0 ? _mm256_castps256_ps128(v) : _mm256_extractf128_ps(v, 1));
}

#define RMSNORM_KERNEL RMSNORM_FLATTEN
#define RMSNORM_KERNEL_PART RMSNORM_NOINLINE RMSNORM_FLATTEN
#include "kernels.inl"
#undef RMSNORM_KERNEL_PART
#undef RMSNORM_KERNEL

}  // namespace avx2
}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
