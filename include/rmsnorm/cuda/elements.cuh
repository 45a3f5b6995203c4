// How kernels reach the elements of a row, 16 bytes of x at a time. Two ways that hold the same
// element at the same place, so that a row's bits do not depend on the way that was taken:
//
//   PackedElements   all tensors of one dtype (weights optionally f32 beside 16-bit rows), side by
//                    side and on 16-byte boundaries: what models use, with nothing to decide
//   AnyElements      everything else: any mix of dtypes, strides and alignments, a bias, given or
//                    partial statistics, statistics alone
#pragma once

#include <type_traits>

#include "../row_layout.hpp"
#include "sums.cuh"

namespace rmsnorm {
namespace cuda {
namespace RMSNORM_HIDDEN detail {

// Elements of x that a thread takes at once: 16 bytes, or two where x is narrower than the double
// that is computed in.
constexpr int elements_at_once(DType x, DType compute) {
  return compute == DType::f64 ? 2 : static_cast<int>(16 / size_in_bytes(x));
}

// ---- rows ----

constexpr int max_row_rank = max_rank - 1;

// Division of row indices below 2^31 by a size: floor(i / size) = (i * multiplier / 2^32 + i) >>
// shift (Granlund & Montgomery, "Division by invariant integers using multiplication", 1994).
struct RowDimension {
  unsigned size;
  unsigned multiplier;
  int shift;
};

inline RowDimension make_row_dimension(std::int64_t size) {
  int shift = 0;
  while ((std::int64_t{1} << shift) < size) ++shift;
  const std::uint64_t excess = static_cast<std::uint64_t>((std::int64_t{1} << shift) - size);
  const std::uint64_t multiplier = (excess << 32) / static_cast<std::uint64_t>(size) + 1;
  return {static_cast<unsigned>(size), static_cast<unsigned>(multiplier), shift};
}

// ---- packed ----

template <class T, int count>
struct alignas(16) Packed {
  static_assert(count * sizeof(T) % 16 == 0, "whole 16-byte pieces");
  static constexpr int pieces = static_cast<int>(count * sizeof(T) / 16);
  uint4 words[pieces];

  static __device__ __forceinline__ Packed load(const char* p) {
    Packed v;
#pragma unroll
    for (int i = 0; i < pieces; ++i) v.words[i] = reinterpret_cast<const uint4*>(p)[i];
    return v;
  }
  static __device__ __forceinline__ Packed filled(const uint4& piece) {
    Packed v;
#pragma unroll
    for (int i = 0; i < pieces; ++i) v.words[i] = piece;
    return v;
  }
  // The same, which the compiler cannot see to be: it would keep the unpacked values, twice the
  // registers, from one use to the next.
  __device__ __forceinline__ Packed held() const {
    Packed v = *this;
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      asm volatile("" : "+r"(v.words[i].x), "+r"(v.words[i].y));
      asm volatile("" : "+r"(v.words[i].z), "+r"(v.words[i].w));
    }
    return v;
  }
  __device__ __forceinline__ void store(char* p) const {
#pragma unroll
    for (int i = 0; i < pieces; ++i) reinterpret_cast<uint4*>(p)[i] = words[i];
  }
};

// Sixteen bytes of ones.
template <class T>
__device__ __forceinline__ uint4 ones() {
  if (sizeof(T) == 8) return make_uint4(0, 0x3ff00000u, 0, 0x3ff00000u);
  const unsigned word = sizeof(T) == 4                     ? 0x3f800000u
                        : std::is_same<T, bfloat16>::value ? 0x3f803f80u
                                                           : 0x3c003c00u;
  return make_uint4(word, word, word, word);
}

template <class T, int count>
__device__ __forceinline__ void unpack(const Packed<T, count>& p, float (&v)[count]) {
  static_assert(sizeof(T) == 2, "float and double have their own");
#pragma unroll
  for (int i = 0; i < p.pieces; ++i) {
    Pair<T>::unpack(p.words[i].x, v + 8 * i);
    Pair<T>::unpack(p.words[i].y, v + 8 * i + 2);
    Pair<T>::unpack(p.words[i].z, v + 8 * i + 4);
    Pair<T>::unpack(p.words[i].w, v + 8 * i + 6);
  }
}
template <int count>
__device__ __forceinline__ void unpack(const Packed<float, count>& p, float (&v)[count]) {
#pragma unroll
  for (int i = 0; i < p.pieces; ++i) {
    v[4 * i] = __uint_as_float(p.words[i].x);
    v[4 * i + 1] = __uint_as_float(p.words[i].y);
    v[4 * i + 2] = __uint_as_float(p.words[i].z);
    v[4 * i + 3] = __uint_as_float(p.words[i].w);
  }
}
template <int count>
__device__ __forceinline__ void unpack(const Packed<double, count>& p, double (&v)[count]) {
#pragma unroll
  for (int i = 0; i < p.pieces; ++i) {
    v[2 * i] = bit_cast<double>(make_uint2(p.words[i].x, p.words[i].y));
    v[2 * i + 1] = bit_cast<double>(make_uint2(p.words[i].z, p.words[i].w));
  }
}

template <class T>
__device__ __forceinline__ Packed<T, 8> pack(const float (&v)[8]) {
  return {{make_uint4(Pair<T>::pack(v), Pair<T>::pack(v + 2), Pair<T>::pack(v + 4),
                      Pair<T>::pack(v + 6))}};
}
template <class T>
__device__ __forceinline__ Packed<float, 4> pack(const float (&v)[4]) {
  return {{make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]))}};
}
template <class T>
__device__ __forceinline__ Packed<double, 2> pack(const double (&v)[2]) {
  const uint2 a = bit_cast<uint2>(v[0]), b = bit_cast<uint2>(v[1]);
  return {{make_uint4(a.x, a.y, b.x, b.y)}};
}

