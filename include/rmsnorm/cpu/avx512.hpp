// AVX-512 F, BW, DQ, VL: 16 floats or 8 doubles a register.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../convert.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
// gcc's own AVX-512 intrinsics start from a register that they declare undefined, and warn of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {
namespace avx512 {

#include "avx512.inl"

#define RMSNORM_KERNEL RMSNORM_FLATTEN
#define RMSNORM_KERNEL_PART RMSNORM_NOINLINE RMSNORM_FLATTEN
#include "kernels.inl"
#undef RMSNORM_KERNEL_PART
#undef RMSNORM_KERNEL

}  // namespace avx512
}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif
