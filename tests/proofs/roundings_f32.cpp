// Why y of f32 is within 3 ulp, where each rounding alone allows a little more.
//
//   roundings_f32 SHARE     what the error of the statistics adds to rstd, relative to it
//
// An error beyond 2.5 ulp is one of a y in [2^k, 2^(k+1)) whose computed product, before it is
// rounded, lies at 2^(k+1) or above: only there a rounding costs a whole ulp of y (theorem
// y_f32_same_binade is about all others). So the roundings of rstd and of x * rstd have to go
// upwards together, and what they add up to relative to y, in units of 2^-24, is at most that many
// ulp. Each is below one unit; both are near to one where rstd and the product lie just above
// powers of two, and this program tries all pairs there: rstd in [1, 1 + 2^-11] and x in [1 -
// 2^-11, 1 + 2^-11], up to powers of two. Elsewhere one of the two is below 1 - 2^-11.
//
// A rounded weight adds one unit, and a sum that is not rounded to its dtype two: the element's own
// rounding, and those of all elements in rstd. A bias that is added by fma changes nothing as long
// as |x * rstd * w| <= |y|: these errors are relative to that product.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <rmsnorm/bounds.hpp>

namespace {

constexpr double unit = 0x1p-24;

// The largest sum of both roundings, relative to the exact product, in units.
double most_of_two_roundings() {
  double most = 2 - 0x1p-11;
  for (int m = 1; m <= (1 << 12) + 2; ++m) {
    const double rstd = 1 + 2 * unit * m;
    const double first = unit / (rstd - unit);  // from the tie below
    for (int k = -(1 << 13) - 4; k <= (1 << 12) + 2; ++k) {
      const double x = 1 + (k < 0 ? unit : 2 * unit) * k;
      const double product = x * rstd;  // exact: 48 bits
      const double second = (static_cast<double>(static_cast<float>(product)) - product) / product;
      most = std::fmax(most, (first + second + first * second) / unit);
    }
  }
  return most;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const double statistics = std::strtod(argv[1], nullptr);
  const double two_roundings = most_of_two_roundings();
  const rmsnorm::DType f32 = rmsnorm::DType::f32;
  std::printf("two roundings: %.6f * 2^-24, statistics: %.6f * 2^-24\n", two_roundings,
              statistics / unit);
  bool holds = true;
  for (int rounded_weight = 0; rounded_weight <= 1; ++rounded_weight) {
    for (int unrounded_sum = 0; unrounded_sum <= 1; ++unrounded_sum) {
      // Up to 1 + 3 units, each of which is a factor of at most 1 + 2^-24 / (1 - 2^-24).
      double factor = (1 + two_roundings * unit) * (1 + statistics);
      for (int i = 0; i < rounded_weight + 2 * unrounded_sum; ++i) factor *= 1 + unit / (1 - unit);
      const double proved = (factor - 1) / unit + 1;
      const double promised =
          rmsnorm::error_bound(f32, f32, rounded_weight != 0, unrounded_sum != 0);
      std::printf("f32%s%s: below %.6f ulp, promised %g\n",
                  rounded_weight != 0 ? ", weight rounded" : "",
                  unrounded_sum != 0 ? ", sum not rounded" : "", proved, promised);
      if (!(proved < promised)) holds = false;
    }
  }
  return holds ? 0 : 1;
}
