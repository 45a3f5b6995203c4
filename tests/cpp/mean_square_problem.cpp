#include "mean_square_problem.hpp"

#include <gtest/gtest.h>

#include "formula.hpp"

namespace rmsnorm_test {

MeanSquareProblem::MeanSquareProblem(DType t, DType out_type,
                                     const std::vector<std::int64_t>& sizes, std::int32_t axis,
                                     Layout layout, double partial) {
  case_.sizes = sizes;
  case_.axis = axis;
  case_.partial = partial;
  case_.x = case_.y = tensor(t, layout);
  const int outer = case_.outer();
  const std::vector<std::int64_t> row_sizes(sizes.begin(), sizes.begin() + outer);
  x = GuardedTensor(t, sizes, strides_of(layout, sizes, outer), 1, 0);
  out_ = GuardedTensor(out_type, row_sizes, strides_of(layout, row_sizes, outer), 0, 8);
  Random random(29);
  for (std::int64_t i = 0; i < x.count(); ++i) x.set(i, random.bell());
  keep();
}

void MeanSquareProblem::keep() {
  x.remember();
  out_.remember();
}

rmsnorm::MeanSquareParams MeanSquareProblem::params() const {
  rmsnorm::MeanSquareParams p;
  p.x = x.view();
  p.mean_square = out_.view();
  p.axis = case_.axis;
  p.partial = case_.partial;
  return p;
}

std::vector<std::uint64_t> MeanSquareProblem::run(const Compute& compute,
                                                  const std::vector<Range>& rows) {
  out_.restore();
  const rmsnorm::Status status = compute(params());
  EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' ' << text(status.code) << "; "
                           << describe(case_);
  EXPECT_FALSE(x.written_outside({})) << describe(case_);
  EXPECT_FALSE(out_.written_outside(rows)) << describe(case_);
  std::vector<std::uint64_t> bits;
  for (std::int64_t i = 0; i < out_.count(); ++i) bits.push_back(out_.bits(i));
  return bits;
}

std::vector<long double> MeanSquareProblem::exact() const {
  Inputs in;
  for (std::int64_t i = 0; i < x.count(); ++i) in.x.push_back(x.value(i));
  return exact_mean_squares(case_, in, Normalised{in.x, {}, x.dtype()});
}

}  // namespace rmsnorm_test
