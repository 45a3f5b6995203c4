// The contract of the library: tensor views, options, parameter structs and statuses, shared by the
// CPU and the CUDA side. Nothing here computes anything.
//
// The formula. A tensor x of sizes (..., n) consists of rows of n elements. For every row
//
//     mean_square = (x[0]^2 + ... + x[k-1]^2) / k          k = ceil(partial * n), normally n
//     rstd        = 1 / sqrt(mean_square + eps)            rounded once
//     y[i]        = x[i] * rstd * (weight_offset + weight[i]) + bias[i]
//
// after Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467); a partial
// below one is that paper's pRMSNorm. With a residual, s = x + residual takes the place of x.
//
// The compute type is float, or double as soon as one of the tensors x, residual, weight, bias, y
// or residual_out is f64. Where the formula above rounds is chosen by `Rounding`.
//
// Promises (see docs/numerics.md for the reasons and the tests):
//   - every rounding is to nearest even; denormals are kept whatever mode the calling thread is in;
//   - the CPU result is the same bit for bit on every ISA, for any split into row ranges, any
//     strides and any alignment, NaN payloads apart;
//   - rows whose squares overflow or underflow are computed on values scaled by a power of two;
//   - against exact arithmetic and with Rounding::once, f16 and bf16 results are within 0.51 ulp,
//     f32 within 3 ulp and f64 within 4 ulp (bounds.hpp), for f32 and f64 with n up to 2^20,
//     weight_offset + weight exact, a sum with residual rounded, no bias that cancels, and x * rstd
//     finite in the compute type, and at least 2^-125 (f64 2^-1021) or zero, or weights of at most
//     one.
//
// No function allocates memory, starts a thread or throws. The first call reads CPUID and the
// environment.
#pragma once

#include <cstdint>
#include <type_traits>

#include "version.hpp"

namespace rmsnorm {

// Storage of a 16-bit float; all arithmetic happens after widening to float.
struct float16 {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

enum class DType : std::int32_t { f16 = 0, bf16 = 1, f32 = 2, f64 = 3 };

constexpr int dtype_count = 4;

constexpr bool is_valid(DType t) {
  return static_cast<std::int32_t>(t) >= 0 && static_cast<std::int32_t>(t) < dtype_count;
}

// A hexadecimal digit each: calls ask for many sizes, and a shift needs no branches. Of a DType
// that is not valid any of them.
constexpr std::int64_t size_in_bytes(DType t) {
  return 0x8422 >> (4 * (static_cast<std::int32_t>(t) & 3)) & 0xf;
}

// The type that holds every value of both: f16 with bf16 gives f32, otherwise the wider one.
constexpr DType promote(DType a, DType b) {
  return a == b ? a : (a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32);
}

template <class T>
struct dtype_of;
template <>
struct dtype_of<float16> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<bfloat16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<double> {
  static constexpr DType value = DType::f64;
};

// A view of memory that the caller owns. Strides are in elements, of any sign; the stride of a
// dimension of size one is ignored. A default-made view is absent (rank -1): the option it stands
// for is not used. A rank of zero is a scalar. Where a size is zero the others may be anything.
constexpr int max_rank = 8;

template <class Void>
struct BasicTensor {
  Void* data = nullptr;
  DType dtype = DType::f32;
  std::int32_t rank = -1;
  std::int64_t sizes[max_rank] = {};
  std::int64_t strides[max_rank] = {};

  constexpr bool present() const { return rank >= 0; }

