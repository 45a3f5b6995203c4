// The primitives of AVX-512, included by avx512.hpp and avx512_bf16.hpp inside their namespaces and
// target regions, the latter with RMSNORM_BF16_CONVERSION.

using f32v = __m512;
using f64v = __m512d;

struct Pair {
  f32v even, odd;
};

inline f32v load(const float* p) { return _mm512_loadu_ps(p); }
inline f64v load(const double* p) { return _mm512_loadu_pd(p); }
inline f32v load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline f32v load(const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// v rounded to bf16 in the upper half of each element, the lower half undefined; explained in
// avx2.hpp.
template <Nans nans>
inline __m512i bf16_upper(f32v v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_add_epi32(bits, bias);
  if constexpr (nans == Nans::of_bf16) return rounded;
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
}

inline void store(float* p, f32v v) { _mm512_storeu_ps(p, v); }
inline void store(double* p, f64v v) { _mm512_storeu_pd(p, v); }
inline void store(float16* p, f32v v) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
inline void store(bfloat16* p, f32v v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_upper<Nans::any>(v), 16)));
}

// As in avx2.hpp.
inline void stream_bits(void* p, __m256i bits) {
  if (reinterpret_cast<std::uintptr_t>(p) % 32 == 0) {
    return _mm256_stream_si256(static_cast<__m256i*>(p), bits);
  }
  _mm_stream_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(bits));
  _mm_stream_si128(static_cast<__m128i*>(p) + 1, _mm256_extracti128_si256(bits, 1));
}
inline void stream_bits(void* p, __m512i bits) {
  if (reinterpret_cast<std::uintptr_t>(p) % 64 == 0) {
    return _mm512_stream_si512(static_cast<__m512i*>(p), bits);
  }
  stream_bits(p, _mm512_castsi512_si256(bits));
  stream_bits(static_cast<char*>(p) + 32, _mm512_extracti64x4_epi64(bits, 1));
}
inline void stream(float* p, f32v v) { stream_bits(p, _mm512_castps_si512(v)); }
inline void stream(double* p, f64v v) { stream_bits(p, _mm512_castpd_si512(v)); }
inline void stream(float16* p, f32v v) {
  stream_bits(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline f32v rounded_to(const float*, f32v v) { return v; }
inline f64v rounded_to(const double*, f64v v) { return v; }
inline f32v rounded_to(const float16*, f32v v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline f32v rounded_to(const bfloat16*, f32v v) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_upper<Nans::of_bf16>(v), upper));
}

inline Pair pair_of(__m512i bits) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, upper))};
}
inline Pair load_pair(const bfloat16* p) { return pair_of(_mm512_loadu_si512(p)); }
inline Pair pair_of(f32v a, f32v b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
}
inline Pair load_pair(const float* p) { return pair_of(load(p), load(p + 16)); }
template <Nans nans>
inline __m512i bf16_bits_by_addition(const Pair& v) {
  const __m512i even = _mm512_srli_epi32(bf16_upper<nans>(v.even), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, bf16_upper<nans>(v.odd));
}

#if defined(RMSNORM_BF16_CONVERSION)

// VCVTNE2PS2BF16 rounds to nearest even and makes NaNs quiet as the addition does, but it takes
// denormals for zeros and writes zeros for them: where there are any, it is not used.
inline bool has_denormals(const Pair& v) {
  constexpr int denormal = 0x20;
  const __mmask16 even = _mm512_fpclass_ps_mask(v.even, denormal);
  const __mmask16 odd = _mm512_fpclass_ps_mask(v.odd, denormal);
  return _kortestz_mask16_u8(even, odd) == 0;
}

template <Nans nans>
inline __m512i bf16_bits(const Pair& v) {
  if (has_denormals(v)) return bf16_bits_by_addition<nans>(v);
  // The odd elements in the upper half, the even ones in the lower.
  const __m512bh converted = _mm512_cvtne2ps_pbh(v.odd, v.even);
  __m512i halves;
  std::memcpy(&halves, &converted, sizeof(halves));
  const __m512i places =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(places, halves);
}

#else

template <Nans nans>
inline __m512i bf16_bits(const Pair& v) {
  return bf16_bits_by_addition<nans>(v);
}

#endif

template <Nans nans>
inline void store_pair(bfloat16* p, Pair v) {
  _mm512_storeu_si512(p, bf16_bits<nans>(v));
}
template <Nans nans>
inline void stream_pair(bfloat16* p, Pair v) {
  stream_bits(p, bf16_bits<nans>(v));
}

