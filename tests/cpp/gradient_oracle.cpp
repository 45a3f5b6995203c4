// The contract's gradients in extended precision, and how far the library may be from them.
//
// In units u of the compute type (half an ulp of 1), with c' the mean of |g xhat|:
//
//     g     1 u                 its product
//     xhat  2 u                 rstd and its product
//     c     1 + 2 + 9 + 1 u     of c', by the terms above, lanes of eight terms and its own
//     rounding;
//                               in double the sums of blocks add a u for each block
//     dx    g: 1 + 1 + 2 u, c xhat: 13 + 2 + 1 + 2 u, its last rounding 1 u; then half an ulp of dx
//     sums  2 u, one for each of at most 64 rows and one of their total, of the sum of magnitudes;
//           half an ulp
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "backward_problem.hpp"

namespace rmsnorm_test {
namespace {

using Real = long double;

struct Sum {
  Real value = 0, magnitude = 0;
  void add(Real v) {
    value += v;
    magnitude += std::fabs(v);
  }
};

class Oracle {
 public:
  Oracle(const GradientCase& c, const GradientInputs& in, const GradientResults& got,
         const std::string& what)
      : c_(c), f_(c.forward), in_(in), got_(got), what_(what), n_(f_.n()) {
    unit_ = c.computes_in_double() ? 0x1p-53L : 0x1p-24L;
    counted_ = static_cast<std::int64_t>(std::ceil(f_.partial * static_cast<double>(n_)));
    dweight_.resize(got.dweight.size());
    dbias_.resize(got.dbias.size());
  }

  void judge() {
    for (std::int64_t row = 0; row < f_.rows(); ++row) judge_row(row);
    judge_sums("dweight", c_.dweight.dtype, dweight_, got_.dweight, 67);
    judge_sums("dbias", c_.dbias.dtype, dbias_, got_.dbias, 65);
  }

 private:
  Real in_compute_type(double v) const { return round_to(c_.compute_type(), v); }

  void judge_row(std::int64_t row) {
    const std::vector<Real> x = normalised(row);
    const Real rstd = rstd_of(row, x);
    const std::int64_t w_start = weight_start(f_, row);
    const std::int64_t b_start = weight_start(f_, row, c_.bias_broadcast);
    std::vector<Real> g(x.size()), xhat(x.size());
    Sum products;
    for (std::int64_t i = 0; i < n_; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const Real dy = in_.dy[place(row, i)];
      xhat[k] = x[k] * rstd;
      g[k] = dy * weight_at(w_start + i);
      products.add(g[k] * xhat[k]);
      if (c_.dweight.present) dweight_[static_cast<std::size_t>(w_start + i)].add(dy * xhat[k]);
      if (c_.dbias.present) dbias_[static_cast<std::size_t>(b_start + i)].add(dy);
    }
    const Real of_c = 18 + (c_.computes_in_double() ? static_cast<Real>(n_) / 256 : 0);
    const Real c = products.value / static_cast<Real>(counted_);
    const Real magnitude = products.magnitude / static_cast<Real>(counted_);
    for (std::int64_t i = 0; i < n_; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const bool corrected = i < counted_ && !f_.mean_square.present;
      Real dx = (g[k] - (corrected ? c * xhat[k] : 0)) * rstd;
      if (c_.d_residual.present) dx += in_.d_residual[place(row, i)];
      const Real error = std::fabs(g[k]) * 4 + std::fabs(xhat[k]) * magnitude * of_c;
      expect_near("dx", c_.dx.dtype, place(row, i), dx, error * rstd + std::fabs(dx), got_.dx);
    }
    if (!c_.d_mean_square.present) return;
    const Real factor = rstd * rstd / 2;
    expect_near("d_mean_square", c_.d_mean_square.dtype, static_cast<std::size_t>(row),
                -factor * products.value, factor * products.magnitude * of_c, got_.d_mean_square);
  }

  std::size_t place(std::int64_t row, std::int64_t i) const {
    return static_cast<std::size_t>(row * n_ + i);
  }

  std::vector<Real> normalised(std::int64_t row) const {
    std::vector<Real> x(static_cast<std::size_t>(n_));
    for (std::int64_t i = 0; i < n_; ++i) {
      const double v = in_.x[place(row, i)];
      const double more = f_.residual.present ? in_.residual[place(row, i)] : 0;
      const double sum =
          c_.computes_in_double()
              ? v + more
              : static_cast<double>(static_cast<float>(v) + static_cast<float>(more));
      x[static_cast<std::size_t>(i)] = sum;
    }
    return x;
  }

  // A given one counts where it belongs to a row that is computed without scaling.
  Real rstd_of(std::int64_t row, const std::vector<Real>& x) const {
    if (f_.rstd.present) {
      const Real given = in_compute_type(in_.rstd[static_cast<std::size_t>(row)]);
      const bool in_double = c_.computes_in_double();
      if (given >= (in_double ? 0x1p-500L : 0x1p-63L) && given <= (in_double ? 0x1p500L : 0x1p50L))
        return given;
    }
    Real mean = 0;
    if (f_.mean_square.present) {
      mean = in_.mean_square[static_cast<std::size_t>(row)];
    } else {
      for (std::int64_t i = 0; i < counted_; ++i) {
        mean += x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(i)];
      }
      mean /= static_cast<Real>(counted_);
    }
    return 1 / std::sqrt(mean + static_cast<Real>(f_.eps));
  }

  Real weight_at(std::int64_t i) const {
    if (!f_.weight.present) return 1;
    const double w = in_.weight[static_cast<std::size_t>(i)];
    if (f_.weight_offset == 0) return w;
    const auto offset = static_cast<double>(in_compute_type(f_.weight_offset));
    return c_.computes_in_double()
               ? offset + w
               : static_cast<double>(static_cast<float>(offset) + static_cast<float>(w));
  }

  void judge_sums(const char* name, DType t, const std::vector<Sum>& sums,
                  const std::vector<std::uint64_t>& got, int units) {
    for (std::size_t i = 0; i < sums.size(); ++i) {
      expect_near(name, t, i, sums[i].value, sums[i].magnitude * units, got);
    }
  }

  // `error` in units of the compute type; half an ulp of the result's dtype comes on top.
  void expect_near(const char* name, DType t, std::size_t i, Real exact, Real error,
                   const std::vector<std::uint64_t>& bits) {
    if (failed_) return;
    const double got = decode(t, bits[i]);
    const Real bound = error * unit_ + ulp_at(t, exact) * 0.5L + ulp_at(c_.compute_type(), 0) * 4;
    const bool alike =
        std::isfinite(exact)
            ? std::fabs(got - exact) <= bound ||
                  (std::isinf(got) && std::isinf(round_to(t, static_cast<double>(exact + bound))))
            : std::isnan(got) || std::isinf(got);
    if (alike) return;
    failed_ = true;
    ADD_FAILURE() << what_ << ": " << name << '[' << i << "] is " << got << ", expected " << exact
                  << " within " << bound << "; " << describe(c_);
  }

  const GradientCase& c_;
  const Case& f_;
  const GradientInputs& in_;
  const GradientResults& got_;
  const std::string& what_;
  std::int64_t n_;
  std::int64_t counted_;
  Real unit_;
  std::vector<Sum> dweight_, dbias_;
  bool failed_ = false;
};

}  // namespace

void expect_gradients(const GradientCase& c, const GradientInputs& in, const GradientResults& got,
                      const std::string& what) {
  Oracle(c, in, got, what).judge();
}

}  // namespace rmsnorm_test
