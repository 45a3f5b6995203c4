// How the backward kernel reaches the elements of a row: the two ways of elements.cuh, for its
// tensors.
//
//   PackedGradients  dy, x, d_residual and dx of one dtype (weights optionally f32 beside 16-bit
//                    rows), side by side and on 16-byte boundaries
//   AnyGradients     everything else, an unrounded residual, given and partial statistics and a
//                    bias among it
#pragma once

#include <type_traits>

#include "../gradient_blocks.hpp"
#include "access.cuh"
#include "sums.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// The sums of dy * xhat and of dy over each block of rows, in the workspace.
struct BlockSums {
  char* dweight;  // those of block 0; null: absent
  char* dbias;
  std::int64_t block_stride;  // bytes
};

// What both have.
template <class C>
struct GradientParams {
  StatisticOptions<C> statistics;
  C weight_offset;
  bool weight_is_constant;
  bool staged;
  GradientBlocks blocks;
  BlockSums sums;
};

// ---- packed ----

template <class C>
struct PackedGradientParams : PackedRows, GradientParams<C> {
  PackedOperand dy, x, weight, rstd, d_residual, dx;
};

template <class T, class W, bool has_d_residual>
class PackedGradients {
 public:
  using Compute = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Params = PackedGradientParams<Compute>;
  static constexpr int width = static_cast<int>(16 / sizeof(T));
  static constexpr bool is_packed = true;

  struct Row {
    const char* dy;
    const char* x;
    const char* weight;
    const char* rstd;
    const char* d_residual;
    char* dx;
  };
  struct Loaded {
    Packed<T, width> dy;
    Packed<T, width> x;
  };
  struct Nothing {};
  struct Addend {
    Packed<T, width> d_residual;
  };
  struct Chunk : std::conditional<has_d_residual, Addend, Nothing>::type {
    Packed<T, width> dy;
    Packed<T, width> x;

    // d_residual stays on its way.
    __device__ __forceinline__ Chunk held() const {
      Chunk chunk = *this;
      chunk.dy = dy.held();
      chunk.x = x.held();
      return chunk;
    }
  };
  using Weights = Packed<W, width>;

  explicit __device__ __forceinline__ PackedGradients(const Params& p) : p_(p) {}

  __device__ __forceinline__ Row row_at(std::int64_t row) const {
    Row r = {p_.dy.data, p_.x.data, p_.weight.data, p_.rstd.data, p_.d_residual.data, p_.dx.data};
    p_.locate(row, [&](int d, std::int64_t steps) {
      r.dy += steps * p_.dy.row_strides[d];
      r.x += steps * p_.x.row_strides[d];
      r.weight += steps * p_.weight.row_strides[d];
      r.rstd += steps * p_.rstd.row_strides[d];
      if (has_d_residual) r.d_residual += steps * p_.d_residual.row_strides[d];
      r.dx += steps * p_.dx.row_strides[d];
    });
    return r;
  }

  __device__ __forceinline__ bool has_rstd() const { return p_.rstd.data != nullptr; }
  __device__ __forceinline__ Compute rstd(const Row& row) const {
    return *reinterpret_cast<const Compute*>(row.rstd);
  }

  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    return {Packed<T, width>::load(row.dy + vector * 16),
            Packed<T, width>::load(row.x + vector * 16)};
  }
  // Issues the load of d_residual, which is needed last.
  __device__ __forceinline__ Chunk complete(const Row& row, std::int64_t vector,
                                            const Loaded& loaded) const {
    Chunk chunk;
    chunk.dy = loaded.dy;
    chunk.x = loaded.x;
    if constexpr (has_d_residual) {
      chunk.d_residual = Packed<T, width>::load(row.d_residual + vector * 16);
    }
    return chunk;
  }
  __device__ __forceinline__ Weights load_weights(const Row& row, std::int64_t vector) const {
    if (p_.weight.data == nullptr) return Weights::filled(ones<W>());
    return Weights::load(row.weight + vector * static_cast<std::int64_t>(sizeof(Weights)));
  }

  template <bool row_is_long>
  __device__ __forceinline__ PackedSum<T, row_is_long> zero_sum() const {
    return {};
  }

  __device__ __forceinline__ void counted_values(const Chunk& chunk, std::int64_t,
                                                 Compute (&v)[width]) const {
    unpack(chunk.x, v);
  }
  __device__ __forceinline__ void values(const Chunk& chunk, Compute (&v)[width]) const {
    unpack(chunk.x, v);
  }
  __device__ __forceinline__ void gradients(const Chunk& chunk, Compute (&v)[width]) const {
    unpack(chunk.dy, v);
  }
  __device__ __forceinline__ void weight_values(const Row&, std::int64_t, const Weights& weights,
                                                Compute (&w)[width]) const {
    unpack(weights, w);
#pragma unroll
    for (int j = 0; j < width; ++j) w[j] = add(w[j], p_.weight_offset);
  }
  __device__ __forceinline__ bool is_in_row(std::int64_t, int) const { return true; }
  // Whether rstd depends on the element.
  __device__ __forceinline__ bool is_counted(std::int64_t, int) const { return true; }

  // Stores v * rstd + d_residual.
  __device__ __forceinline__ void store_gradient(const Row& row, std::int64_t vector,
                                                 const Chunk& chunk, Compute (&v)[width],
                                                 Compute rstd) const {
    if constexpr (has_d_residual) {
      Compute more[width];
      unpack(chunk.d_residual, more);
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] = multiply_add(v[j], rstd, more[j]);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] = multiply(v[j], rstd);
    }
    pack<T>(v).store(row.dx + vector * 16);
  }

 private:
  const Params& p_;
};

