// This file is compiled without contraction of floating-point expressions: a product here is
// rounded.
#include "formula.hpp"

#include <algorithm>
#include <cmath>

#include "rmsnorm/bounds.hpp"

namespace rmsnorm_test {
namespace {

// Arithmetic in the compute type on values held as doubles.
struct Compute {
  bool in_double;

  double add(double a, double b) const {
    return in_double ? a + b : static_cast<float>(a) + static_cast<float>(b);
  }
  double multiply(double a, double b) const {
    return in_double ? a * b : static_cast<float>(a) * static_cast<float>(b);
  }
  double multiply_add(double a, double b, double c) const {
    return in_double
               ? std::fma(a, b, c)
               : std::fmaf(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
  }
};

DType sum_type(const Case& c) {
  return c.residual_out.present ? c.residual_out.dtype
                                : rmsnorm::promote(c.x.dtype, c.residual.dtype);
}

double weight_at(const Case& c, const Inputs& in, std::int64_t place) {
  const double w = in.weight[static_cast<std::size_t>(place)];
  if (c.weight_offset == 0) return w;
  return Compute{c.computes_in_double()}.add(round_to(c.compute_type(), c.weight_offset), w);
}

}  // namespace

Normalised normalised(const Case& c, const Inputs& in) {
  if (!c.residual.present) return {in.x, {}, c.x.dtype};
  const Compute compute{c.computes_in_double()};
  Normalised v{in.x, in.x, sum_type(c)};
  for (std::size_t i = 0; i < in.x.size(); ++i) {
    const double s = compute.add(in.x[i], in.residual[i]);
    v.sum_rounded[i] = round_to(v.type, s);
    v.values[i] = c.round_residual ? v.sum_rounded[i] : s;
  }
  return v;
}

Results emulate(const Case& c, const Inputs& in, const std::vector<double>& rstd) {
  const Compute compute{c.computes_in_double()};
  const Normalised v = normalised(c, in);
  const DType w_type = c.weight_offset != 0 ? c.compute_type() : c.weight.dtype;
  const DType product_type = c.weight.present ? rmsnorm::promote(v.type, w_type) : v.type;
  const DType sum_with_bias =
      c.bias.present ? rmsnorm::promote(product_type, c.bias.dtype) : product_type;
  const std::int64_t n = c.n();
  Results out;
  out.y.resize(v.values.size());
  for (std::size_t i = 0; i < v.values.size(); ++i) {
    const auto place = static_cast<std::int64_t>(i);
    const std::int64_t row = place / n;
    const std::int64_t parameter = weight_start(c, row) + place % n;
    const double r = rstd[static_cast<std::size_t>(row)];
    const double w = c.weight.present ? weight_at(c, in, parameter) : 1;
    const double b = c.bias.present ? in.bias[static_cast<std::size_t>(parameter)] : 0;
    double t;
    if (c.rounding == Rounding::once) {
      t = compute.multiply(v.values[i], r);
      if (c.weight.present && c.bias.present) {
        t = compute.multiply_add(t, w, b);
      } else if (c.weight.present) {
        t = compute.multiply(t, w);
      } else if (c.bias.present) {
        t = compute.add(t, b);
      }
    } else {
      const double factor = c.rounding == Rounding::rstd ? round_to(v.type, r) : r;
      t = round_to(v.type, compute.multiply(v.values[i], factor));
      if (c.weight.present) t = round_to(product_type, compute.multiply(t, w));
      if (c.bias.present) t = round_to(sum_with_bias, compute.add(t, b));
    }
    out.y[i] = encode(c.y.dtype, round_to(c.y.dtype, t));
  }
  if (c.residual_out.present) {
    out.residual_out.resize(v.sum_rounded.size());
    for (std::size_t i = 0; i < v.sum_rounded.size(); ++i) {
      out.residual_out[i] = encode(c.residual_out.dtype, v.sum_rounded[i]);
    }
  }
  return out;
}

long double rstd_of_mean_square(const Case& c, double mean_square) {
  // A sum beyond doubles is infinite, also here.
  const double sum = mean_square + c.eps;
  const long double exact = static_cast<long double>(mean_square) + c.eps;
  return 1 / std::sqrt(std::isinf(sum) ? static_cast<long double>(sum) : exact);
}

std::vector<long double> exact_mean_squares(const Case& c, const Inputs& in, const Normalised& v) {
  std::vector<long double> result(static_cast<std::size_t>(c.rows()));
  const std::int64_t n = c.n();
  const auto used = static_cast<std::int64_t>(std::ceil(c.partial * static_cast<double>(n)));
  for (std::size_t row = 0; row < result.size(); ++row) {
    if (c.mean_square.present) {
      result[row] = in.mean_square[row];
      continue;
    }
    // Neumaier's summation: with it the oracle's own error does not grow with n.
    long double sum = 0, lost = 0;
    const double* x = v.values.data() + static_cast<std::int64_t>(row) * n;
    for (std::int64_t i = 0; i < used; ++i) {
      const long double square = static_cast<long double>(x[i]) * x[i];
      const long double next = sum + square;
      lost += sum >= square ? (sum - next) + square : (square - next) + sum;
      sum = next;
    }
    result[row] = (sum + lost) / static_cast<long double>(used);
  }
  return result;
}

Errors errors_of(const Case& c, const Inputs& in, const Results& results) {
  const Normalised v = normalised(c, in);
  const std::vector<long double> mean_squares = exact_mean_squares(c, in, v);
  const std::int64_t n = c.n();
  Errors worst;
  for (std::int64_t row = 0; row < c.rows(); ++row) {
    const auto r = static_cast<std::size_t>(row);
    const long double rstd = 1 / std::sqrt(mean_squares[r] + static_cast<long double>(c.eps));
    if (c.rstd.present) {
      const double got = decode(c.rstd.dtype, results.rstd[r]);
      worst.rstd = std::max(worst.rstd, ulp_error(c.rstd.dtype, rstd, got));
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const auto place = static_cast<std::size_t>(row * n + i);
      const std::int64_t parameter = weight_start(c, row) + i;
      long double exact = v.values[place] * rstd;
      if (c.weight.present) exact *= weight_at(c, in, parameter);
      if (c.bias.present) exact += in.bias[static_cast<std::size_t>(parameter)];
      const double got = decode(c.y.dtype, results.y[place]);
      worst.y = std::max(worst.y, ulp_error(c.y.dtype, exact, got));
    }
  }
  return worst;
}

// errors_of() starts from sums and weights as they are rounded.
double y_budget(const Case& c) { return rmsnorm::error_bound(c.y.dtype, c.compute_type()); }

bool is_all_16_bit(const Case& c) {
  const DType normalised = c.residual.present ? sum_type(c) : c.x.dtype;
  return rmsnorm::size_in_bytes(normalised) == 2 && rmsnorm::size_in_bytes(c.y.dtype) == 2;
}

}  // namespace rmsnorm_test