  // From Tensor to ConstTensor.
  template <class Target,
            class = typename std::enable_if<!std::is_same<Target, Void>::value &&
                                            std::is_same<Target, const void>::value>::type>
  constexpr operator BasicTensor<Target>() const {
    BasicTensor<Target> t;
    t.data = data;
    t.dtype = dtype;
    t.rank = rank;
    for (int d = 0; d < max_rank; ++d) {
      t.sizes[d] = sizes[d];
      t.strides[d] = strides[d];
    }
    return t;
  }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;

namespace detail {
template <class T>
struct view_of {
  using type = Tensor;
};
template <class T>
struct view_of<const T> {
  using type = ConstTensor;
};
template <class T>
struct without_const {
  using type = T;
};
template <class T>
struct without_const<const T> {
  using type = T;
};
}  // namespace detail

// Views of typed pointers: T is float16, bfloat16, float or double, const for an input.
//   vector(w, n)                     sizes (n)
//   matrix(x, rows, n)               sizes (rows, n), contiguous
//   matrix(x, rows, n, row_stride)   sizes (rows, n), rows `row_stride` elements apart
template <class T>
constexpr typename detail::view_of<T>::type vector(T* data, std::int64_t n) {
  typename detail::view_of<T>::type t;
  t.data = data;
  t.dtype = dtype_of<typename detail::without_const<T>::type>::value;
  t.rank = 1;
  t.sizes[0] = n;
  t.strides[0] = 1;
  return t;
}

template <class T>
constexpr typename detail::view_of<T>::type matrix(T* data, std::int64_t rows, std::int64_t n,
                                                   std::int64_t row_stride) {
  typename detail::view_of<T>::type t = vector(data, n);
  t.rank = 2;
  t.sizes[0] = rows;
  t.sizes[1] = n;
  t.strides[0] = row_stride;
  t.strides[1] = 1;
  return t;
}

template <class T>
constexpr typename detail::view_of<T>::type matrix(T* data, std::int64_t rows, std::int64_t n) {
  return matrix(data, rows, n, n);
}

// Where the formula rounds. T is the dtype of the tensor that is normalised (x; with a residual,
// that of residual_out), and cast_D rounds to dtype D. `w` is weight_offset + weight, where
// weight_offset and the sum are each rounded to the compute type; its dtype W is that of weight, or
// the compute type when weight_offset is not zero.
enum class Rounding : std::int32_t {
  // cast_y(x * rstd * w + b): the compute type throughout (x * rstd first, then an fma with w and
  // b)
  // and one rounding to the dtype of y. OLMo 2, Gemma, GPT-OSS, torch.nn.functional.rms_norm.
  once = 0,
  // cast_y(cast_B(cast_P(cast_T(x * rstd) * w) + b)), P = promote(T, W), B = promote(P, bias
  // dtype):
  // what the same lines written on tensors compute, each operation rounding to the promoted dtype.
  // Llama, Mistral, Qwen, DeepSeek-V3.
  before_weight = 1,
  // The same with x * cast_T(rstd) in place of x * rstd: the root is rounded as well.
  // DeepSeek-V4's unweighted norm, GLM-5-Next.
  rstd = 2,
};

// What a status speaks of.
enum class Argument : std::int32_t {
  none = 0,
  x,
  residual,
  weight,
  bias,
  mean_square,
  y,
  residual_out,
  rstd,
  axis,
  eps,
  weight_offset,
  partial,
  rounding,
  rows,
  isa,
  dy,
  d_residual,
  dx,
  dweight,
  dbias,
  d_mean_square,
  workspace,
  blocks,
  columns,
};

enum class Code : std::int32_t {
  ok = 0,
  missing,            // a tensor that the operation needs is absent
  unexpected,         // a tensor or option that has no meaning here was given
  invalid_dtype,      // not one of the four, or not the one that this argument must have
  invalid_rank,       // rank above max_rank, or below what the operation needs
  invalid_size,       // negative, or not the size that x asks for
  invalid_value,      // NaN, infinite, negative or out of the option's range
  null_data,          // no memory behind a tensor that has elements
  self_overlap,       // elements of an output share memory, or its dimensions interleave
  overlap,            // an output shares memory with another tensor other than as an exact alias
  isa_unavailable,    // this CPU (or this build) cannot run the instruction set that was asked for
  cuda_error,         // a CUDA call failed: Status::cuda_error says which way
  cuda_unavailable,   // this build has no CUDA
  too_many_elements,  // more than 2^59, at whatever strides
  unaddressable,      // elements further apart than addresses reach
};

struct Status {
  Code code = Code::ok;
  Argument argument = Argument::none;
  std::int32_t cuda_error = 0;  // the cudaError_t of Code::cuda_error