// ---- any ----

template <class C>
struct AnyGradientParams : AnyRows, GradientParams<C> {
  std::int64_t counted;          // elements that the statistics are taken from
  std::int64_t rstd_depends_on;  // elements that rstd depends on: those, or none
  bool sums_plainly;
  AnyOperand dy, x, residual, weight, d_residual, dx;
  RowOperand rstd, mean_square, d_mean_square;
};

template <class C, int elements>
class AnyGradients {
 public:
  using Compute = C;
  using Params = AnyGradientParams<C>;
  static constexpr int width = elements;
  static constexpr bool is_packed = false;

  struct Row {
    const char* dy;
    const char* x;
    const char* residual;
    const char* weight;
    const char* rstd;
    const char* mean_square;
    const char* d_residual;
    char* dx;
    char* d_mean_square;
  };
  struct Loaded {
    C dy[width];
    C x[width];
  };
  using Chunk = Loaded;
  struct Weights {};

  explicit __device__ __forceinline__ AnyGradients(const Params& p) : p_(p) {}

  __device__ __forceinline__ Row row_at(std::int64_t row) const {
    Row r = {p_.dy.data,         p_.x.data,    p_.residual.data,
             p_.weight.data,     p_.rstd.data, p_.mean_square.data,
             p_.d_residual.data, p_.dx.data,   p_.d_mean_square.data};
    p_.locate(row, [&](int d, std::int64_t steps) {
      r.dy += steps * p_.dy.row_strides[d];
      r.x += steps * p_.x.row_strides[d];
      r.residual += steps * p_.residual.row_strides[d];
      r.weight += steps * p_.weight.row_strides[d];
      r.rstd += steps * p_.rstd.row_strides[d];
      r.mean_square += steps * p_.mean_square.row_strides[d];
      r.d_residual += steps * p_.d_residual.row_strides[d];
      r.dx += steps * p_.dx.row_strides[d];
      r.d_mean_square += steps * p_.d_mean_square.row_strides[d];
    });
    return r;
  }

  __device__ __forceinline__ bool has_rstd() const { return p_.rstd.present; }
  __device__ __forceinline__ C rstd(const Row& row) const {
    return static_cast<C>(load_statistic(p_.rstd, row.rstd));
  }
  __device__ __forceinline__ double mean_square(const Row& row) const {
    return load_statistic(p_.mean_square, row.mean_square);
  }
  __device__ __forceinline__ void store_d_mean_square(const Row& row, double v) const {
    store_statistic(p_.d_mean_square, row.d_mean_square, v);
  }

  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    Loaded loaded;
    read(p_.dy, row.dy, vector, loaded.dy);
    read(p_.x, row.x, vector, loaded.x);
    return loaded;
  }
  __device__ __forceinline__ Chunk complete(const Row& row, std::int64_t vector,
                                            Loaded loaded) const {
    if (!p_.residual.present) return loaded;
    C addend[width];
    read(p_.residual, row.residual, vector, addend);
#pragma unroll
    for (int j = 0; j < width; ++j) loaded.x[j] = add(loaded.x[j], addend[j]);
    return loaded;
  }
  __device__ __forceinline__ Weights load_weights(const Row&, std::int64_t) const { return {}; }

  template <bool row_is_long>
  __device__ __forceinline__ AnySum<C> zero_sum() const {
    return make_any_sum<C>(p_.sums_plainly);
  }

  __device__ __forceinline__ void counted_values(const Chunk& chunk, std::int64_t vector,
                                                 C (&v)[width]) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = vector * width + j < p_.counted ? chunk.x[j] : C(0);
  }
  __device__ __forceinline__ void values(const Chunk& chunk, C (&v)[width]) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = chunk.x[j];
  }
  __device__ __forceinline__ void gradients(const Chunk& chunk, C (&v)[width]) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = chunk.dy[j];
  }
  __device__ __forceinline__ void weight_values(const Row& row, std::int64_t vector, const Weights&,
                                                C (&w)[width]) const {
    if (p_.weight.present) {
      read(p_.weight, row.weight, vector, w);
    }
#pragma unroll
    for (int j = 0; j < width; ++j) w[j] = p_.weight.present ? add(w[j], p_.weight_offset) : C(1);
  }
  __device__ __forceinline__ bool is_in_row(std::int64_t vector, int j) const {
    return vector * width + j < p_.n;
  }
  __device__ __forceinline__ bool is_counted(std::int64_t vector, int j) const {
    return vector * width + j < p_.rstd_depends_on;
  }

  __device__ __forceinline__ void store_gradient(const Row& row, std::int64_t vector, const Chunk&,
                                                 C (&v)[width], C rstd) const {
    C more[width];
    const bool adds = p_.d_residual.present;
    if (adds) read(p_.d_residual, row.d_residual, vector, more);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      v[j] = adds ? multiply_add(v[j], rstd, more[j]) : multiply(v[j], rstd);
    }
    write(p_.dx, row.dx, vector, v);
  }

 private:
  __device__ __forceinline__ void read(const AnyOperand& o, const char* row, std::int64_t vector,
                                       C (&v)[width]) const {
    const AnyVector<C, width> a = read_vector<C, width>(p_, o, row, vector);
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = a.v[j];
  }
  __device__ __forceinline__ void write(const AnyOperand& o, char* row, std::int64_t vector,
                                        const C (&v)[width]) const {
    AnyVector<C, width> a;
#pragma unroll
    for (int j = 0; j < width; ++j) a.v[j] = v[j];
    write_vector<C, width>(p_, o, row, vector, a);
  }

  const Params& p_;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
