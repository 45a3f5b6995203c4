// How kernels reach the elements of a row, 16 bytes of x at a time. Two ways that hold the same
// element at the same place, so that a row's bits do not depend on the way that was taken:
//
//   PackedElements   all tensors of one dtype (weights optionally f32 beside 16-bit rows), side by
//                    side and on 16-byte boundaries: what models use, with nothing to decide
//   AnyElements      everything else: any mix of dtypes, strides and alignments, a bias, given or
//                    partial statistics, statistics alone
#pragma once

#include <type_traits>

#include "access.cuh"
#include "sums.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// ---- packed ----

template <class C>
struct PackedParams : PackedRows {
  StatisticOptions<C> statistics;
  C weight_offset;
  bool round_before_weight;
  bool round_rstd;
  bool weight_is_constant;
  bool staged;
  PackedOperand x, residual, weight, y, residual_out, rstd;
};

template <class T, class W, bool has_residual>
class PackedElements {
 public:
  using Compute = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Params = PackedParams<Compute>;
  static constexpr int width = static_cast<int>(16 / sizeof(T));
  static constexpr bool is_packed = true;

  struct Row {
    const char* x;
    const char* residual;
    const char* weight;
    char* y;
    char* residual_out;
    char* rstd;
  };
  struct Loaded {
    Packed<T, width> x;
    Packed<T, width> residual;
  };
  using Chunk = Packed<T, width>;
  using Weights = Packed<W, width>;

  explicit __device__ __forceinline__ PackedElements(const Params& p) : p_(p) {}

  __device__ __forceinline__ Row row_at(std::int64_t row) const {
    Row r = {p_.x.data, p_.residual.data,     p_.weight.data,
             p_.y.data, p_.residual_out.data, p_.rstd.data};
    p_.locate(row, [&](int d, std::int64_t steps) {
      r.x += steps * p_.x.row_strides[d];
      if (has_residual) r.residual += steps * p_.residual.row_strides[d];
      r.weight += steps * p_.weight.row_strides[d];
      r.y += steps * p_.y.row_strides[d];
      if (has_residual) r.residual_out += steps * p_.residual_out.row_strides[d];
      r.rstd += steps * p_.rstd.row_strides[d];
    });
    return r;
  }

  // Issues the loads; complete() waits for them.
  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    Loaded loaded;
    loaded.x = Packed<T, width>::load(row.x + vector * 16);
    if (has_residual) loaded.residual = Packed<T, width>::load(row.residual + vector * 16);
    return loaded;
  }
  __device__ __forceinline__ Chunk complete(const Row&, std::int64_t, const Loaded& loaded) const {
    if (!has_residual) return loaded.x;
    Compute x[width], residual[width];
    unpack(loaded.x, x);
    unpack(loaded.residual, residual);
#pragma unroll
    for (int j = 0; j < width; ++j) x[j] = add(x[j], residual[j]);
    return pack<T>(x);
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
    unpack(chunk, v);
  }
  __device__ __forceinline__ void values(const Chunk& chunk, Compute (&v)[width]) const {
    unpack(chunk, v);
  }

  __device__ __forceinline__ void store_sum(const Row& row, std::int64_t vector,
                                            const Chunk& chunk) const {
    if (has_residual && p_.residual_out.data != nullptr) {
      chunk.store(row.residual_out + vector * 16);
    }
  }

  // v holds the values to be normalised, scaled.
  __device__ __forceinline__ void store_normalised(const Row& row, std::int64_t vector,
                                                   Compute (&v)[width], Compute rstd,
                                                   const Weights& weights) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = multiply(v[j], rstd);
    if (p_.round_before_weight) unpack(pack<T>(v), v);
    Compute w[width];
    unpack(weights, w);
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = multiply(v[j], add(w[j], p_.weight_offset));
    pack<T>(v).store(row.y + vector * 16);
  }

  __device__ __forceinline__ Compute rounded_rstd(Compute rstd) const {
    if (!p_.round_rstd) return rstd;
    Compute v[width] = {rstd};
    unpack(pack<T>(v), v);
    return v[0];
  }
  __device__ __forceinline__ void store_rstd(const Row& row, Compute rstd) const {
    if (p_.rstd.data != nullptr) *reinterpret_cast<Compute*>(row.rstd) = rstd;
  }

 private:
  const Params& p_;
};

// ---- any ----

template <class C>
struct AnyParams : AnyRows {
  std::int64_t counted;  // elements that the statistics are taken from
  StatisticOptions<C> statistics;
  C weight_offset;
  bool sums_plainly;
  bool rounds_sum;           // x + residual, to normalised_dtype
  bool round_before_weight;  // to normalised_dtype, and after each operation
  bool round_rstd;
  bool mean_square_is_output;
  bool weight_is_constant;
  bool staged;
  DType normalised_dtype;
  DType product_dtype;  // of x * rstd and the weight
  DType biased_dtype;   // of that and the bias
  AnyOperand x, residual, weight, bias, y, residual_out;
  RowOperand mean_square, rstd;
};

template <class C, int elements>
class AnyElements {
 public:
  using Compute = C;
  using Params = AnyParams<C>;
  static constexpr int width = elements;
  static constexpr bool is_packed = false;