  constexpr bool ok() const { return code == Code::ok; }
};

constexpr const char* name(DType t) {
  switch (t) {
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f32: return "float32";
    case DType::f64: return "float64";
  }
  return "unknown";
}

constexpr const char* name(Argument a) {
  switch (a) {
    case Argument::none: return "";
    case Argument::x: return "x";
    case Argument::residual: return "residual";
    case Argument::weight: return "weight";
    case Argument::bias: return "bias";
    case Argument::mean_square: return "mean_square";
    case Argument::y: return "y";
    case Argument::residual_out: return "residual_out";
    case Argument::rstd: return "rstd";
    case Argument::axis: return "axis";
    case Argument::eps: return "eps";
    case Argument::weight_offset: return "weight_offset";
    case Argument::partial: return "partial";
    case Argument::rounding: return "rounding";
    case Argument::rows: return "row range";
    case Argument::isa: return "isa";
    case Argument::dy: return "dy";
    case Argument::d_residual: return "d_residual";
    case Argument::dx: return "dx";
    case Argument::dweight: return "dweight";
    case Argument::dbias: return "dbias";
    case Argument::d_mean_square: return "d_mean_square";
    case Argument::workspace: return "workspace";
    case Argument::blocks: return "block range";
    case Argument::columns: return "column range";
  }
  return "unknown";
}

// One sentence for a code; name(status.argument) tells what it is about.
constexpr const char* text(Code c) {
  switch (c) {
    case Code::ok: return "success";
    case Code::missing: return "is required and absent";
    case Code::unexpected: return "was given where it has no meaning";
    case Code::invalid_dtype: return "has a dtype that is not supported here";
    case Code::invalid_rank: return "has too many or too few dimensions";
    case Code::invalid_size: return "has a size that does not fit x";
    case Code::invalid_value: return "is outside its range";
    case Code::null_data: return "has elements and a null pointer";
    case Code::self_overlap: return "is an output whose elements share memory or interleave";
    case Code::overlap:
      return "is an output that overlaps another tensor other than as its exact alias";
    case Code::isa_unavailable: return "is an instruction set that cannot run here";
    case Code::cuda_error: return "a CUDA call failed";
    case Code::cuda_unavailable: return "this build has no CUDA";
    case Code::too_many_elements: return "has more than 2^59 elements";
    case Code::unaddressable: return "has elements further apart than addresses reach";
  }
  return "unknown status";
}

// Forward. Sizes: x, residual, y and residual_out agree; rstd and mean_square have the sizes of x
// without its normalised axes; weight and bias have the sizes of the normalised axes, optionally
// preceded by leading dimensions that broadcast against those of x as in NumPy (per head, per
// group, per sample).
//
// Aliasing: y and residual_out may each be x or residual itself (same address, element size and
// strides). Any other overlap of an output with another tensor is refused.
//
// Errors: a status other than ok says what is wrong, and then nothing was written.
struct ForwardParams {
  ConstTensor x;            // any of the four dtypes
  ConstTensor residual;     // absent: plain norm
  ConstTensor weight;       // absent: ones
  ConstTensor bias;         // absent: none
  ConstTensor mean_square;  // absent: computed from x; else the statistics to use, f32 or f64
  Tensor y;                 // any of the four dtypes
  Tensor residual_out;      // x + residual; allowed only with residual, any dtype
  Tensor rstd;              // optional; f32, f64 where the compute type is double
  std::int32_t axis = -1;   // first normalised axis; the norm runs over axis ... rank-1 together
  Rounding rounding = Rounding::once;
  double eps = 1e-6;           // finite, >= 0, inside the root
  double weight_offset = 0.0;  // finite; 1 for weights stored around zero (Gemma); needs weight
  // In (0, 1]: statistics from the first ceil(partial * n) elements, the product taken in double
  // (7.0 / 25 of 25 elements are 8).
  double partial = 1.0;
  // With a residual: true norms cast(s), rounded to the dtype of residual_out (without one: to the
  // promoted dtype of x and residual), as the unfused model does; false norms the unrounded s.
  // Means nothing without a residual.
  bool round_residual = true;
};

// Mean square of the first ceil(partial * n) elements of each row, for rows that are sharded over
// devices: average the shards' results and pass them as ForwardParams::mean_square.
struct MeanSquareParams {
  ConstTensor x;
  Tensor mean_square;      // sizes of x without its normalised axes; f32 or f64
  std::int32_t axis = -1;  // first normalised axis
  double partial = 1.0;
};

// Backward: the gradients of the formula without its roundings, through which gradients pass
// unchanged. For every row, with xhat = x * rstd, w = weight_offset + weight, g = dy * w and k the
// number of counted elements:
//
//     c           = (g[0] * xhat[0] + ... + g[n-1] * xhat[n-1]) / k
//     dx[i]       = (g[i] - c * xhat[i]) * rstd + d_residual[i]        i < k
//     dx[i]       =  g[i] * rstd                + d_residual[i]        i >= k, or mean_square given
//     dweight[i]  = sum of dy[i] * xhat[i] over the rows that share weight[i]
//     dbias[i]    = sum of dy[i] over the rows that share bias[i]
//     d_mean_square = -rstd^2 / 2 * (g[0] * xhat[0] + ... + g[n-1] * xhat[n-1])
//
// dx is the gradient of x and of a residual that was added to it: both get the same.
//
// The compute type is float, or double as soon as one of the tensors with n elements a row is f64.
// g and xhat are rounded to it, c is summed as numerics.md says and rounded once, the rest is
// fma(-c, xhat, g), a product and, with d_residual, an fma in its place; dx is rounded once.
//
// dweight and dbias are summed in the compute type over blocks of rows, in ascending order, and the
// blocks' sums then in double, rounded to the compute type and that to the output. The blocks
// depend on the sizes alone, so that the result is the same for any number of threads.
//
// Sizes: dy, residual, d_residual and dx have those of x; rstd, mean_square and d_mean_square those
// of x without its normalised axes; dweight has the sizes of weight, dbias those that a bias may
// have.
//
// Aliasing: dx may be dy, x, residual or d_residual itself. Any other overlap of an output or of
// the workspace with another tensor is refused.
struct BackwardParams {
  ConstTensor dy;           // gradient of y
  ConstTensor x;            // what was normalised: forward's x, or its rounded residual_out
  ConstTensor residual;     // absent, or: x + residual, not rounded, was (round_residual = false)
  ConstTensor weight;       // absent: ones
  ConstTensor rstd;         // f32 or f64, as forward returned it; absent: computed from x
  ConstTensor mean_square;  // absent, or forward's, f32 or f64: rstd then does not depend on x
  ConstTensor d_residual;   // absent, or the gradient of residual_out, added to dx
  Tensor dx;                // any of the four dtypes
  Tensor dweight;           // absent: not computed; allowed only with weight; any dtype
  Tensor dbias;             // absent: not computed; any dtype
  Tensor d_mean_square;     // absent: not computed; allowed only with mean_square; f32 or f64
  // Memory for the sums of blocks, where dweight or dbias is present: of at least as many bytes as
  // the function backward_workspace of the CPU or of CUDA says, at a multiple of 64 bytes.
  void* workspace = nullptr;
  std::int64_t workspace_bytes = 0;
  std::int32_t axis = -1;      // as in forward
  double eps = 1e-6;           // as in forward; with rstd it matters where that is out of range
  double weight_offset = 0.0;  // as in forward
  double partial = 1.0;        // as in forward
};

}  // namespace rmsnorm