constexpr bool has_partial_registers = true;
// The first `count` of the bits of a mask.
inline std::uint32_t first_bits(std::int64_t count, int all) {
  if (count >= all) return all == 32 ? 0xffffffffu : (1u << all) - 1;
  return count <= 0 ? 0u : (1u << count) - 1;
}
inline __mmask8 first_8(std::int64_t count) { return static_cast<__mmask8>(first_bits(count, 8)); }
inline __mmask16 first_16(std::int64_t count) {
  return static_cast<__mmask16>(first_bits(count, 16));
}
inline f32v load_first(const float* p, std::int64_t count) {
  return _mm512_maskz_loadu_ps(first_16(count), p);
}
inline f64v load_first(const double* p, std::int64_t count) {
  return _mm512_maskz_loadu_pd(first_8(count), p);
}
inline f32v load_first(const float16* p, std::int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_16(count), p));
}
inline Pair load_pair_first(const bfloat16* p, std::int64_t count) {
  return pair_of(_mm512_maskz_loadu_epi16(first_bits(count, 32), p));
}
inline Pair load_pair_first(const float* p, std::int64_t count) {
  return pair_of(load_first(p, count), load_first(p + 16, count - 16));
}
inline void store_first(float* p, f32v v, std::int64_t count) {
  _mm512_mask_storeu_ps(p, first_16(count), v);
}
inline void store_first(double* p, f64v v, std::int64_t count) {
  _mm512_mask_storeu_pd(p, first_8(count), v);
}
inline void store_first(float16* p, f32v v, std::int64_t count) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, first_16(count), bits);
}
template <Nans nans>
inline void store_pair_first(bfloat16* p, Pair v, std::int64_t count, NansOf<nans>) {
  _mm512_mask_storeu_epi16(p, first_bits(count, 32), bf16_bits<nans>(v));
}

inline f32v splat(float s) { return _mm512_set1_ps(s); }
inline f64v splat(double s) { return _mm512_set1_pd(s); }
inline f32v add(f32v a, f32v b) { return _mm512_add_ps(a, b); }
inline f64v add(f64v a, f64v b) { return _mm512_add_pd(a, b); }
inline f64v subtract(f64v a, f64v b) { return _mm512_sub_pd(a, b); }
inline f32v multiply(f32v a, f32v b) { return _mm512_mul_ps(a, b); }
inline f64v multiply(f64v a, f64v b) { return _mm512_mul_pd(a, b); }
inline f64v multiply_rounded(f64v a, f64v b) {
  f64v product = multiply(a, b);
  RMSNORM_ROUND_HERE(product);
  return product;
}
inline f32v fma(f32v a, f32v b, f32v c) { return _mm512_fmadd_ps(a, b, c); }
inline f64v fma(f64v a, f64v b, f64v c) { return _mm512_fmadd_pd(a, b, c); }

inline f64v divide(f64v a, f64v b) { return _mm512_div_pd(a, b); }
inline f64v square_root(f64v v) { return _mm512_sqrt_pd(v); }
inline f64v rounded_to_float(f64v v) { return _mm512_cvtps_pd(_mm512_cvtpd_ps(v)); }
inline bool all_within(f64v v, double least, double most) {
  const __mmask8 above = _mm512_cmp_pd_mask(v, splat(least), _CMP_GE_OQ);
  return _mm512_mask_cmp_pd_mask(above, v, splat(most), _CMP_LE_OQ) == 0xff;
}
inline double square_root(double v) {
  const __m128d one = _mm_set_sd(v);
  return _mm_cvtsd_f64(_mm_sqrt_sd(one, one));
}
inline double row_total(const f64v (&row)[1]) {
  const __m256d four =
      _mm256_add_pd(_mm512_castpd512_pd256(row[0]), _mm512_extractf64x4_pd(row[0], 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
// The halves of two rows, of 128 bits each the first and third of both, and so on.
inline f64v halves_added(f64v a, f64v b) {
  return add(_mm512_shuffle_f64x2(a, b, _MM_SHUFFLE(1, 0, 1, 0)),
             _mm512_shuffle_f64x2(a, b, _MM_SHUFFLE(3, 2, 3, 2)));
}
inline f64v quarters_added(f64v a, f64v b) {
  return add(_mm512_shuffle_f64x2(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
             _mm512_shuffle_f64x2(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
}
inline f64v row_totals(const f64v (&rows)[8][1]) {
  // Lanes j and j + 4, then of these sums j and j + 2, then the last two, of which even rows are in
  // one register and odd ones in the other.
  const f64v even =
      quarters_added(halves_added(rows[0][0], rows[2][0]), halves_added(rows[4][0], rows[6][0]));
  const f64v odd =
      quarters_added(halves_added(rows[1][0], rows[3][0]), halves_added(rows[5][0], rows[7][0]));
  return add(_mm512_unpacklo_pd(even, odd), _mm512_unpackhi_pd(even, odd));
}

inline f64v load_double(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }

template <int i>
inline f64v half(f32v v) {
  return _mm512_cvtps_pd(i == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1));
}