struct PackedOperand {
  char* data;  // null: absent
  std::int64_t row_strides[max_row_rank];
};

template <class C>
struct PackedParams {
  std::int64_t rows;
  std::int64_t vectors;  // in a row
  StatisticOptions<C> statistics;
  C weight_offset;
  bool round_before_weight;
  bool round_rstd;
  bool weight_is_constant;
  bool staged;
  int row_rank;  // at least 1
  RowDimension row_dimensions[max_row_rank];
  PackedOperand x, residual, weight, y, residual_out, rstd;
};

template <class T, class W, bool has_residual>
class PackedElements {
 public:
  using Compute = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
  using Params = PackedParams<Compute>;
  static constexpr int width = static_cast<int>(16 / sizeof(T));
  static constexpr bool is_packed = true;
  static constexpr bool sums_plainly = sizeof(T) == 2;

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
    unsigned rest = static_cast<unsigned>(row);
#pragma unroll 1
    for (int d = p_.row_rank - 1; d > 0; --d) {
      const RowDimension size = p_.row_dimensions[d];
      const unsigned quotient = (__umulhi(rest, size.multiplier) + rest) >> size.shift;
      move(r, d, rest - quotient * size.size);
      rest = quotient;
    }
    move(r, 0, rest);
    return r;
  }

  // Issues the loads; add_residual() waits for them.
  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    Loaded loaded;
    loaded.x = Packed<T, width>::load(row.x + vector * 16);
    if (has_residual) loaded.residual = Packed<T, width>::load(row.residual + vector * 16);
    return loaded;
  }
  __device__ __forceinline__ Chunk add_residual(const Row&, std::int64_t,
                                                const Loaded& loaded) const {
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
  __device__ __forceinline__ void move(Row& r, int d, unsigned steps) const {
    const std::int64_t n = steps;
    r.x += n * p_.x.row_strides[d];
    if (has_residual) r.residual += n * p_.residual.row_strides[d];
    r.weight += n * p_.weight.row_strides[d];
    r.y += n * p_.y.row_strides[d];
    if (has_residual) r.residual_out += n * p_.residual_out.row_strides[d];
    r.rstd += n * p_.rstd.row_strides[d];
  }

  const Params& p_;
};

// ---- any ----

// A tensor whose rows have n elements.
struct AnyOperand {
  char* data;
  DType dtype;
  bool present;
  bool aligned;     // every element, to its size
  bool unit;        // and side by side
  bool vectorized;  // and whole vectors on boundaries of up to 16 bytes
  std::int64_t row_strides[max_row_rank];
  std::int64_t inner_strides[max_rank];
};

// A tensor with one element a row.
struct RowOperand {
  char* data;
  DType dtype;
  bool present;
  bool aligned;
  std::int64_t row_strides[max_row_rank];
};

template <class C>
struct AnyParams {
  std::int64_t rows;
  std::int64_t vectors;  // in a row
  std::int64_t n;
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
  int row_rank;
  int inner_rank;
  std::int64_t row_sizes[max_row_rank];
  std::int64_t inner_sizes[max_rank];
  AnyOperand x, residual, weight, bias, y, residual_out;
  RowOperand mean_square, rstd;
};

