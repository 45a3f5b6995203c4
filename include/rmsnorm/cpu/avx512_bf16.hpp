// What avx512.hpp has, with AVX512_BF16: the kernels of bf16 alone, since others do not round to
// it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../convert.hpp"
#include "kernel_table.hpp"
#include "memory.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
// gcc's own AVX-512 intrinsics start from a register that they declare undefined, and warn of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace rmsnorm {
namespace cpu {
namespace detail {
namespace avx512_bf16 {

#define RMSNORM_BF16_CONVERSION
#include "avx512.inl"
#undef RMSNORM_BF16_CONVERSION

#define RMSNORM_BF16_ALONE
#define RMSNORM_KERNEL RMSNORM_FLATTEN
#define RMSNORM_KERNEL_PART RMSNORM_NOINLINE RMSNORM_FLATTEN
#include "kernels.inl"
#undef RMSNORM_BF16_ALONE
#undef RMSNORM_KERNEL_PART
#undef RMSNORM_KERNEL

}  // namespace avx512_bf16
}  // namespace detail
}  // namespace cpu
}  // namespace rmsnorm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif
