// The threads that share a row: part of a warp, a block, or a cluster of blocks; and the reduction
// over them.
//
// A block has blockDim.x threads for each of blockDim.y rows. blockDim.x is a power of two up to 32
// or a multiple of 32 with one row a block; the gridDim.y blocks of a cluster share their row.
#pragma once

#include "device.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int max_threads = 512;
constexpr int max_cluster = 8;
constexpr int warp_size = 32;

// Sixteen bytes for each warp of the team, twice.
constexpr std::size_t bytes_per_partial = 16;
RMSNORM_HOST_DEVICE constexpr std::size_t reduction_bytes(int threads_per_row, int cluster) {
  return threads_per_row > warp_size || cluster > 1
             ? 2 * bytes_per_partial * static_cast<std::size_t>(cluster) *
                   static_cast<std::size_t>((threads_per_row + warp_size - 1) / warp_size)
             : 0;
}

class Team {
 public:
  // Remote shared memory may be touched once all blocks of the cluster run: arrive early, wait
  // late.
  __device__ __forceinline__ Team() {
#if __CUDA_ARCH__ >= 900
    if (gridDim.y > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
  }

  __device__ __forceinline__ void wait_until_all_run() const {
#if __CUDA_ARCH__ >= 900
    if (gridDim.y > 1) {
      cooperative_groups::this_cluster().barrier_wait();
    }
#endif
  }

  // Position among the team's threads, and their number.
  __device__ __forceinline__ unsigned thread() const {
    return blockIdx.y * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ unsigned threads() const { return gridDim.y * blockDim.x; }

  // True in all threads that would have to take part in a reduction of this thread's row.
  __device__ __forceinline__ bool any(bool condition) const {
    return blockDim.x < warp_size ? __any_sync(all_lanes, condition) : condition;
  }

  // Merges the partial results of all threads in a fixed order; each thread gets the same bits.
  template <class Partial>
  __device__ __forceinline__ Partial reduce(Partial p) {
    static_assert(sizeof(Partial) <= bytes_per_partial, "a partial result has its place");
    merge_lanes(p, blockDim.x);
    if (blockDim.x <= warp_size && gridDim.y == 1) return p;
    return merge_warps(p);
  }

 private:
  template <class Partial>
  static __device__ __forceinline__ void merge_lanes(Partial& p, unsigned lanes) {
#pragma unroll
    for (unsigned distance = warp_size / 2; distance > 0; distance /= 2) {
      if (distance < lanes) p.merge(p.exchanged(distance));
    }
  }

  // One barrier: the partials alternate between two places, so that a warp that is still reading
  // the previous ones is not overtaken by more than the barrier of this reduction.
  template <class Partial>
  __device__ __forceinline__ Partial merge_warps(Partial p) {
    const unsigned lane = threadIdx.x % warp_size;
    const unsigned warps = blockDim.x / warp_size;
    const unsigned count = warps * gridDim.y;
    Partial* partials =
        reinterpret_cast<Partial*>(static_cast<char*>(shared_memory()) +
                                   (parity_ ? bytes_per_partial * count : std::size_t{0}));
    parity_ = !parity_;
    const unsigned own = blockIdx.y * warps + threadIdx.x / warp_size;
    if (gridDim.y == 1) {
      if (lane == 0) partials[own] = p;
      __syncthreads();
    } else {
#if __CUDA_ARCH__ >= 900
      cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
      if (lane < gridDim.y) *cluster.map_shared_rank(partials + own, lane) = p;
      cluster.sync();
#elif !defined(RMSNORM_CUDA_EMULATED)
      __trap();  // a cluster was launched from code for devices that have none
#endif
    }
    p = Partial();
#pragma unroll 1
    for (unsigned i = lane; i < count; i += warp_size) p.merge(partials[i]);
    merge_lanes(p, warp_size);
    return p;
  }

  bool parity_ = false;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
