// How kernels reach memory: 16 bytes at a time where a tensor's rows lie so, and elements of any
// dtype, stride and alignment.
#pragma once

#include <type_traits>

#include "../row_layout.hpp"
#include "device.cuh"

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

// The rows of a packed operation.
struct PackedRows {
  std::int64_t rows;
  std::int64_t vectors;  // in a row
  int row_rank;          // at least 1
  RowDimension row_dimensions[max_row_rank];

  // Calls move(d, steps) for each row dimension: the row lies `steps` along it.
  template <class Move>
  __device__ __forceinline__ void locate(std::int64_t row, Move move) const {
    unsigned rest = static_cast<unsigned>(row);
#pragma unroll 1
    for (int d = row_rank - 1; d > 0; --d) {
      const RowDimension size = row_dimensions[d];
      const unsigned quotient = (__umulhi(rest, size.multiplier) + rest) >> size.shift;
      move(d, std::int64_t{rest - quotient * size.size});
      rest = quotient;
    }
    move(0, std::int64_t{rest});
  }
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

// The rows of an operation on any tensors.
struct AnyRows {
  std::int64_t rows;
  std::int64_t vectors;  // in a row
  std::int64_t n;
  int row_rank;
  int inner_rank;
  std::int64_t row_sizes[max_row_rank];
  std::int64_t inner_sizes[max_rank];

  template <class Move>
  __device__ __forceinline__ void locate(std::int64_t row, Move move) const {
#pragma unroll 1
    for (int d = row_rank - 1; d >= 0; --d) {
      const std::int64_t quotient = d == 0 ? 0 : row / row_sizes[d];
      move(d, row - quotient * row_sizes[d]);
      row = quotient;
    }
  }
};

// Bytes from the start of a row to its element i.
__device__ __forceinline__ std::int64_t offset_in_row(const AnyRows& p, const AnyOperand& o,
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
template <class C>
__attribute__((noinline)) __device__ C load_anywhere(const AnyRows& p, const AnyOperand& o,
                                                     const char* row, std::int64_t i) {
  row += offset_in_row(p, o, i);
  switch (o.dtype) {
    case DType::f16: return widen_to<C>(load_bytes<float16>(row, o.aligned));
    case DType::bf16: return widen_to<C>(load_bytes<bfloat16>(row, o.aligned));
    case DType::f32: return widen_to<C>(load_bytes<float>(row, o.aligned));
    default: return widen_to<C>(load_bytes<double>(row, o.aligned));
  }
}
template <class C>
__attribute__((noinline)) __device__ void store_anywhere(const AnyRows& p, const AnyOperand& o,
                                                         char* row, std::int64_t i, C v) {
  row += offset_in_row(p, o, i);
  switch (o.dtype) {
    case DType::f16: return store_bytes(row, narrow_to<float16>(v), o.aligned);
    case DType::bf16: return store_bytes(row, narrow_to<bfloat16>(v), o.aligned);
    case DType::f32: return store_bytes(row, static_cast<float>(v), o.aligned);
    default: return store_bytes(row, static_cast<double>(v), o.aligned);
  }
}

__device__ __forceinline__ double load_statistic(const RowOperand& o, const char* p) {
  return o.dtype == DType::f64 ? load_bytes<double>(p, o.aligned)
                               : static_cast<double>(load_bytes<float>(p, o.aligned));
}
__device__ __forceinline__ void store_statistic(const RowOperand& o, char* p, double v) {
  if (o.dtype == DType::f64) {
    store_bytes(p, v, o.aligned);
  } else {
    store_bytes(p, static_cast<float>(v), o.aligned);
  }
}

// Vectors of `width` elements of any tensor, as numbers of C. What lies beyond the row's end reads
// as zero and is not written.
template <class C, int width>
class AnyAccess {
 public:
  explicit __device__ __forceinline__ AnyAccess(const AnyRows& p) : p_(p) {}

  __device__ __forceinline__ void read(const AnyOperand& o, const char* row, std::int64_t vector,
                                       C (&v)[width]) const {
    const std::int64_t first = vector * width;
    if (!o.unit) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        v[j] = first + j < p_.n ? load_anywhere<C>(p_, o, row, first + j) : C(0);
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

  __device__ __forceinline__ void write(const AnyOperand& o, char* row, std::int64_t vector,
                                        const C (&v)[width]) const {
    const std::int64_t first = vector * width;
    if (!o.unit) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (first + j < p_.n) store_anywhere<C>(p_, o, row, first + j, v[j]);
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

  const AnyRows& p_;
};

// The same as calls, which return and take values in registers: a loop over four tensors has no
// room for all the ways in which each of them may lie.
template <class C, int width>
struct AnyVector {
  C v[width];
};
template <class C, int width>
__attribute__((noinline)) __device__ AnyVector<C, width> read_vector(const AnyRows& p,
                                                                     const AnyOperand& o,
                                                                     const char* row,
                                                                     std::int64_t vector) {
  AnyVector<C, width> a;
  AnyAccess<C, width>(p).read(o, row, vector, a.v);
  return a;
}
template <class C, int width>
__attribute__((noinline)) __device__ void write_vector(const AnyRows& p, const AnyOperand& o,
                                                       char* row, std::int64_t vector,
                                                       AnyVector<C, width> a) {
  AnyAccess<C, width>(p).write(o, row, vector, a.v);
}

}  // namespace detail
}  // namespace cuda
}  // namespace rmsnorm
