// What the kernels need of the device beyond plain C++: roundings that no compiler flag changes,
// packed conversions, shared memory, and the waits of programmatic launches.
//
// nvcc gives -ftz=true, -use_fast_math and -fmad to intrinsics as well and has no macro that tells;
// the instructions below are what is written. Double arithmetic is the same under all flags. What
// -ftz=true still reaches are conversions between float and double: denormals of f32 tensors beside
// f64 ones, and rows of nothing but denormals.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../convert.hpp"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

using namespace rmsnorm::detail;

// RMSNORM_CUDA_EMULATED: these headers are compiled for the host against an emulation of the
// execution model, which knows intrinsics but no instructions.
#if defined(RMSNORM_CUDA_EMULATED)
inline float multiply(float a, float b) { return __fmul_rn(a, b); }
inline float add(float a, float b) { return __fadd_rn(a, b); }
inline float subtract(float a, float b) { return __fsub_rn(a, b); }
inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
inline float multiply_subtract(float a, float b, float c) { return __fmaf_rn(a, b, -c); }
inline void* shared_memory() { return cuda_emulation::shared_memory(); }
#else
__device__ __forceinline__ float multiply(float a, float b) {
  float r;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float add(float a, float b) {
  float r;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float subtract(float a, float b) {
  float r;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
// a * b - c
__device__ __forceinline__ float multiply_subtract(float a, float b, float c) {
  float r;
  asm("{ .reg .f32 t; neg.f32 t, %3; fma.rn.f32 %0, %1, %2, t; }"
      : "=f"(r)
      : "f"(a), "f"(b), "f"(c));
  return r;
}

// All shared memory of a block is dynamic.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 rmsnorm_shared_memory[];
  return rmsnorm_shared_memory;
}
#endif

__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double subtract(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
__device__ __forceinline__ double multiply_subtract(double a, double b, double c) {
  return __fma_rn(a, b, -c);
}

// Bits without the sign, which order magnitudes: beyond those of the infinity lie NaNs.
__device__ __forceinline__ unsigned long long magnitude_bits(float v) {
  return __float_as_uint(v) & 0x7fffffffu;
}
__device__ __forceinline__ unsigned long long magnitude_bits(double v) {
  return static_cast<unsigned long long>(__double_as_longlong(v)) & 0x7fffffffffffffffull;
}
template <class C>
__device__ __forceinline__ unsigned long long infinity_bits() {
  return sizeof(C) == sizeof(float) ? 0x7f800000ull : 0x7ff0000000000000ull;
}
template <class C>
__device__ __forceinline__ double magnitude_of_bits(unsigned long long bits) {
  return sizeof(C) == sizeof(float)
             ? static_cast<double>(__uint_as_float(static_cast<unsigned>(bits)))
             : __longlong_as_double(static_cast<long long>(bits));
}

template <class C>
__device__ __forceinline__ C magnitude_of_infinity() {
  if constexpr (sizeof(C) == sizeof(float)) {
    return __uint_as_float(0x7f800000u);
  } else {
    return __longlong_as_double(0x7ff0000000000000ll);
  }
}

// 2^exponent of a normal number.
template <class C>
__device__ __forceinline__ C power_of_two(int exponent) {
  if constexpr (sizeof(C) == sizeof(float)) {
    return __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
  } else {
    return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
  }
}

// ---- one element ----

template <class C>
__device__ __forceinline__ C widen_to(float16 v) {
  return static_cast<C>(__half2float(__ushort_as_half(v.bits)));
}
template <class C>
__device__ __forceinline__ C widen_to(bfloat16 v) {
  return static_cast<C>(__uint_as_float(static_cast<unsigned>(v.bits) << 16));
}
template <class C>
__device__ __forceinline__ C widen_to(float v) {
  return static_cast<C>(v);
}
template <class C>
__device__ __forceinline__ C widen_to(double v) {
  return static_cast<C>(v);
}

template <class T>
__device__ __forceinline__ T narrow_to(float v);
template <>
__device__ __forceinline__ float16 narrow_to<float16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
template <>
__device__ __forceinline__ bfloat16 narrow_to<bfloat16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ __forceinline__ float narrow_to<float>(float v) {
  return v;
}
template <class T>
__device__ __forceinline__ T narrow_to(double v) {
  return narrow<T>::from(v);
}

// ---- 32 bits of packed elements ----

// Whatever is done to one element of a pair is done to the other: conversions take both at once.
template <class T>
struct Pair;
template <>
struct Pair<bfloat16> {
  static __device__ __forceinline__ void unpack(unsigned bits, float* v) {
    v[0] = __uint_as_float(bits << 16);
    v[1] = __uint_as_float(bits & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(const float* v) {
    return bit_cast<unsigned>(__floats2bfloat162_rn(v[0], v[1]));
  }
};
template <>
struct Pair<float16> {
  static __device__ __forceinline__ void unpack(unsigned bits, float* v) {
    const float2 both = __half22float2(bit_cast<__half2>(bits));
    v[0] = both.x;
    v[1] = both.y;
  }
  static __device__ __forceinline__ unsigned pack(const float* v) {
    return bit_cast<unsigned>(__floats2half2_rn(v[0], v[1]));
  }
};

// ---- programmatic launches ----

// Returns once the kernels before this one have finished and their writes are visible; at once in a
// kernel that was launched the ordinary way.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel may start; it sees this one's writes only after its own wait.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