// Bytes from the start of a row to its element i.
template <class Params>
__device__ __forceinline__ std::int64_t offset_in_row(const Params& p, const AnyOperand& o,
                                                      std::int64_t i) {
  std::int64_t bytes = 0;
#pragma unroll 1
  for (int d = p.inner_rank - 1; d > 0; --d) {
    const std::int64_t quotient = i / p.inner_sizes[d];
    bytes += (i - quotient * p.inner_sizes[d]) * o.inner_strides[d];
    i = quotient;
  }
  return bytes + i * o.inner_strides[0];
}

template <class T>
__device__ __forceinline__ T load_bytes(const char* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const T*>(p);
  T v;
  for (unsigned i = 0; i < sizeof(T); ++i) reinterpret_cast<char*>(&v)[i] = p[i];
  return v;
}
template <class T>
__device__ __forceinline__ void store_bytes(char* p, T v, bool aligned) {
  if (aligned) {
    *reinterpret_cast<T*>(p) = v;
  } else {
    for (unsigned i = 0; i < sizeof(T); ++i) p[i] = reinterpret_cast<const char*>(&v)[i];
  }
}

// One element wherever it lies. Calls, not inlined: what is rare must not crowd the loops.
template <class Params, class C>
__attribute__((noinline)) __device__ C load_anywhere(const Params& p, const AnyOperand& o,
                                                     const char* row, std::int64_t i) {
  row += offset_in_row(p, o, i);
  switch (o.dtype) {
    case DType::f16: return widen_to<C>(load_bytes<float16>(row, o.aligned));
    case DType::bf16: return widen_to<C>(load_bytes<bfloat16>(row, o.aligned));
    case DType::f32: return widen_to<C>(load_bytes<float>(row, o.aligned));
    default: return widen_to<C>(load_bytes<double>(row, o.aligned));
  }
}
template <class Params, class C>
__attribute__((noinline)) __device__ void store_anywhere(const Params& p, const AnyOperand& o,
                                                         char* row, std::int64_t i, C v) {
  row += offset_in_row(p, o, i);
  switch (o.dtype) {
    case DType::f16: return store_bytes(row, narrow_to<float16>(v), o.aligned);
    case DType::bf16: return store_bytes(row, narrow_to<bfloat16>(v), o.aligned);
    case DType::f32: return store_bytes(row, static_cast<float>(v), o.aligned);
    default: return store_bytes(row, static_cast<double>(v), o.aligned);
  }
}

template <class C, int elements>
class AnyElements {
 public:
  using Compute = C;
  using Params = AnyParams<C>;
  static constexpr int width = elements;
  static constexpr bool is_packed = false;
  static constexpr bool sums_plainly = false;  // else asked at run time

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

  explicit __device__ __forceinline__ AnyElements(const Params& p) : p_(p) {}

  __device__ __forceinline__ Row row_at(std::int64_t row) const {
    Row r = {p_.x.data, p_.residual.data,     p_.weight.data,      p_.bias.data,
             p_.y.data, p_.residual_out.data, p_.mean_square.data, p_.rstd.data};
#pragma unroll 1
    for (int d = p_.row_rank - 1; d >= 0; --d) {
      const std::int64_t quotient = d == 0 ? 0 : row / p_.row_sizes[d];
      const std::int64_t steps = row - quotient * p_.row_sizes[d];
      r.x += steps * p_.x.row_strides[d];
      r.residual += steps * p_.residual.row_strides[d];
      r.weight += steps * p_.weight.row_strides[d];
      r.bias += steps * p_.bias.row_strides[d];
      r.y += steps * p_.y.row_strides[d];
      r.residual_out += steps * p_.residual_out.row_strides[d];
      r.mean_square += steps * p_.mean_square.row_strides[d];
      r.rstd += steps * p_.rstd.row_strides[d];
      row = quotient;
    }
    return r;
  }

  __device__ __forceinline__ Loaded load(const Row& row, std::int64_t vector) const {
    Loaded loaded;
    read(p_.x, row.x, vector, loaded.v);
    return loaded;
  }
  __device__ __forceinline__ Chunk add_residual(const Row& row, std::int64_t vector,
                                                Loaded loaded) const {
    if (!p_.residual.present) return loaded;
    C addend[width];
    read(p_.residual, row.residual, vector, addend);
#pragma unroll
    for (int j = 0; j < width; ++j) loaded.v[j] = add(loaded.v[j], addend[j]);
    if (p_.rounds_sum) round_all(loaded.v, p_.normalised_dtype);
    return loaded;
  }

