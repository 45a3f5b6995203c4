#include "wrong_calls.hpp"

#include <limits>

namespace rmsnorm_test {
namespace {

using rmsnorm::Argument;
using rmsnorm::Code;
using rmsnorm::DType;
using rmsnorm::MeanSquareParams;
using rmsnorm::Rounding;

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr auto bad_dtype = static_cast<DType>(4);

}  // namespace

const std::vector<WrongCall>& wrong_calls() {
  static const std::vector<WrongCall> calls = {
      {"no x", [](GoodCall& g) { g.p.x = {}; }, Code::missing, Argument::x},
      {"no y", [](GoodCall& g) { g.p.y = {}; }, Code::missing, Argument::y},
      {"scalar x", [](GoodCall& g) { g.p.x.rank = 0; }, Code::invalid_rank, Argument::x},
      {"rank nine", [](GoodCall& g) { g.p.x.rank = 9; }, Code::invalid_rank, Argument::x},
      {"weight rank nine", [](GoodCall& g) { g.p.weight.rank = 9; }, Code::invalid_rank,
       Argument::weight},

      {"x dtype", [](GoodCall& g) { g.p.x.dtype = bad_dtype; }, Code::invalid_dtype, Argument::x},
      {"negative dtype", [](GoodCall& g) { g.p.x.dtype = static_cast<DType>(-1); },
       Code::invalid_dtype, Argument::x},
      {"residual dtype", [](GoodCall& g) { g.p.residual.dtype = bad_dtype; }, Code::invalid_dtype,
       Argument::residual},
      {"weight dtype", [](GoodCall& g) { g.p.weight.dtype = bad_dtype; }, Code::invalid_dtype,
       Argument::weight},
      {"bias dtype", [](GoodCall& g) { g.p.bias.dtype = bad_dtype; }, Code::invalid_dtype,
       Argument::bias},
      {"y dtype", [](GoodCall& g) { g.p.y.dtype = bad_dtype; }, Code::invalid_dtype, Argument::y},
      {"residual_out dtype", [](GoodCall& g) { g.p.residual_out.dtype = bad_dtype; },
       Code::invalid_dtype, Argument::residual_out},
      {"rstd dtype", [](GoodCall& g) { g.p.rstd.dtype = bad_dtype; }, Code::invalid_dtype,
       Argument::rstd},
      {"half rstd", [](GoodCall& g) { g.p.rstd.dtype = DType::f16; }, Code::invalid_dtype,
       Argument::rstd},
      {"f64 rstd of an f32 norm", [](GoodCall& g) { g.p.rstd.dtype = DType::f64; },
       Code::invalid_dtype, Argument::rstd},
      {"f32 rstd of an f64 norm", [](GoodCall& g) { g.p.bias.dtype = DType::f64; },
       Code::invalid_dtype, Argument::rstd},
      {"half mean_square",
       [](GoodCall& g) {
         g.give_mean_square();
         g.p.mean_square.dtype = DType::bf16;
       },
       Code::invalid_dtype, Argument::mean_square},

      {"axis beyond", [](GoodCall& g) { g.p.axis = 3; }, Code::invalid_value, Argument::axis},
      {"axis before", [](GoodCall& g) { g.p.axis = -4; }, Code::invalid_value, Argument::axis},
      {"axis far before", [](GoodCall& g) { g.p.axis = std::numeric_limits<std::int32_t>::min(); },
       Code::invalid_value, Argument::axis},

      {"negative size", [](GoodCall& g) { g.p.x.sizes[1] = -3; }, Code::invalid_size, Argument::x},
      {"sizes beyond 64 bits",
       [](GoodCall& g) {
         g.p.x.sizes[0] = g.p.x.sizes[1] = std::int64_t{1} << 40;
         g.p.y.sizes[0] = g.p.y.sizes[1] = std::int64_t{1} << 40;
       },
       Code::too_many_elements, Argument::x},
      {"strides beyond addresses",
       [](GoodCall& g) { g.p.x.strides[0] = std::numeric_limits<std::int64_t>::min(); },
       Code::unaddressable, Argument::x},
      {"weight beyond addresses",
       [](GoodCall& g) { g.p.weight.strides[0] = std::int64_t{1} << 60; }, Code::unaddressable,
       Argument::weight},
      {"residual sizes", [](GoodCall& g) { g.p.residual.sizes[0] = 1; }, Code::invalid_size,
       Argument::residual},
      {"residual rank", [](GoodCall& g) { g.p.residual.rank = 2; }, Code::invalid_rank,
       Argument::residual},
      {"y sizes", [](GoodCall& g) { g.p.y.sizes[2] = 9; }, Code::invalid_size, Argument::y},
      {"y rank", [](GoodCall& g) { g.p.y.rank = 2; }, Code::invalid_rank, Argument::y},
      {"residual_out sizes", [](GoodCall& g) { g.p.residual_out.sizes[1] = 2; }, Code::invalid_size,
       Argument::residual_out},
      {"residual_out rank", [](GoodCall& g) { g.p.residual_out.rank = 1; }, Code::invalid_rank,
       Argument::residual_out},
      {"rstd sizes", [](GoodCall& g) { g.p.rstd.sizes[1] = 4; }, Code::invalid_size,
       Argument::rstd},
      {"rstd rank", [](GoodCall& g) { g.p.rstd.rank = 1; }, Code::invalid_rank, Argument::rstd},
      {"mean_square sizes",
       [](GoodCall& g) {
         g.give_mean_square();
         g.p.mean_square.sizes[0] = 1;
       },
       Code::invalid_size, Argument::mean_square},
      {"weight length", [](GoodCall& g) { g.p.weight.sizes[0] = 7; }, Code::invalid_size,
       Argument::weight},
      {"weight of one for all", [](GoodCall& g) { g.p.weight.sizes[0] = 1; }, Code::invalid_size,
       Argument::weight},
      {"weight per other head",
       [](GoodCall& g) {
         g.p.weight = GoodCall::view<2>(g.weight, DType::f32, {2, 8});
       },
       Code::invalid_size, Argument::weight},
      {"weight of more dimensions",
       [](GoodCall& g) {
         g.p.weight = GoodCall::view<4>(g.weight, DType::f32, {1, 1, 1, 8});
       },
       Code::invalid_rank, Argument::weight},
      {"weight of fewer dimensions",
       [](GoodCall& g) {
         g.p.axis = 1;
         g.p.rstd = {};
       },
       Code::invalid_rank, Argument::weight},
      {"scalar weight", [](GoodCall& g) { g.p.weight.rank = 0; }, Code::invalid_rank,
       Argument::weight},
      {"bias length", [](GoodCall& g) { g.p.bias.sizes[0] = 9; }, Code::invalid_size,
       Argument::bias},
      {"scalar bias", [](GoodCall& g) { g.p.bias.rank = 0; }, Code::invalid_rank, Argument::bias},

      {"null x", [](GoodCall& g) { g.p.x.data = nullptr; }, Code::null_data, Argument::x},
      {"null residual", [](GoodCall& g) { g.p.residual.data = nullptr; }, Code::null_data,
       Argument::residual},
      {"null weight", [](GoodCall& g) { g.p.weight.data = nullptr; }, Code::null_data,
       Argument::weight},
      {"null bias", [](GoodCall& g) { g.p.bias.data = nullptr; }, Code::null_data, Argument::bias},
      {"null y", [](GoodCall& g) { g.p.y.data = nullptr; }, Code::null_data, Argument::y},
      {"null residual_out", [](GoodCall& g) { g.p.residual_out.data = nullptr; }, Code::null_data,
       Argument::residual_out},
      {"null rstd", [](GoodCall& g) { g.p.rstd.data = nullptr; }, Code::null_data, Argument::rstd},

      {"negative eps", [](GoodCall& g) { g.p.eps = -1e-6; }, Code::invalid_value, Argument::eps},
      {"NaN eps", [](GoodCall& g) { g.p.eps = nan; }, Code::invalid_value, Argument::eps},
      {"infinite eps", [](GoodCall& g) { g.p.eps = infinity; }, Code::invalid_value, Argument::eps},
      {"NaN weight_offset", [](GoodCall& g) { g.p.weight_offset = nan; }, Code::invalid_value,
       Argument::weight_offset},
      {"infinite weight_offset", [](GoodCall& g) { g.p.weight_offset = -infinity; },
       Code::invalid_value, Argument::weight_offset},
      {"weight_offset without weight",
       [](GoodCall& g) {
         g.p.weight = {};
         g.p.weight_offset = 1;
       },
       Code::unexpected, Argument::weight_offset},
      {"partial of zero", [](GoodCall& g) { g.p.partial = 0; }, Code::invalid_value,
       Argument::partial},
      {"negative partial", [](GoodCall& g) { g.p.partial = -0.5; }, Code::invalid_value,
       Argument::partial},
      {"partial above one", [](GoodCall& g) { g.p.partial = 1.0000001; }, Code::invalid_value,
       Argument::partial},
      {"NaN partial", [](GoodCall& g) { g.p.partial = nan; }, Code::invalid_value,
       Argument::partial},
      {"partial of given statistics",
       [](GoodCall& g) {
         g.give_mean_square();
         g.p.partial = 0.5;
       },
       Code::unexpected, Argument::partial},
      {"rounding beyond", [](GoodCall& g) { g.p.rounding = static_cast<Rounding>(3); },
       Code::invalid_value, Argument::rounding},
      {"rounding before", [](GoodCall& g) { g.p.rounding = static_cast<Rounding>(-1); },
       Code::invalid_value, Argument::rounding},
      {"residual_out without residual", [](GoodCall& g) { g.p.residual = {}; }, Code::unexpected,
       Argument::residual_out},
  };
  return calls;
}

rmsnorm::MeanSquareParams good_mean_square(const GoodCall& g) {
  MeanSquareParams p;
  p.x = g.p.x;
  p.mean_square = g.p.rstd;
  return p;
}

const std::vector<WrongMeanSquare>& wrong_mean_squares() {
  static const std::vector<WrongMeanSquare> calls = {
      {"no x", [](MeanSquareParams& p) { p.x = {}; }, Code::missing, Argument::x},
      {"no output", [](MeanSquareParams& p) { p.mean_square = {}; }, Code::missing,
       Argument::mean_square},
      {"scalar x", [](MeanSquareParams& p) { p.x.rank = 0; }, Code::invalid_rank, Argument::x},
      {"rank nine", [](MeanSquareParams& p) { p.x.rank = 9; }, Code::invalid_rank, Argument::x},
      {"x dtype", [](MeanSquareParams& p) { p.x.dtype = bad_dtype; }, Code::invalid_dtype,
       Argument::x},
      {"half output", [](MeanSquareParams& p) { p.mean_square.dtype = DType::f16; },
       Code::invalid_dtype, Argument::mean_square},
      {"output rank", [](MeanSquareParams& p) { p.mean_square.rank = 1; }, Code::invalid_rank,
       Argument::mean_square},
      {"output sizes", [](MeanSquareParams& p) { p.mean_square.sizes[0] = 3; }, Code::invalid_size,
       Argument::mean_square},
      {"axis", [](MeanSquareParams& p) { p.axis = 3; }, Code::invalid_value, Argument::axis},
      {"partial", [](MeanSquareParams& p) { p.partial = 0; }, Code::invalid_value,
       Argument::partial},
      {"null x", [](MeanSquareParams& p) { p.x.data = nullptr; }, Code::null_data, Argument::x},
      {"null output", [](MeanSquareParams& p) { p.mean_square.data = nullptr; }, Code::null_data,
       Argument::mean_square},
      {"broadcast output", [](MeanSquareParams& p) { p.mean_square.strides[1] = 0; },
       Code::self_overlap, Argument::mean_square},
      {"output over x",
       [](MeanSquareParams& p) { p.mean_square.data = const_cast<void*>(p.x.data); }, Code::overlap,
       Argument::mean_square},
  };
  return calls;
}

std::vector<unsigned char> bytes_of(const GoodCall& g) {
  std::vector<unsigned char> bytes;
  for (const double* memory :
       {g.x, g.residual, g.weight, g.bias, g.mean_square, g.y, g.residual_out, g.rstd}) {
    const auto* b = reinterpret_cast<const unsigned char*>(memory);
    bytes.insert(bytes.end(), b, b + sizeof g.x);
  }
  return bytes;
}

}  // namespace rmsnorm_test
