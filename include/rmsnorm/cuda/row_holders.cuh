// Two ways to hold a row between its sums and its results: in registers, or in memory. Which
// vectors a thread takes is the same for both: every threads()th, in ascending order.
#pragma once

#include "device.cuh"
#include "team.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// One of a row's vectors, and its number among those that the thread has in registers.
struct Place {
  std::int64_t vector;
  int slot;
};

// In registers, `vectors` a thread. All loads are issued before the first is waited for.
template <class Elements, int vectors>
class RowInRegisters {
 public:
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  static constexpr bool is_long = false;

  __device__ __forceinline__ RowInRegisters(const Elements& e, const Team& team)
      : e_(e), first_(team.thread()), step_(team.threads()) {}

  __device__ __forceinline__ void load_weights(const Row& row, std::int64_t count) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < static_cast<int>(count)) weights_[k] = e_.load_weights(row, vector(k));
    }
  }
  // Issues the loads; finish() waits for them. In between the row that was finished before is still
  // held.
  __device__ __forceinline__ void load(const Row& row, std::int64_t count) {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < static_cast<int>(count)) loaded_[k] = e_.load(row, vector(k));
    }
  }
  __device__ __forceinline__ void finish(const Row& row, std::int64_t count) {
    count_ = static_cast<int>(count);
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) chunks_[k] = e_.complete(row, vector(k), loaded_[k]);
    }
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) visit(vector(k), chunks_[k].held());
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_weighted(Visit visit) const {
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      if (vector(k) < count_) visit(Place{vector(k), k}, chunks_[k].held(), weights_[k]);
    }
  }

 private:
  // A register row has at most 2^14 vectors.
  __device__ __forceinline__ int vector(int k) const {
    return static_cast<int>(first_ + static_cast<unsigned>(k) * step_);
  }

  const Elements& e_;
  unsigned first_;
  unsigned step_;
  int count_ = 0;
  typename Elements::Loaded loaded_[vectors];
  Chunk chunks_[vectors];
  typename Elements::Weights weights_[vectors];
};

// In shared memory, or read again each time: then the sum with the residual is computed again too,
// so that outputs may lie over inputs.
template <class Elements, int at_once>
class RowReadAgain {
 public:
  using Row = typename Elements::Row;
  using Chunk = typename Elements::Chunk;
  static constexpr bool is_long = true;

  __device__ __forceinline__ RowReadAgain(const Elements& e, const Team& team, bool staged)
      : e_(e), first_(team.thread()), step_(team.threads()) {
    if (staged) {
      staged_ = reinterpret_cast<Chunk*>(
          static_cast<char*>(shared_memory()) +
          reduction_bytes(static_cast<int>(blockDim.x), static_cast<int>(gridDim.y)));
    }
  }

  __device__ __forceinline__ void load_weights(const Row&, std::int64_t) {}
  __device__ __forceinline__ void load(const Row&, std::int64_t) {}
  // Each thread reads back what itself has written to shared memory: no barrier.
  __device__ __forceinline__ void finish(const Row& row, std::int64_t count) {
    row_ = row;
    count_ = count;
    if (staged_ == nullptr) return;
    Chunk* place = staged_ + threadIdx.x;
    for (std::int64_t i = first_; i < count_; i += std::int64_t{at_once} * step_) {
      Chunk chunks[at_once];
      read(i, chunks);
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (vector(i, k) < count_) place[static_cast<unsigned>(k) * blockDim.x] = chunks[k];
      }
      place += at_once * blockDim.x;
    }
  }

  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    unsigned place = threadIdx.x;
    for (std::int64_t i = first_; i < count_; i += std::int64_t{at_once} * step_) {
      Chunk chunks[at_once];
      if (staged_ == nullptr) {
        read(i, chunks);
      } else {
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          if (vector(i, k) < count_) chunks[k] = staged_[place];
          place += blockDim.x;
        }
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        if (vector(i, k) < count_) visit(vector(i, k), chunks[k]);
      }
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_weighted(Visit visit) const {
    for_each([&](std::int64_t vector, const Chunk& chunk) {
      visit(Place{vector, 0}, chunk, e_.load_weights(row_, vector));
    });
  }

 private:
  __device__ __forceinline__ void read(std::int64_t i, Chunk (&chunks)[at_once]) const {
    typename Elements::Loaded loaded[at_once];
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (vector(i, k) < count_) loaded[k] = e_.load(row_, vector(i, k));
    }
#pragma unroll
    for (int k = 0; k < at_once; ++k) {
      if (vector(i, k) < count_) chunks[k] = e_.complete(row_, vector(i, k), loaded[k]);
    }
  }
  __device__ __forceinline__ std::int64_t vector(std::int64_t i, int k) const {
    return i + static_cast<std::int64_t>(static_cast<unsigned>(k) * step_);
  }

  const Elements& e_;
  unsigned first_;
  unsigned step_;
  Chunk* staged_ = nullptr;
  Row row_ = {};
  std::int64_t count_ = 0;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