  struct Row {
    const char* x;
    const char* residual;
    const char* weight;
    const char* bias;
    char* y;
    char* residual_out;
    char* mean_square;
    char* rstd;
  };
  struct Chunk {
    C v[width];
  };
  using Loaded = Chunk;
  struct Weights {};

  explicit __device__ __forceinline__ AnyElements(const Params& p) : p_(p), access_(p) {}

  __device__ __forceinline__ Row row_at(std::int64_t row) const {
    Row r = {p_.x.data, p_.residual.data,     p_.weight.data,      p_.bias.data,
             p_.y.data, p_.residual_out.data, p_.mean_square.data, p_.rstd.data};
    p_.locate(row, [&](int d, std::int64_t steps) {
      r.x += steps * p_.x.row_strides[d];
      r.residual += steps * p_.residual.row_strides[d];
      r.weight += steps * p_.weight.row_strides[d];
      r.bias += steps * p_.bias.row_strides[d];
      r.y += steps * p_.y.row_strides[d];
      r.residual_out += steps * p_.residual_out.row_strides[d];
      r.mean_square += steps * p_.mean_square.row_strides[d];
      r.rstd += steps * p_.rstd.row_strides[d];
    });
    return r;
  }

  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    Loaded loaded;
    access_.read(p_.x, row.x, vector, loaded.v);
    return loaded;
  }
  __device__ __forceinline__ Chunk complete(const Row& row, std::int64_t vector,
                                            Loaded loaded) const {
    if (!p_.residual.present) return loaded;
    C addend[width];
    access_.read(p_.residual, row.residual, vector, addend);
#pragma unroll
    for (int j = 0; j < width; ++j) loaded.v[j] = add(loaded.v[j], addend[j]);
    if (p_.rounds_sum) round_all(loaded.v, p_.normalised_dtype);
    return loaded;
  }

  __device__ __forceinline__ Weights load_weights(const Row&, std::int64_t) const { return {}; }

  template <bool row_is_long>
  __device__ __forceinline__ AnySum<C> zero_sum() const {
    return make_any_sum<C>(p_.sums_plainly);
  }

  // For the statistics: elements beyond the counted ones are zero.
  __device__ __forceinline__ void counted_values(const Chunk& chunk, std::int64_t vector,
                                                 C (&v)[width]) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = vector * width + j < p_.counted ? chunk.v[j] : C(0);
  }
  __device__ __forceinline__ void values(const Chunk& chunk, C (&v)[width]) const {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = chunk.v[j];
  }

  __device__ __forceinline__ void store_sum(const Row& row, std::int64_t vector,
                                            const Chunk& chunk) const {
    if (p_.residual_out.present) access_.write(p_.residual_out, row.residual_out, vector, chunk.v);
  }

  __device__ __forceinline__ void store_normalised(const Row& row, std::int64_t vector,
                                                   C (&v)[width], C rstd, const Weights&) const {
    const bool has_weight = p_.weight.present;
    const bool has_bias = p_.bias.present;
    const bool rounds = p_.round_before_weight;
    const bool fused = has_weight && has_bias && !rounds;
    C w[width], b[width];
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = multiply(v[j], rstd);
    if (rounds) round_all(v, p_.normalised_dtype);
    if (has_weight) access_.read(p_.weight, row.weight, vector, w);
    if (has_bias) access_.read(p_.bias, row.bias, vector, b);
    if (has_weight) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        w[j] = add(w[j], p_.weight_offset);
        v[j] = fused ? multiply_add(v[j], w[j], b[j]) : multiply(v[j], w[j]);
      }
      if (rounds) round_all(v, p_.product_dtype);
    }
    if (has_bias && !fused) {
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] = add(v[j], b[j]);
      if (rounds) round_all(v, p_.biased_dtype);
    }
    access_.write(p_.y, row.y, vector, v);
  }

  __device__ __forceinline__ C rounded_rstd(C rstd) const {
    return p_.round_rstd ? rounded(rstd, p_.normalised_dtype) : rstd;
  }
  __device__ __forceinline__ void store_rstd(const Row& row, C rstd) const {
    if (p_.rstd.present) store_bytes(row.rstd, rstd, p_.rstd.aligned);
  }

  __device__ __forceinline__ double given_mean_square(const Row& row) const {
    return load_statistic(p_.mean_square, row.mean_square);
  }
  __device__ __forceinline__ void store_mean_square(const Row& row, double mean) const {
    store_statistic(p_.mean_square, row.mean_square, mean);
  }

 private:
  static __device__ __forceinline__ C rounded(C v, DType t) {
    if (t == DType::f16) return widen_to<C>(narrow_to<float16>(v));
    if (t == DType::bf16) return widen_to<C>(narrow_to<bfloat16>(v));
    if (t == DType::f32) return static_cast<C>(static_cast<float>(v));
    return v;
  }
  static __device__ __forceinline__ void round_all(C (&v)[width], DType t) {
#pragma unroll
    for (int j = 0; j < width; ++j) v[j] = rounded(v[j], t);
  }

  const Params& p_;
  const AnyAccess<C, width> access_;
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
