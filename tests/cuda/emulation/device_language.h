// What CUDA adds to the language, and the functions by which threads meet.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "execution.hpp"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// The scheduler's: set for each thread before it runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

inline void __syncthreads(cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  cuda_emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  cuda_emulation::warp_operation(cuda_emulation::WarpOperation::sync, mask, 0, 0, site);
}

namespace cuda_emulation {

template <class T>
struct ShuffledWord {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int> ||
                    std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>,
                "a type that the shuffles do not take");
  static constexpr bool wide = sizeof(T) == 8;

  static std::uint64_t pack(T value) {
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
  }
  static T unpack(std::uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

}  // namespace cuda_emulation

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source,
                     cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  using namespace cuda_emulation;
  using Word = ShuffledWord<T>;
  const WarpOperation shuffle = Word::wide ? WarpOperation::shuffle_64 : WarpOperation::shuffle_32;
  return Word::unpack(
      warp_operation(shuffle, mask, Word::pack(value), static_cast<unsigned>(source) % 32, site));
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                         cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  using namespace cuda_emulation;
  using Word = ShuffledWord<T>;
  const WarpOperation shuffle =
      Word::wide ? WarpOperation::shuffle_xor_64 : WarpOperation::shuffle_xor_32;
  return Word::unpack(warp_operation(shuffle, mask, Word::pack(value),
                                     lane() ^ static_cast<unsigned>(lane_mask), site));
}

inline int __any_sync(unsigned mask, int predicate,
                      cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  return cuda_emulation::warp_operation(cuda_emulation::WarpOperation::any, mask, predicate != 0, 0,
                                        site) != 0;
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
  return static_cast<unsigned>(cuda_emulation::warp_operation(cuda_emulation::WarpOperation::ballot,
                                                              mask, predicate != 0, 0, site));
}

// Their PTX does not assemble for older targets.
#if __CUDA_ARCH__ >= 900
inline void cudaGridDependencySynchronize() { cuda_emulation::wait_for_previous_grid(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { cuda_emulation::allow_next_grid(); }
#endif
