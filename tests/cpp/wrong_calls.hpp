// Calls that are refused, with the status that each gets, and the good call that they are made of.
#pragma once

#include <functional>
#include <vector>

#include "rmsnorm/contract.hpp"

namespace rmsnorm_test {

// A good call with every tensor that can be given at once; (2, 3, 8) normalised over the last axis.
struct GoodCall {
  GoodCall() {
    p.x = view<3>(x, rmsnorm::DType::f32, {2, 3, 8});
    p.residual = view<3>(residual, rmsnorm::DType::f32, {2, 3, 8});
    p.weight = view<1>(weight, rmsnorm::DType::f32, {8});
    p.bias = view<1>(bias, rmsnorm::DType::f32, {8});
    p.y = view<3>(y, rmsnorm::DType::f32, {2, 3, 8});
    p.residual_out = view<3>(residual_out, rmsnorm::DType::f32, {2, 3, 8});
    p.rstd = view<2>(rstd, rmsnorm::DType::f32, {2, 3});
  }
  template <int rank>
  static rmsnorm::Tensor view(void* data, rmsnorm::DType t, const std::int64_t (&sizes)[rank]) {
    rmsnorm::Tensor v;
    v.data = data;
    v.dtype = t;
    v.rank = rank;
    std::int64_t stride = 1;
    for (int d = rank - 1; d >= 0; --d) {
      v.sizes[d] = sizes[d];
      v.strides[d] = stride;
      stride *= sizes[d];
    }
    return v;
  }
  void give_mean_square() {
    p.mean_square = view<2>(mean_square, rmsnorm::DType::f32, {2, 3});
    p.residual_out = {};
  }

  // Memory for twice the sizes and the widest dtype.
  double x[96] = {}, residual[96] = {}, weight[96] = {}, bias[96] = {}, mean_square[96] = {};
  double y[96] = {}, residual_out[96] = {}, rstd[96] = {};
  rmsnorm::ForwardParams p;
};

struct WrongCall {
  const char* what;
  std::function<void(GoodCall&)> make;
  rmsnorm::Code code;
  rmsnorm::Argument argument;
};
const std::vector<WrongCall>& wrong_calls();

struct WrongMeanSquare {
  const char* what;
  std::function<void(rmsnorm::MeanSquareParams&)> make;
  rmsnorm::Code code;
  rmsnorm::Argument argument;
};
// Made of the mean square of the good call's x into its rstd.
rmsnorm::MeanSquareParams good_mean_square(const GoodCall& g);
const std::vector<WrongMeanSquare>& wrong_mean_squares();

// All memory of the call.
std::vector<unsigned char> bytes_of(const GoodCall& g);

}  // namespace rmsnorm_test
