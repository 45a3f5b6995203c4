#include "forward_problem.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <sstream>

namespace rmsnorm_test {
namespace {

int first_normalised(const Case& c) {
  return c.axis < 0 ? c.axis + static_cast<int>(c.sizes.size()) : c.axis;
}

std::int64_t product(const std::vector<std::int64_t>& v, int begin, int end) {
  std::int64_t p = 1;
  for (int d = begin; d < end; ++d) p *= v[static_cast<std::size_t>(d)];
  return p;
}

// The memory of an alias, seen as the output's dtype.
rmsnorm::Tensor output_view(const GuardedTensor& memory, const TensorSpec& spec) {
  rmsnorm::Tensor t = memory.view();
  t.dtype = spec.dtype;
  return t;
}

std::vector<Range> elements_of(const std::vector<Range>& rows, std::int64_t per_row) {
  std::vector<Range> elements;
  for (const Range& r : rows) elements.push_back({r.first * per_row, r.second * per_row});
  return elements;
}

const char* name(Alias a) {
  return a == Alias::none ? "own memory" : a == Alias::x ? "x" : "residual";
}

}  // namespace

GuardedTensor allocate(const TensorSpec& spec, const std::vector<std::int64_t>& sizes, int outer,
                       int margin) {
  if (!spec.present) return {};
  return {spec.dtype,  sizes,  strides_of(spec.layout, sizes, outer),
          spec.offset, margin, spec.shift};
}

std::vector<double> values_of(const GuardedTensor& t) {
  std::vector<double> v(static_cast<std::size_t>(t.count()));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = t.value(static_cast<std::int64_t>(i));
  return v;
}

std::vector<std::uint64_t> bits_of(const GuardedTensor& t) {
  std::vector<std::uint64_t> v(static_cast<std::size_t>(t.count()));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = t.bits(static_cast<std::int64_t>(i));
  return v;
}

std::string describe(const char* what, const TensorSpec& spec) {
  if (!spec.present) return "";
  std::ostringstream out;
  out << ' ' << what << '=' << rmsnorm::name(spec.dtype);
  if (spec.layout != Layout::contiguous) out << '/' << name(spec.layout);
  if (spec.offset != 0) out << '+' << spec.offset;
  if (spec.shift != 0) out << '+' << spec.shift << " bytes";
  return out.str();
}

int Case::outer() const { return first_normalised(*this); }
std::int64_t Case::rows() const { return product(sizes, 0, outer()); }
std::int64_t Case::n() const { return product(sizes, outer(), static_cast<int>(sizes.size())); }

bool Case::computes_in_double() const {
  for (const TensorSpec* t : {&x, &residual, &weight, &bias, &y, &residual_out}) {
    if (t->present && t->dtype == DType::f64) return true;
  }
  return false;
}

std::string describe(const Case& c) {
  std::ostringstream out;
  out << '(';
  for (std::size_t d = 0; d < c.sizes.size(); ++d) out << (d > 0 ? "," : "") << c.sizes[d];
  out << ") axis=" << c.axis;
  out << describe("x", c.x);
  out << describe("residual", c.residual);
  out << describe("weight", c.weight);
  out << describe("bias", c.bias);
  out << describe("mean_square", c.mean_square);
  out << describe("y", c.y);
  out << describe("residual_out", c.residual_out);
  out << describe("rstd", c.rstd);
  out << " rounding=" << static_cast<int>(c.rounding)
      << " broadcast=" << static_cast<int>(c.broadcast) << " eps=" << c.eps
      << " weight_offset=" << c.weight_offset << " partial=" << c.partial
      << " round_residual=" << c.round_residual;
  if (c.y_over != Alias::none) out << " y over " << name(c.y_over);
  if (c.residual_out_over != Alias::none) {
    out << " residual_out over " << name(c.residual_out_over);
  }
  return out.str();
}

std::vector<std::int64_t> weight_sizes(const Case& c, Broadcast broadcast) {
  const auto first = c.sizes.begin() + c.outer();
  std::vector<std::int64_t> sizes(first, c.sizes.end());
  if (c.outer() == 0 || broadcast == Broadcast::shared) return sizes;
  if (broadcast == Broadcast::per_head) {
    sizes.insert(sizes.begin(), *(first - 1));
    return sizes;
  }
  sizes.insert(sizes.begin(), static_cast<std::size_t>(c.outer()), 1);
  sizes[0] = c.sizes[0];
  return sizes;
}

std::int64_t weight_start(const Case& c, std::int64_t row, Broadcast broadcast) {
  if (c.outer() == 0 || broadcast == Broadcast::shared) return 0;
  if (broadcast == Broadcast::per_head) {
    return row % c.sizes[static_cast<std::size_t>(c.outer() - 1)] * c.n();
  }
  return row / (c.rows() / c.sizes[0]) * c.n();
}

ForwardProblem::ForwardProblem(const Case& c, std::uint64_t seed) : case_(c) {
  const int outer = c.outer();
  const std::vector<std::int64_t> row_sizes(c.sizes.begin(), c.sizes.begin() + outer);
  const std::vector<std::int64_t> w_sizes = weight_sizes(c);
  const int w_outer = static_cast<int>(w_sizes.size() + static_cast<std::size_t>(outer)) -
                      static_cast<int>(c.sizes.size());
  const bool x_written = c.y_over == Alias::x || c.residual_out_over == Alias::x;
  const bool residual_written =
      c.y_over == Alias::residual || c.residual_out_over == Alias::residual;
  x = allocate(c.x, c.sizes, outer, x_written ? canary_margin : 0);
  residual = allocate(c.residual, c.sizes, outer, residual_written ? canary_margin : 0);
  weight = allocate(c.weight, w_sizes, w_outer, 0);
  bias = allocate(c.bias, w_sizes, w_outer, 0);
  mean_square = allocate(c.mean_square, row_sizes, outer, 0);
  if (c.y_over == Alias::none) y_ = allocate(c.y, c.sizes, outer, canary_margin);
  if (c.residual_out_over == Alias::none) {
    residual_out_ = allocate(c.residual_out, c.sizes, outer, canary_margin);
  }
  rstd_ = allocate(c.rstd, row_sizes, outer, canary_margin);

  Random random(seed);
  const std::int64_t n = std::max<std::int64_t>(c.n(), 1);
  double scale = 1;
  for (std::int64_t i = 0; i < x.count(); ++i) {
    if (i % n == 0) scale = std::ldexp(1.0, static_cast<int>(random.below(7)) - 3);
    x.set(i, random.below(50) == 0 ? 0.0 : scale * random.bell());
    if (residual.present()) residual.set(i, random.bell());
  }
  for (std::int64_t i = 0; i < weight.count(); ++i) {
    weight.set(i, c.weight_offset != 0 ? random.symmetric() / 4 : 1 + random.symmetric() / 2);
  }
  for (std::int64_t i = 0; i < bias.count(); ++i) bias.set(i, random.symmetric() / 4);
  for (std::int64_t i = 0; i < mean_square.count(); ++i) {
    mean_square.set(i, 1.5 + random.symmetric());
  }
  keep();
}

std::vector<GuardedTensor*> ForwardProblem::memories() {
  std::vector<GuardedTensor*> present;
  for (GuardedTensor* t :
       {&x, &residual, &weight, &bias, &mean_square, &y_, &residual_out_, &rstd_}) {
    if (t->present()) present.push_back(t);
  }
  return present;
}

void ForwardProblem::keep() {
  for (GuardedTensor* t : memories()) t->remember();
}

void ForwardProblem::restore() {
  for (GuardedTensor* t : memories()) t->restore();
}

GuardedTensor& ForwardProblem::y_memory() {
  return case_.y_over == Alias::x ? x : case_.y_over == Alias::residual ? residual : y_;
}

GuardedTensor& ForwardProblem::residual_out_memory() {
  return case_.residual_out_over == Alias::x          ? x
         : case_.residual_out_over == Alias::residual ? residual
                                                      : residual_out_;
}

rmsnorm::ForwardParams ForwardProblem::params() {
  rmsnorm::ForwardParams p;
  p.x = x.view();
  p.residual = residual.view();
  p.weight = weight.view();
  p.bias = bias.view();
  p.mean_square = mean_square.view();
  p.y = output_view(y_memory(), case_.y);
  p.residual_out = output_view(residual_out_memory(), case_.residual_out);
  p.rstd = rstd_.view();
  p.axis = case_.axis;
  p.rounding = case_.rounding;
  p.eps = case_.eps;
  p.weight_offset = case_.weight_offset;
  p.partial = case_.partial;
  p.round_residual = case_.round_residual;
  return p;
}

Inputs ForwardProblem::inputs() const {
  return {values_of(x), values_of(residual), values_of(weight), values_of(bias),
          values_of(mean_square)};
}

Results ForwardProblem::run(Isa isa, const std::vector<Range>& row_ranges) {
  restore();
  const rmsnorm::ForwardParams p = params();
  for (const Range& r : row_ranges) {
    const rmsnorm::Status status = rmsnorm::cpu::forward(p, r.first, r.second, isa);
    EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' ' << text(status.code) << "; "
                             << rmsnorm::cpu::name(isa) << ' ' << describe(case_);
  }
  return collect(row_ranges, rmsnorm::cpu::name(isa));
}

Results ForwardProblem::run(const Compute& compute, const std::string& what) {
  restore();
  const rmsnorm::Status status = compute(params());
  EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' ' << text(status.code) << "; "
                           << what << ' ' << describe(case_);
  return collect({{0, case_.rows()}}, what);
}

Results ForwardProblem::collect(const std::vector<Range>& row_ranges, const std::string& what) {
  const std::vector<Range> elements = elements_of(row_ranges, case_.n());
  for (GuardedTensor* t : memories()) {
    const bool written = t == &y_memory() || t == &residual_out_memory();
    const std::vector<Range> allowed = written       ? elements
                                       : t == &rstd_ ? row_ranges
                                                     : std::vector<Range>{};
    EXPECT_FALSE(t->written_outside(allowed))
        << what << " wrote outside of its outputs; " << describe(case_);
  }
  return results();
}

Results ForwardProblem::results() {
  Results out;
  out.y = bits_of(y_memory());
  if (case_.residual_out.present) out.residual_out = bits_of(residual_out_memory());
  if (case_.rstd.present) out.rstd = bits_of(rstd_);
  return out;
}

bool result_is_checked(std::initializer_list<TensorSpec> tensors) {
  const char* f16 = std::getenv("RMSNORM_TEST_F16");
  if (f16 == nullptr || std::strcmp(f16, "unchecked") != 0) return true;
  for (const TensorSpec& t : tensors) {
    if (t.present && t.dtype == DType::f16) return false;
  }
  return true;
}

bool result_is_checked(const Case& c) {
  return result_is_checked({c.x, c.residual, c.weight, c.bias, c.y, c.residual_out});
}

void expect_same(const Case& c, const Results& expected, const Results& got,
                 const std::string& what) {
  if (!result_is_checked(c)) return;
  struct Pair {
    const char* name;
    DType dtype;
    const std::vector<std::uint64_t>& expected;
    const std::vector<std::uint64_t>& got;
  };
  const Pair pairs[] = {
      {"y", c.y.dtype, expected.y, got.y},
      {"residual_out", c.residual_out.dtype, expected.residual_out, got.residual_out},
      {"rstd", c.rstd.dtype, expected.rstd, got.rstd}};
  for (const Pair& pair : pairs) {
    ASSERT_EQ(pair.expected.size(), pair.got.size()) << what << ' ' << pair.name;
    for (std::size_t i = 0; i < pair.expected.size(); ++i) {
      if (same(pair.dtype, pair.expected[i], pair.got[i])) continue;
      ADD_FAILURE() << what << ": " << pair.name << '[' << i << "] is "
                    << decode(pair.dtype, pair.got[i]) << " (0x" << std::hex << pair.got[i]
                    << "), expected " << decode(pair.dtype, pair.expected[i]) << " (0x"
                    << pair.expected[i] << std::dec << "); " << describe(c);
      break;
    }
  }
}

}  // namespace rmsnorm_test
