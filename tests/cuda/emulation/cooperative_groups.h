// Clusters of blocks, as cooperative groups present them.
#pragma once

#include "execution.hpp"

// As in the toolkit, older targets have no clusters.
#if __CUDA_ARCH__ >= 900

namespace cooperative_groups {

class cluster_group {
 public:
  struct arrival_token {};

  static void sync(cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
    cuda_emulation::cluster_arrive(site);
    cuda_emulation::cluster_wait(site);
  }

  static arrival_token barrier_arrive(
      cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
    cuda_emulation::cluster_arrive(site);
    return arrival_token{};
  }

  static void barrier_wait(cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
    cuda_emulation::cluster_wait(site);
  }
  static void barrier_wait(const arrival_token&,
                           cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
    cuda_emulation::cluster_wait(site);
  }

  static unsigned block_rank() { return cuda_emulation::cluster_rank(); }
  static unsigned num_blocks() { return cuda_emulation::cluster_size(); }

  template <class T>
  static T* map_shared_rank(T* p, unsigned rank,
                            cuda_emulation::CallSite site = cuda_emulation::CallSite::here()) {
    return static_cast<T*>(cuda_emulation::map_shared(p, rank, site));
  }
};

inline cluster_group this_cluster() { return cluster_group{}; }

}  // namespace cooperative_groups

#endif
