#include "backward_problem.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "case_grid.hpp"

namespace rmsnorm_test {
namespace {

const char* name(GradientAlias a) {
  switch (a) {
    case GradientAlias::none: return "own memory";
    case GradientAlias::dy: return "dy";
    case GradientAlias::x: return "x";
    case GradientAlias::residual: return "residual";
    case GradientAlias::d_residual: return "d_residual";
  }
  return "unknown";
}

int outer_of(const Case& c, const std::vector<std::int64_t>& parameter_sizes) {
  return static_cast<int>(parameter_sizes.size()) + c.outer() - static_cast<int>(c.sizes.size());
}

void write_over(GradientCase& g, GradientAlias alias, const TensorSpec& input) {
  g.dx_over = alias;
  g.dx = input;
}

}  // namespace

bool GradientCase::computes_in_double() const {
  for (const TensorSpec* t :
       {&dy, &forward.x, &forward.residual, &forward.weight, &d_residual, &dx, &dweight, &dbias}) {
    if (t->present && t->dtype == DType::f64) return true;
  }
  return false;
}

std::string describe(const GradientCase& c) {
  std::ostringstream out;
  out << describe("dy", c.dy) << describe("d_residual", c.d_residual) << describe("dx", c.dx)
      << describe("dweight", c.dweight) << describe("dbias", c.dbias)
      << describe("d_mean_square", c.d_mean_square)
      << " bias_broadcast=" << static_cast<int>(c.bias_broadcast) << " dx over " << name(c.dx_over)
      << ", of ";
  return out.str() + describe(c.forward);
}

GradientCase gradient_of(const Case& c) {
  GradientCase g;
  g.forward = c;
  g.bias_broadcast = c.broadcast;
  g.dy = c.y;
  g.d_residual = c.residual_out;
  g.dx = c.y;
  g.dx.dtype = c.x.dtype;
  if (c.weight.present) g.dweight = tensor(c.weight.dtype, c.y.layout, c.y.offset);
  if (c.bias.present) g.dbias = tensor(c.bias.dtype, c.y.layout, c.weight.offset);
  if (c.mean_square.present) g.d_mean_square = tensor(c.mean_square.dtype, c.rstd.layout);
  if (c.round_residual) g.forward.residual = {};
  if (c.y_over == Alias::x) {
    write_over(g, GradientAlias::x, c.x);
  } else if (c.residual_out_over == Alias::x && g.forward.residual.present) {
    write_over(g, GradientAlias::residual, c.residual);
  } else if (c.residual_out_over == Alias::residual) {
    write_over(g, GradientAlias::d_residual, c.residual_out);
  } else if (c.y_over == Alias::residual) {
    write_over(g, GradientAlias::dy, c.y);
  }
  return g;
}

const std::vector<GradientCase>& gradient_cases() {
  static const std::vector<GradientCase> all = [] {
    std::vector<GradientCase> cases;
    for (const Case& c : all_cases()) cases.push_back(gradient_of(c));
    // More blocks than one for each group, groups that share one of two outputs.
    int turn = 0;
    for (const DType t : all_dtypes) {
      for (const std::vector<std::int64_t>& sizes :
           {std::vector<std::int64_t>{3, 150, 2, 24}, {2, 9, 5, 33}, {1200, 16}, {1, 300, 1, 40}}) {
        for (const Broadcast weight :
             {Broadcast::shared, Broadcast::per_head, Broadcast::per_sample}) {
          for (const Broadcast bias :
               {Broadcast::shared, Broadcast::per_head, Broadcast::per_sample}) {
            if (grid_is_small() && ++turn % 7 != 0) continue;
            GradientCase g;
            g.forward.sizes = sizes;
            g.forward.broadcast = weight;
            g.bias_broadcast = bias;
            g.dy = g.dx = g.forward.x = g.forward.weight = g.dweight = g.dbias = tensor(t);
            cases.push_back(g);
          }
        }
      }
    }
    return cases;
  }();
  return all;
}

BackwardProblem::BackwardProblem(const GradientCase& c, const WorkspaceBytes& workspace_bytes,
                                 std::uint64_t seed)
    : case_(c) {
  const Case& f = c.forward;
  const int outer = f.outer();
  const std::vector<std::int64_t> row_sizes(f.sizes.begin(), f.sizes.begin() + outer);
  const std::vector<std::int64_t> w_sizes = weight_sizes(f);
  const std::vector<std::int64_t> b_sizes = weight_sizes(f, c.bias_broadcast);
  const auto margin_of = [&c](GradientAlias a) { return c.dx_over == a ? canary_margin : 0; };
  dy = allocate(c.dy, f.sizes, outer, margin_of(GradientAlias::dy));
  x = allocate(f.x, f.sizes, outer, margin_of(GradientAlias::x));
  residual = allocate(f.residual, f.sizes, outer, margin_of(GradientAlias::residual));
  d_residual = allocate(c.d_residual, f.sizes, outer, margin_of(GradientAlias::d_residual));
  weight = allocate(f.weight, w_sizes, outer_of(f, w_sizes), 0);
  rstd = allocate(f.rstd, row_sizes, outer, 0);
  mean_square = allocate(f.mean_square, row_sizes, outer, 0);
  if (c.dx_over == GradientAlias::none) dx_ = allocate(c.dx, f.sizes, outer, canary_margin);
  dweight_ = allocate(c.dweight, w_sizes, outer_of(f, w_sizes), canary_margin);
  dbias_ = allocate(c.dbias, b_sizes, outer_of(f, b_sizes), canary_margin);
  d_mean_square_ = allocate(c.d_mean_square, row_sizes, outer, canary_margin);

  Random random(seed);
  const std::int64_t n = std::max<std::int64_t>(f.n(), 1);
  const double offset = f.weight_offset != 0 ? 0 : 1;
  for (std::int64_t i = 0; i < x.count(); ++i) {
    x.set(i, random.below(50) == 0 ? 0.0 : random.bell());
    dy.set(i, random.bell() / 8);
    if (residual.present()) residual.set(i, random.bell());
    if (d_residual.present()) d_residual.set(i, random.symmetric() / 4);
  }
  for (std::int64_t i = 0; i < weight.count(); ++i) weight.set(i, offset + random.symmetric() / 2);
  for (std::int64_t i = 0; i < mean_square.count(); ++i) {
    mean_square.set(i, 1.5 + random.symmetric());
  }
  for (std::int64_t row = 0; row < rstd.count(); ++row) {
    double sum = 0;
    for (std::int64_t i = 0; i < f.n(); ++i) {
      const double s =
          x.value(row * n + i) + (residual.present() ? residual.value(row * n + i) : 0);
      sum += s * s;
    }
    rstd.set(row, 1.25 / std::sqrt(sum / static_cast<double>(n) + 1e-6));
  }
  const std::int64_t floats = (workspace_bytes(params()) + 3) / 4;
  workspace_ = GuardedTensor(DType::f32, {floats}, {1}, 0, 0);
  keep();
}

std::vector<GuardedTensor*> BackwardProblem::memories() {
  std::vector<GuardedTensor*> present;
  for (GuardedTensor* t : {&dy, &x, &residual, &weight, &rstd, &mean_square, &d_residual, &dx_,
                           &dweight_, &dbias_, &d_mean_square_, &workspace_}) {
    if (t->present()) present.push_back(t);
  }
  return present;
}

void BackwardProblem::keep() {
  for (GuardedTensor* t : memories()) t->remember();
}

GuardedTensor& BackwardProblem::dx_memory() {
  switch (case_.dx_over) {
    case GradientAlias::dy: return dy;
    case GradientAlias::x: return x;
    case GradientAlias::residual: return residual;
    case GradientAlias::d_residual: return d_residual;
    default: return dx_;
  }
}

rmsnorm::BackwardParams BackwardProblem::params() {
  rmsnorm::BackwardParams p;
  p.dy = dy.view();
  p.x = x.view();
  p.residual = residual.view();
  p.weight = weight.view();
  p.rstd = rstd.view();
  p.mean_square = mean_square.view();
  p.d_residual = d_residual.view();
  p.dx = dx_memory().view();
  p.dx.dtype = case_.dx.dtype;
  p.dweight = dweight_.view();
  p.dbias = dbias_.view();
  p.d_mean_square = d_mean_square_.view();
  if (workspace_.present()) {
    p.workspace = workspace_.view().data;
    p.workspace_bytes = workspace_.count() * 4;
  }
  p.axis = case_.forward.axis;
  p.eps = case_.forward.eps;
  p.weight_offset = case_.forward.weight_offset;
  p.partial = case_.forward.partial;
  return p;
}

GradientInputs BackwardProblem::inputs() const {
  return {values_of(dy),   values_of(x),           values_of(residual),  values_of(weight),
          values_of(rstd), values_of(mean_square), values_of(d_residual)};
}

GradientResults BackwardProblem::run(const Compute& compute, const std::string& what) {
  for (GuardedTensor* t : memories()) t->restore();
  const rmsnorm::Status status = compute(params());
  EXPECT_TRUE(status.ok()) << rmsnorm::name(status.argument) << ' ' << text(status.code) << "; "
                           << what << ' ' << describe(case_);
  for (GuardedTensor* t : memories()) {
    const bool written = t == &dx_memory() || t == &dweight_ || t == &dbias_ ||
                         t == &d_mean_square_ || t == &workspace_;
    const std::vector<Range> allowed =
        written ? std::vector<Range>{{0, t->count()}} : std::vector<Range>{};
    EXPECT_FALSE(t->written_outside(allowed))
        << what << " wrote outside of its outputs; " << describe(case_);
  }
  return results();
}

GradientResults BackwardProblem::results() {
  return {bits_of(dx_memory()), bits_of(dweight_), bits_of(dbias_), bits_of(d_mean_square_)};
}

void expect_same(const GradientCase& c, const GradientResults& expected, const GradientResults& got,
                 const std::string& what) {
  if (!result_is_checked({c.dy, c.forward.x, c.forward.residual, c.forward.weight, c.d_residual,
                          c.dx, c.dweight, c.dbias})) {
    return;
  }
  const auto compare = [&](const char* name, DType t, const std::vector<std::uint64_t>& a,
                           const std::vector<std::uint64_t>& b) {
    ASSERT_EQ(a.size(), b.size()) << what << ' ' << name << ' ' << describe(c);
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (same(t, a[i], b[i])) continue;
      ADD_FAILURE() << what << ": " << name << '[' << i << "] is " << decode(t, b[i])
                    << ", expected " << decode(t, a[i]) << "; " << describe(c);
      return;
    }
  };
  compare("dx", c.dx.dtype, expected.dx, got.dx);
  compare("dweight", c.dweight.dtype, expected.dweight, got.dweight);
  compare("dbias", c.dbias.dtype, expected.dbias, got.dbias);
  compare("d_mean_square", c.d_mean_square.dtype, expected.d_mean_square, got.d_mean_square);
}

}  // namespace rmsnorm_test
