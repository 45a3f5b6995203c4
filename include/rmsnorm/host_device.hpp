// Marks functions that device code calls too; nothing where no CUDA compiler is at work.
#pragma once

#if defined(__CUDACC__)
#define RMSNORM_HOST_DEVICE __host__ __device__
#else
#define RMSNORM_HOST_DEVICE
#endif

// For what each shared library is to have of its own, as kernels and what is known of them. In this
// form clang takes it before the name of a namespace, too.
#if defined(__GNUC__)
#define RMSNORM_HIDDEN [[gnu::visibility("hidden")]]
#else
#define RMSNORM_HIDDEN
#endif
