// Device functions that compute or move one value. The _rn ones round once and are never fused
// with their neighbours, under every -ffp-contract.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "execution.hpp"
#include "vector_types.h"

static_assert(FLT_EVAL_METHOD == 0, "device arithmetic rounds every operation to its type");

namespace cuda_emulation {

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The value as it is, of an origin that the compiler cannot see: it has no product to fuse.
template <class T>
inline T opaque(T value) {
#if defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#else
  volatile T copy = value;
  value = copy;
#endif
  return value;
}

// 1/sqrt(x) rounded once. The root taken in double is within one float of it, and it is never
// halfway between two: a midpoint has 25 bits and its square times x, of 24 bits, cannot be 1
// unless it is a power of two. On which side of a midpoint m it lies is the sign of x m^2 - 1,
// whose factors are exact in double.
inline float reciprocal_root(float x) {
  const float y = static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
  if (!(x > 0) || std::isinf(x)) return y;
  const float below = std::nextafter(y, 0.0f);
  const float above = std::nextafter(y, HUGE_VALF);
  const double low = (static_cast<double>(below) + y) / 2;
  const double high = (static_cast<double>(above) + y) / 2;
  if (std::fma(static_cast<double>(x), low * low, -1.0) > 0) return below;
  if (std::fma(static_cast<double>(x), high * high, -1.0) < 0) return above;
  return y;
}

// What one load or store instruction moves. The hardware faults on an address that is not aligned.
template <class T>
inline void check_access(const T* p, CallSite site) {
  static_assert(std::is_integral_v<T> || std::is_same_v<T, float> || std::is_same_v<T, double> ||
                    std::is_same_v<T, uint2> || std::is_same_v<T, uint4> ||
                    std::is_same_v<T, float2>,
                "a type that the cached loads and stores do not take");
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(T) != 0) fail("misaligned access", site);
}

}  // namespace cuda_emulation

inline unsigned __float_as_uint(float v) { return cuda_emulation::same_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return cuda_emulation::same_bits<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_emulation::same_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_emulation::same_bits<double>(v); }

inline float __fmul_rn(float a, float b) { return cuda_emulation::opaque(a * b); }
inline float __fadd_rn(float a, float b) {
  return cuda_emulation::opaque(a) + cuda_emulation::opaque(b);
}
inline float __fsub_rn(float a, float b) {
  return cuda_emulation::opaque(a) - cuda_emulation::opaque(b);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return cuda_emulation::reciprocal_root(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }

inline double __dmul_rn(double a, double b) { return cuda_emulation::opaque(a * b); }
inline double __dadd_rn(double a, double b) {
  return cuda_emulation::opaque(a) + cuda_emulation::opaque(b);
}
inline double __dsub_rn(double a, double b) {
  return cuda_emulation::opaque(a) - cuda_emulation::opaque(b);
}
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __ddiv_rn(double a, double b) { return a / b; }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((std::uint64_t{a} * b) >> 32);
}

template <class T>
inline T __ldg(const T* p, cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  cuda_emulation::check_access(p, site);
  return *p;
}

template <class T>
inline T __ldcs(const T* p, cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  cuda_emulation::check_access(p, site);
  return *p;
}

template <class T>
inline void __stcs(T* p, T value,
                   cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  cuda_emulation::check_access(p, site);
  *p = value;
}