  __device__ __forceinline__ Weights load_weights(const Row&, std::int64_t) const { return {}; }

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
    if (p_.residual_out.present) write(p_.residual_out, row.residual_out, vector, chunk.v);
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
    if (has_weight) read(p_.weight, row.weight, vector, w);
    if (has_bias) read(p_.bias, row.bias, vector, b);
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
    write(p_.y, row.y, vector, v);
  }

  __device__ __forceinline__ C rounded_rstd(C rstd) const {
    return p_.round_rstd ? rounded(rstd, p_.normalised_dtype) : rstd;
  }
  __device__ __forceinline__ void store_rstd(const Row& row, C rstd) const {
    if (p_.rstd.present) store_bytes(row.rstd, rstd, p_.rstd.aligned);
  }

  __device__ __forceinline__ double given_mean_square(const Row& row) const {
    return p_.mean_square.dtype == DType::f64
               ? load_bytes<double>(row.mean_square, p_.mean_square.aligned)
               : static_cast<double>(load_bytes<float>(row.mean_square, p_.mean_square.aligned));
  }
  __device__ __forceinline__ void store_mean_square(const Row& row, double mean) const {
    if (p_.mean_square.dtype == DType::f64) {
      store_bytes(row.mean_square, mean, p_.mean_square.aligned);
    } else {
      store_bytes(row.mean_square, static_cast<float>(mean), p_.mean_square.aligned);
    }
  }

 private:
  // A struct that the compiler moves in pieces of up to 16 bytes.
  template <class T>
  struct alignas(width * sizeof(T) < 16 ? width * sizeof(T) : 16) Together {
    T v[width];
  };

  template <class T>
  __device__ __forceinline__ void read_as(const AnyOperand& o, const char* row, std::int64_t first,
                                          C (&v)[width]) const {
    const T* elements_of_row = reinterpret_cast<const T*>(row) + first;
    if (o.vectorized && first + width <= p_.n) {
      const Together<T> t = *reinterpret_cast<const Together<T>*>(elements_of_row);
#pragma unroll
      for (int j = 0; j < width; ++j) v[j] = widen_to<C>(t.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        v[j] = first + j < p_.n ? widen_to<C>(elements_of_row[j]) : C(0);
      }
    }
  }

  __device__ __forceinline__ void read(const AnyOperand& o, const char* row, std::int64_t vector,
                                       C (&v)[width]) const {
    const std::int64_t first = vector * width;
    if (!o.unit) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        v[j] = first + j < p_.n ? load_anywhere<Params, C>(p_, o, row, first + j) : C(0);
      }
      return;
    }
    switch (o.dtype) {
      case DType::f16: return read_as<float16>(o, row, first, v);
      case DType::bf16: return read_as<bfloat16>(o, row, first, v);
      case DType::f32: return read_as<float>(o, row, first, v);
      case DType::f64:
        if constexpr (sizeof(C) == sizeof(double)) read_as<double>(o, row, first, v);
        return;
    }
  }

  template <class T>
  __device__ __forceinline__ void write_as(const AnyOperand& o, char* row, std::int64_t first,
                                           const C (&v)[width]) const {
    T* elements_of_row = reinterpret_cast<T*>(row) + first;
    if (o.vectorized && first + width <= p_.n) {
      Together<T> t;
#pragma unroll
      for (int j = 0; j < width; ++j) t.v[j] = narrow_to<T>(v[j]);
      *reinterpret_cast<Together<T>*>(elements_of_row) = t;
    } else {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (first + j < p_.n) elements_of_row[j] = narrow_to<T>(v[j]);
      }
    }
  }

  __device__ __forceinline__ void write(const AnyOperand& o, char* row, std::int64_t vector,
                                        const C (&v)[width]) const {
    const std::int64_t first = vector * width;
    if (!o.unit) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (first + j < p_.n) store_anywhere<Params, C>(p_, o, row, first + j, v[j]);
      }
      return;
    }
    switch (o.dtype) {
      case DType::f16: return write_as<float16>(o, row, first, v);
      case DType::bf16: return write_as<bfloat16>(o, row, first, v);
      case DType::f32: return write_as<float>(o, row, first, v);
      case DType::f64:
        if constexpr (sizeof(C) == sizeof(double)) write_as<double>(o, row, first, v);
        return;
    }
  }

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
};

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
